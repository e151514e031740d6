// The bytes that each launch of a plan asks for, wherever they come from: printed with the plan,
// and compared by the tests with what the emulator counts.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace cbam::cuda {

struct Traffic {
  int64_t x_read = 0;  // of x, and in the backward of dout
  int64_t residual_read = 0;
  int64_t out_written = 0;   // of out, or of dx
  int64_t weights_read = 0;  // of the MLP, biases included
  int64_t small_read = 0;    // pooled vectors, gates, maps, indices, weights of the convolution
  int64_t small_written = 0;
  int64_t sums_read = 0;  // for the gradients of the weights, which are sums over the batch
  int64_t sums_written = 0;

  Traffic& operator+=(const Traffic& other);
};

struct Stage {
  std::string name;
  Grid grid;
  Traffic traffic;
};

// The launches of one group of `samples`.
std::vector<Stage> stages(const ForwardPlan& plan, const ForwardProblem& problem, int64_t samples);

std::vector<Stage> stages(const BackwardPlan& plan, const BackwardProblem& problem,
                          int64_t samples);

// Of all groups.
Traffic traffic(const ForwardPlan& plan, const ForwardProblem& problem);
Traffic traffic(const BackwardPlan& plan, const BackwardProblem& problem);

// Bytes that come from or go to device memory: a group's x only once where it stays in the cache,
// or where a resident backward reads it twice, the second time soon after the first.
int64_t device_memory_bytes(const ForwardPlan& plan, const ForwardProblem& problem);
int64_t device_memory_bytes(const BackwardPlan& plan, const BackwardProblem& problem);

}  // namespace cbam::cuda
