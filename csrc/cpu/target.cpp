#include "target.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace cbam::cpu {
namespace {

// Fastest first.
const Target kTargets[] = {
#if defined(CBAM_X86_TARGETS)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     avx512::forward, avx512::backward},
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     avx2::forward, avx2::backward},
#endif
    {"baseline", [] { return true; }, baseline::forward, baseline::backward},
};

const Target& choose() {
  const char* wanted = std::getenv("CBAM_CUDA_CPU_TARGET");
  std::string running;
  for (const Target& t : kTargets) {
    if (!t.runs_here()) continue;
    if (!wanted || !*wanted || std::string(wanted) == t.name) return t;
    running += (running.empty() ? "" : ", ") + std::string(t.name);
  }
  throw std::runtime_error("CBAM_CUDA_CPU_TARGET: expected one of " + running + ", got " + wanted);
}

}  // namespace

const Target& target() {
  static const Target& chosen = choose();
  return chosen;
}

std::vector<std::string> targets_that_run() {
  std::vector<std::string> names;
  for (const Target& t : kTargets)
    if (t.runs_here()) names.push_back(t.name);
  return names;
}

}  // namespace cbam::cpu
