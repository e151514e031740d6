#include "limits.h"

#include <algorithm>
#include <stdexcept>

namespace cbam::cuda {

// From the vendor's tuning guides and data sheets; shared memory is what a block may opt in to. How
// many clusters fit was measured on an H100; for the others it is counted from its ratios.
const std::vector<DeviceLimits>& known_devices() {
  constexpr int64_t kMiB = 1 << 20;
  static const std::vector<DeviceLimits> devices = {
      {"T4", 75, 40, 1024, 65536, 65536, 4 * kMiB, 320e9, {}},
      {"A100", 80, 108, 2048, 166912, 167936, 40 * kMiB, 2039e9, {}},
      {"RTX 3090", 86, 82, 1536, 101376, 102400, 6 * kMiB, 936e9, {}},
      {"RTX 4090", 89, 128, 1536, 101376, 102400, 72 * kMiB, 1008e9, {}},
      {"H100", 90, 132, 2048, 232448, 233472, 50 * kMiB, 3350e9, {132, 66, 30, 15, 7}},
      {"H200", 90, 132, 2048, 232448, 233472, 50 * kMiB, 4800e9, {132, 66, 30, 15, 7}},
      {"B200", 100, 148, 2048, 232448, 233472, 126 * kMiB, 7700e9, {148, 74, 34, 17, 8}},
      {"RTX 5090", 120, 170, 1536, 101376, 102400, 96 * kMiB, 1792e9, {170, 85, 38, 19, 0}},
  };
  return devices;
}

DeviceLimits slice_of(DeviceLimits device, int multiprocessors) {
  if (multiprocessors < 1 || multiprocessors > device.multiprocessors)
    throw std::invalid_argument("multiprocessors: expected 1 to " +
                                std::to_string(device.multiprocessors) + ", got " +
                                std::to_string(multiprocessors));
  device.multiprocessors = multiprocessors;
  for (int size = 0; size < kClusterSizes; ++size)
    device.clusters[size] = std::min(device.clusters[size], multiprocessors >> size);
  return device;
}

const DeviceLimits& known_device(const std::string& name) {
  std::string names;
  for (const auto& device : known_devices()) {
    if (device.name == name) return device;
    names += (names.empty() ? "" : ", ") + device.name;
  }
  throw std::invalid_argument("device: expected one of " + names +
                              ", or cuda:INDEX for a GPU of this machine, got " + name);
}

}  // namespace cbam::cuda
