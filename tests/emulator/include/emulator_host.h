// The host's side of the CUDA runtime: launches run to their end before the call returns.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "emulator_vectors.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t status);
// After a launch that failed, the whole report of what was found.
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

namespace emulator {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  const void* kernel;
  void (*thread)(const void* arguments);  // runs one thread of the kernel
  const void* arguments;
  size_t argument_bytes;
};

cudaError_t run(const Launch& launch);

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto thread = [](const void* p) {
    const Call& call = *static_cast<const Call*>(p);
    std::apply(call.first, call.second);
  };
  return emulator::run({config->gridDim, config->blockDim, config->dynamicSmemBytes,
                        reinterpret_cast<const void*>(kernel), thread, &call, sizeof call});
}
