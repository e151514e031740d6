// Runs a plan: fills what each kernel is handed and launches them, group after group.
#pragma once

#include "plan.h"

namespace cbam::cuda {

// The plan for the current device, of the strategy that the environment asks for: a resident one
// only where the device, as far as this process may use it, can run its teams.
ForwardPlan plan_to_run(const ForwardProblem& problem, const DeviceLimits& device);

// `scratch` holds scratch(plan, problem).total() bytes of device memory, on a multiple of 16. Every
// launch goes to `stream` of the current device; nothing waits for it. Throws std::runtime_error
// with CUDA's own message where a launch fails.
void run(const ForwardProblem& problem, const ForwardPlan& plan, void* scratch, Stream stream);

}  // namespace cbam::cuda
