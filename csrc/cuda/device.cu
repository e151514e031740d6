#include <map>
#include <mutex>

#include "device.h"
#include "launch.cuh"

namespace cbam::cuda {

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

const DeviceLimits& limits_of_device(int index) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, index), "properties of the device");
  int kilohertz = 0, bits = 0;
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, index), "memory clock");
  check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, index), "memory bus");
  const double bandwidth = 2.0 * 1e3 * kilohertz * bits / 8;  // two transfers a cycle
  return known[index] = {p.name,
                         10 * p.major + p.minor,
                         p.multiProcessorCount,
                         p.maxThreadsPerMultiProcessor,
                         static_cast<int64_t>(p.sharedMemPerBlockOptin),
                         static_cast<int64_t>(p.l2CacheSize),
                         bandwidth};
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
