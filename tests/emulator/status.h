// The status that the CUDA runtime's functions leave behind.
#pragma once

#include <string>

#include "include/emulator_host.h"

namespace emulator {

// Keeps both until they are asked for; returns the status.
cudaError_t failure(cudaError_t status, std::string report);

}  // namespace emulator
