// The limits of GPUs: what a plan depends on beside the problem.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cbam::cuda {

struct DeviceLimits {
  std::string name;
  int capability;  // 10 * major + minor
  int multiprocessors;
  int threads_per_multiprocessor;
  int64_t shared_per_block;  // bytes, after opting in
  int64_t l2_bytes;
  double bandwidth;  // bytes a second from device memory, by the data sheet
};

// GPUs that plans are made and tested for without having them.
const std::vector<DeviceLimits>& known_devices();

// One of them by its name, else an error that lists the names.
const DeviceLimits& known_device(const std::string& name);

}  // namespace cbam::cuda
