// The emulated device: what a launch must keep to, and how many blocks run on it at once.
#pragma once

#include <string>

#include "include/emulator_host.h"

namespace emulator {

struct BrokenLimit {
  cudaError_t status = cudaSuccess;
  std::string text = {};
};

BrokenLimit limit_broken(const Launch& launch);

}  // namespace emulator
