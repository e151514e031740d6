// The only place that launches a kernel, and how every call of the CUDA runtime is checked.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace cbam::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that was reported must not surface again in someone else's call
  throw std::runtime_error(std::string("cbam_cuda: ") + what + ": " + cudaGetErrorString(status));
}

// A grid as the runtime wants it told.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(const Grid& grid, Stream stream) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (grid.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (grid.cooperative) {
      cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;  // points into itself
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Asks for what a kernel gets only when asked.
inline void opt_in(const char* name, const void* kernel, const Grid& grid) {
  // The limit, not what this launch takes: another thread may launch the same kernel with more.
  if (grid.shared_bytes > kSharedWithoutOptIn)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_limit)),
          name);
  if (grid.cluster > kPortableCluster)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, Stream stream,
            const Arguments&... arguments) {
  if (grid.blocks < 1 || grid.blocks > INT_MAX)
    throw std::runtime_error(std::string("cbam_cuda: ") + name +
                             ": expected 1 to 2^31 - 1 blocks, " + "got " +
                             std::to_string(grid.blocks));
  opt_in(name, reinterpret_cast<const void*>(kernel), grid);
  const LaunchConfig launch(grid, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...), name);
}

// Whether the current device, as far as this process may use it, can run all blocks of a
// cooperative grid at once, or a cluster of the grid's size at all.
template <class... Parameters>
bool can_run(const char* name, void (*kernel)(Parameters...), const Grid& grid) {
  opt_in(name, reinterpret_cast<const void*>(kernel), grid);
  int most = 0;
  if (!grid.cooperative) {
    const LaunchConfig launch(grid, nullptr);
    check(cudaOccupancyMaxActiveClusters(&most, kernel, &launch.config), name);
    return most > 0;
  }
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, kernel, grid.threads,
                                                      static_cast<size_t>(grid.shared_bytes)),
        name);
  return int64_t{most} * multiprocessors >= grid.blocks;
}

}  // namespace cbam::cuda
