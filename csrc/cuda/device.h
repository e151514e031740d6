// What the CUDA runtime says of this machine. Never throws: a machine without a GPU or a driver has
// no devices.
#pragma once

#include <string>
#include <vector>

namespace cbam::cuda {

struct Device {
  std::string name;
  int capability_major;
  int capability_minor;
};

std::vector<Device> visible_devices();

}  // namespace cbam::cuda
