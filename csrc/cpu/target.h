// The choice, at run time, among the targets that the CPU kernels were compiled for.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"
#include "thread_pool.h"

namespace cbam::cpu {

struct Target {
  const char* name;
  bool (*runs_here)();
  void (*forward)(const ForwardProblem& problem, const ThreadPool& pool);
  void (*backward)(const BackwardProblem& problem, const ThreadPool& pool);
};

// The fastest target that this processor runs; CBAM_CUDA_CPU_TARGET in the environment names
// another. Throws std::runtime_error where that one is unknown or does not run here.
const Target& target();

// Names of all targets that this processor runs, fastest first.
std::vector<std::string> targets_that_run();

}  // namespace cbam::cpu
