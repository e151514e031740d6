#include <algorithm>
#include <map>
#include <mutex>

#include "device.h"
#include "launch.cuh"

namespace cbam::cuda {
namespace {

// Compiled for the same architectures as every other kernel.
__global__ void probe() {}

// How many clusters of each size run at once, of blocks that take all of a multiprocessor's shared
// memory; 0 for sizes that the device does not take.
void count_clusters(int index, DeviceLimits& limits) {
  const CurrentDevice current(index);
  limits.clusters[0] = limits.multiprocessors;
  Grid grid;
  grid.threads = kThreads;
  grid.shared_bytes = grid.shared_limit = limits.shared_per_block;
  for (int size = 1; size < kClusterSizes; ++size) {
    grid.blocks = grid.cluster = 1 << size;
    limits.clusters[size] = most_clusters(&probe, grid);
  }
}

// What the kernels may use: of the device, and of what they were compiled for. Code for an older
// one that the driver translated has none of the newer instructions.
int capability_of(int index, const cudaDeviceProp& p) {
  const CurrentDevice current(index);
  cudaFuncAttributes compiled;
  check(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(&probe)),
        "code for the device");
  return std::min(10 * p.major + p.minor, compiled.ptxVersion);
}

std::string said(const std::string& where, cudaError_t status) {
  cudaGetLastError();
  return where + ": " + cudaGetErrorString(status);
}

// Why this build cannot run on one device; empty if it can. Another process may have it for itself.
std::string problem_of(int index) {
  const std::string on = "on cuda:" + std::to_string(index);
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess && index != before) status = cudaSetDevice(index);
  if (status != cudaSuccess) return said(on, status);
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe));
  if (index != before) cudaSetDevice(before);
  return status == cudaSuccess ? "" : said("built for " CBAM_CUDA_ARCHITECTURES ", " + on, status);
}

}  // namespace

std::vector<Device> visible_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // a machine without a GPU leaves an error behind
    return {};
  }
  std::vector<Device> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    devices.push_back({properties.name, properties.major, properties.minor});
  }
  return devices;
}

std::string problem(int index) {
  int count = 0, current = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess)
    return said("CUDA " CBAM_CUDA_VERSION, status);
  if (index >= 0) return problem_of(index);
  // First the one in use: asking another takes memory there.
  if (const cudaError_t status = cudaGetDevice(&current); status != cudaSuccess)
    return said("CUDA " CBAM_CUDA_VERSION, status);
  std::string first = problem_of(current);
  for (int i = 0; i < count && !first.empty(); ++i)
    if (i != current && problem_of(i).empty()) return "";
  return first;
}

const DeviceLimits& limits_of_device(int index) {
  static std::mutex mutex;
  // Never destroyed: threads may still run when a process ends.
  static auto& known = *new std::map<int, DeviceLimits>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, index), "properties of the device");
  int kilohertz = 0, bits = 0;
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, index), "memory clock");
  check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, index), "memory bus");
  const double bandwidth = 2.0 * 1e3 * kilohertz * bits / 8;  // two transfers a cycle
  DeviceLimits limits = {p.name,
                         capability_of(index, p),
                         p.multiProcessorCount,
                         p.maxThreadsPerMultiProcessor,
                         static_cast<int64_t>(p.sharedMemPerBlockOptin),
                         static_cast<int64_t>(p.sharedMemPerMultiprocessor),
                         static_cast<int64_t>(p.l2CacheSize),
                         bandwidth,
                         {}};
  if (limits.capability >= kClusterCapability) count_clusters(index, limits);
  return known[index] = limits;
}

CurrentDevice::CurrentDevice(int index) {
  check(cudaGetDevice(&before_), "current device");
  changed_ = before_ != index;
  if (changed_) check(cudaSetDevice(index), "device of x");
}

CurrentDevice::~CurrentDevice() {
  if (changed_) cudaSetDevice(before_);
}

}  // namespace cbam::cuda
