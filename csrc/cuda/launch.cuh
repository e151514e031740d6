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

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, Stream stream,
            const Arguments&... arguments) {
  if (grid.blocks < 1 || grid.blocks > INT_MAX)
    throw std::runtime_error(std::string("cbam_cuda: ") + name +
                             ": expected 1 to 2^31 - 1 blocks, " + "got " +
                             std::to_string(grid.blocks));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  // The limit, not what this launch takes: another thread may launch the same kernel with more.
  if (grid.shared_bytes > kSharedWithoutOptIn)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_limit)),
          name);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace cbam::cuda
