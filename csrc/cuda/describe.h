// A problem without data, from what a user says about it, so that its plan can be shown.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"

namespace cbam::cuda {

struct Description {
  std::vector<int64_t> shape;  // [samples, channels, one to three extents]
  int64_t hidden;
  std::vector<int64_t> kernel;  // one for each extent
  std::string dtype;            // "float32", "float64", "float16" or "bfloat16"
  std::string weight_dtype;     // the same, or "" for dtype
  bool channels_last;
  bool training;
  bool residual;  // is added to out
  bool aligned;   // x starts on a multiple of 16 bytes
  bool bias;
};

// Dense tensors of the sizes described; pointers are set but lead nowhere. Throws
// std::invalid_argument for sizes below 1 and for dtypes there are not.
ForwardProblem describe(const Description& description);

// The backward of that forward, every gradient asked for.
BackwardProblem describe_backward(const Description& description);

}  // namespace cbam::cuda
