// dx, an element at a time, of the streaming kernel and of the resident one.
//
//   dx[c][s] = (dout[c][s] * spatial_gate[s] + d_mean[s] + d_max[s] where c is s's maximum)
//              * channel_gate[c] + d_avg[c] + d_top[c] where s is c's maximum
//
// d_mean and d_avg are already divided by the channels and the pixels.
#pragma once

namespace cbam::cuda {

// `of_maps` and `of_pools` are what reaches it through the maps and the pools.
template <class A>
__device__ __forceinline__ A input_gradient_of(A dout, A spatial_gate, A of_maps, A channel_gate,
                                               A of_pools) {
  return (dout * spatial_gate + of_maps) * channel_gate + of_pools;
}

}  // namespace cbam::cuda
