// The CPU backend's kernels, one set for each target they are compiled for: forward.cpp and
// backward.cpp are compiled once per target.
#pragma once

#include "../problem.h"
#include "thread_pool.h"

namespace cbam::cpu {

#define CBAM_DECLARE_CPU_TARGET(target)                                  \
  namespace target {                                                     \
  void forward(const ForwardProblem& problem, const ThreadPool& pool);   \
  void backward(const BackwardProblem& problem, const ThreadPool& pool); \
  }
CBAM_DECLARE_CPU_TARGET(baseline)
#if defined(CBAM_X86_TARGETS)
CBAM_DECLARE_CPU_TARGET(avx2)
CBAM_DECLARE_CPU_TARGET(avx512)
#endif
#undef CBAM_DECLARE_CPU_TARGET

}  // namespace cbam::cpu
