// The ways in which a forward or a backward can be run, by name.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "kernels/resident.h"

namespace cbam::cuda {

// How samples are to be held. What is not set, or 0, is for the plan to choose.
struct Way {
  std::optional<Split> split;
  std::optional<bool> cluster;
  int team = 0;        // blocks that hold them together
  int blocks = 0;      // on a multiprocessor
  int samples = 0;     // of a visit
  bool ahead = false;  // brings the next visit to the cache; only where it is asked for
};

struct Strategy {
  enum Kind { kAuto, kStreaming, kResident } kind = kAuto;
  Way way = {};
};

// By its name: "auto", "streaming", or "resident", which "-channels" or "-pixels" may follow, of
// which a block holds some, and ":cluster" or ":grid", then numbers behind colons (of blocks of a
// team, at most; blocks on a multiprocessor; samples of a visit) and ":ahead". Else throws
// std::invalid_argument.
Strategy strategy_of(const std::string& name);
// The one that the environment asks for, in CBAM_CUDA_STRATEGY.
Strategy strategy_asked_for();

// What is thrown where a resident plan is asked for and there is none, for a reason.
std::invalid_argument not_possible(const char* reason);

}  // namespace cbam::cuda
