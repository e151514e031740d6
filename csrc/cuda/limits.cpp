#include "limits.h"

#include <stdexcept>

namespace cbam::cuda {

// From the vendor's tuning guides and data sheets; shared memory is what a block may opt in to.
const std::vector<DeviceLimits>& known_devices() {
  constexpr int64_t kMiB = 1 << 20;
  static const std::vector<DeviceLimits> devices = {
      {"T4", 75, 40, 1024, 65536, 4 * kMiB, 320e9},
      {"A100", 80, 108, 2048, 166912, 40 * kMiB, 2039e9},
      {"RTX 3090", 86, 82, 1536, 101376, 6 * kMiB, 936e9},
      {"RTX 4090", 89, 128, 1536, 101376, 72 * kMiB, 1008e9},
      {"H100", 90, 132, 2048, 232448, 50 * kMiB, 3350e9},
      {"H200", 90, 132, 2048, 232448, 50 * kMiB, 4800e9},
      {"B200", 100, 148, 2048, 232448, 126 * kMiB, 7700e9},
      {"RTX 5090", 120, 170, 1536, 101376, 96 * kMiB, 1792e9},
  };
  return devices;
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
