// What the catalogue's kernels and entries share.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/launch.cuh"
#include "cuda/primitives/dependent_launch.cuh"
#include "cuda/primitives/shared_storage.cuh"
#include "emulator.h"

namespace {

using cbam::cuda::dynamic_shared_memory;
using cbam::cuda::Grid;
using cbam::cuda::SharedCarver;

// Eight warps, so that some are far from done while another waits.
constexpr int kThreads = 256;
constexpr size_t kTileBytes = kThreads * sizeof(int);

std::string report;

// Launches kernels over a few ints with `in` and `out` watched; the report, or null.
template <class... Parameters, class... Arguments>
const char* try_grid(void (*kernel)(Parameters...), const Grid& grid, Arguments... arguments) {
  try {
    cbam::cuda::launch("catalogue", kernel, grid, nullptr, arguments...);
  } catch (const std::exception& error) {
    report = error.what();
    return report.c_str();
  }
  return nullptr;
}

template <class... Parameters, class... Arguments>
const char* try_launch(void (*kernel)(Parameters...), int blocks, size_t shared_bytes,
                       Arguments... arguments) {
  return try_grid(kernel, {blocks, kThreads, static_cast<int64_t>(shared_bytes)}, arguments...);
}

// Blocks that run at the same time.
struct Together {
  int cluster = 1;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
const char* try_together(const Together& together, void (*kernel)(Parameters...), int blocks,
                         int threads, size_t shared_bytes, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(together.cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = together.cooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = attributes;
  config.numAttrs = 2;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status == cudaSuccess) return nullptr;
  report = std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
  return report.c_str();
}

// What entries are given: `in` is read, `out` written, both of `n` ints.
struct Arrays {
  Arrays(int* in, int* out, int n) {
    emulator::unwatch_all();
    emulator::watch(in, n * sizeof(int), "in", false);
    emulator::watch(out, n * sizeof(int), "out", true);
  }
};

}  // namespace
