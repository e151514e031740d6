#include <cuda_runtime.h>

#include "device.h"

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

}  // namespace cbam::cuda
