// The spatial gate backwards, from the sums over channels that the first pass left:
//
//   dz[s]        = (d_spatial[s] + what else reached the gate) * gate[s] * (1 - gate[s])
//   d_maps[m][s] = sum_k dz[s - k] * conv_weight[m][k], the first divided by the channels
//   d_conv[m][k] = sum_s maps[m][s] * dz[s - k]      d_bias = sum_s dz[s]
//
// Where what comes in reached the logits, it is dz.
//
// grid    samples * boxes blocks of 256 threads; a block takes a box of pixels
// shared  dz of the box and its halo; the weights, and with d_conv both maps of the box in their
//         place
// bytes   reads the parts of d_spatial and the gate, halo included, and with d_conv the maps;
//         writes d_maps, and 2 * taps + 1 sums a block
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "convolution_backward.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 8 ? 2 : 4)
    stencil_kernel(const Stencil p) {
  using A = acc_t<T>;
  const Box box(p.geometry, p.space, blockIdx.x);
  const int64_t pixels = p.space.pixels(), taps = p.space.taps();
  SharedCarver carver(dynamic_shared_memory());
  const StencilShared<A> shared(carver, p.geometry, p.space, p.d_conv != nullptr);
  for (int i = threadIdx.x; i < 2 * taps; i += kThreads)
    shared.weight[i] =
        weight_at<T>(p.conv_weight.data, p.weight_dtype, p.conv_weight.place(i, taps));
  wait_for_previous_launch();
  const A* gate = static_cast<const A*>(p.spatial_gate);
  const A* more = static_cast<const A*>(p.d_spatial_gate);
  const T* maps = static_cast<const T*>(p.maps) + box.sample * 2 * pixels;
  for_staged_pixels(box, p.space, [&](int i, const StagedPixel& staged) {
    const int pixel = staged.pixel;
    A dz = A(0);
    if (pixel >= 0) {
      const A d = total_of<A>(p.d_spatial, box.sample, pixels, pixel) +
                  (more ? __ldg(more + box.sample * pixels + pixel) : A(0));
      dz = gate ? d * sigmoid_derivative<A>(gate[box.sample * pixels + pixel]) : d;
    }
    stage_dz(box, i, dz, shared.dz);
  });
  __syncthreads();
  A* d_maps = static_cast<A*>(p.d_maps) + box.sample * 2 * pixels;
  map_gradients(box, p.space, shared.dz, shared.weight, [&](int pixel, A mean, A max) {
    d_maps[pixel] = mean / static_cast<A>(p.channels);
    d_maps[pixels + pixel] = max;
  });
  if (!p.d_conv) return;
  __syncthreads();
  for_staged_pixels(box, p.space, [&](int, const StagedPixel& staged) {
    if (staged.inside)
      stage_saved_maps(p.space, maps, staged.pixel, staged.place, box.pixels(), shared.maps);
  });
  __syncthreads();
  weight_gradients(box, 0, box.pixels(), p.space, shared.dz, shared.maps,
                   static_cast<A*>(p.d_conv) + int64_t{blockIdx.x} * (2 * taps + 1));
}

}  // namespace

void stencil(DType dtype, const Stencil& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    launch("stencil", stencil_kernel<typename decltype(storage)::type>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
