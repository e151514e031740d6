// What the CUDA runtime says of this machine.
#pragma once

#include <string>
#include <vector>

#include "limits.h"

namespace cbam::cuda {

struct Device {
  std::string name;
  int capability_major;
  int capability_minor;
};

// Never throws: a machine without a GPU or a driver has no devices.
std::vector<Device> visible_devices();

// Why this build cannot run on a device of this machine, in a few words; empty if it can. Of all
// devices, where the index is negative: of the current one, unless it can run on another. Never
// throws.
std::string problem(int index);

// The limits of a device of this machine; asked for once and kept.
const DeviceLimits& limits_of_device(int index);

// Makes a device the current one, and the one before again at the end. torch's guard is not enough:
// this module brings a CUDA runtime of its own.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice();

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace cbam::cuda
