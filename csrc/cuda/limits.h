// The limits of GPUs: what a plan depends on beside the problem.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cbam::cuda {

// Sizes of clusters that are asked about: 1, 2, 4, 8 and 16 blocks.
constexpr int kClusterSizes = 5;

struct DeviceLimits {
  std::string name;
  int capability;  // 10 * major + minor
  int multiprocessors;
  int threads_per_multiprocessor;
  int64_t shared_per_block;  // bytes, after opting in
  int64_t shared_per_multiprocessor;
  int64_t l2_bytes;
  double bandwidth;  // bytes a second from device memory, by the data sheet
  // Clusters of 2^i blocks that run at once, one block on each multiprocessor; 0 where there are
  // none of that size.
  int clusters[kClusterSizes];
};

// GPUs that plans are made and tested for without having them.
const std::vector<DeviceLimits>& known_devices();

// The same GPU with fewer multiprocessors and clusters.
DeviceLimits slice_of(DeviceLimits device, int multiprocessors);

// One of them by its name, else an error that lists the names.
const DeviceLimits& known_device(const std::string& name);

}  // namespace cbam::cuda
