// Runs a backward plan: fills what each kernel is handed and launches them, group after group.
#pragma once

#include "plan.h"

namespace cbam::cuda {

// What the launches leave for the gradients of the weights, in the scratch memory, for all samples.
struct WeightSums {
  void* dm;        // acc [samples, channels]
  void* d_hidden;  // acc [samples, 2, hidden]: before the ReLU, of mean and of max
  void* d_conv;    // acc [samples * boxes, 2 * taps + 1], the bias last; null where not asked for
  int64_t boxes;
};

// `scratch` holds scratch(plan, problem).total() bytes of device memory, on a multiple of 16.
// Writes dx where it is asked for; the weights' gradients follow from what is returned. Launches as
// forward.
WeightSums backward(const BackwardProblem& problem, const BackwardPlan& plan, void* scratch,
                    Stream stream);

}  // namespace cbam::cuda
