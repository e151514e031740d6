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
  cudaLaunchAttribute attributes[3] = {};
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
    if (grid.overlaps) {
      cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;  // points into itself
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Asks for what a kernel gets only when asked.
inline cudaError_t opt_in(const void* kernel, const Grid& grid) {
  cudaError_t status = cudaSuccess;
  // The limit, not what this launch takes: another thread may launch the same kernel with more.
  if (grid.shared_bytes > kSharedWithoutOptIn) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(grid.shared_limit));
    // Two blocks must find room where the plan says so: as little as possible for the L1 cache.
    if (status == cudaSuccess)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared);
  }
  if (status == cudaSuccess && grid.cluster > kPortableCluster)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, Stream stream,
            const Arguments&... arguments) {
  if (grid.blocks < 1 || grid.blocks > INT_MAX)
    throw std::runtime_error(std::string("cbam_cuda: ") + name +
                             ": expected 1 to 2^31 - 1 blocks, " + "got " +
                             std::to_string(grid.blocks));
  check(opt_in(reinterpret_cast<const void*>(kernel), grid), name);
  const LaunchConfig launch(grid, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...), name);
}

// How many clusters of the grid's size the current device runs at once, as far as this process may
// use it; 0 for a size that it does not take.
template <class... Parameters>
int most_clusters(void (*kernel)(Parameters...), const Grid& grid) {
  int most = 0;
  const LaunchConfig launch(grid, nullptr);
  if (opt_in(reinterpret_cast<const void*>(kernel), grid) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&most, kernel, &launch.config) == cudaSuccess)
    return most;
  cudaGetLastError();
  return 0;
}

// Whether the current device runs grids whose blocks wait for each other.
inline bool takes_cooperative_launches() {
  int device = 0, cooperates = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device) == cudaSuccess)
    return cooperates != 0;
  cudaGetLastError();
  return false;
}

// How many blocks of such a grid run at once.
template <class... Parameters>
int64_t most_blocks(void (*kernel)(Parameters...), const Grid& grid) {
  int device = 0, multiprocessors = 0, each = 0;
  if (opt_in(reinterpret_cast<const void*>(kernel), grid) == cudaSuccess &&
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) ==
          cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &each, kernel, grid.threads, static_cast<size_t>(grid.shared_bytes)) == cudaSuccess)
    return int64_t{each} * multiprocessors;
  cudaGetLastError();
  return 0;
}

// Why not all blocks of a grid that wait for each other can run, or null.
template <class... Parameters>
const char* why_not_run(void (*kernel)(Parameters...), const Grid& grid) {
  if (grid.cooperative && !takes_cooperative_launches())
    return "the device takes no cooperative launches, which blocks need to wait for each other";
  const bool room = grid.cooperative ? most_blocks(kernel, grid) >= grid.blocks
                                     : grid.cluster == 1 || most_clusters(kernel, grid) > 0;
  return room ? nullptr : "this process may not use enough of the device for a team";
}

}  // namespace cbam::cuda
