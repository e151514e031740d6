// Runs a backward plan: fills what each kernel is handed and launches them, group after group, and
// then what sums over the batch.
#pragma once

#include "plan.h"

namespace cbam::cuda {

// The plan for the current device, of the strategy that the environment asks for: a resident one
// only where the device, as far as this process may use it, can run its teams.
BackwardPlan plan_to_run(const BackwardProblem& problem, const DeviceLimits& device);

// `scratch` holds scratch(plan, problem).total() bytes of device memory, on a multiple of 16.
// Writes the gradients that are asked for; launches as forward.
void run(const BackwardProblem& problem, const BackwardPlan& plan, void* scratch, Stream stream);

}  // namespace cbam::cuda
