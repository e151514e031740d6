// Kernels of a stream that begin while the one before them ends ("programmatic dependent launches",
// from compute capability 9.0 on), where their Grid overlaps.
#pragma once

#include <cuda_runtime.h>

#if defined(CBAM_EMULATED)
#include "emulator_device.h"
#endif

namespace cbam::cuda {

// Returns once all launches before have ended and what they wrote is there, and lets the next one
// begin; every thread of a kernel whose launch overlaps calls it. Before it a kernel may do what
// reads nothing that its own operator's kernels write, and what is no more than a hint; the first
// kernel of an operator, which begins while others' kernels end, may do hints alone. The next
// launch is let begin behind the wait: thus what it finds before its own has been written by then.
#if defined(CBAM_EMULATED)
__device__ __forceinline__ void follow_previous_launch() { emulator::follow_previous_launch(); }
#else
__device__ __forceinline__ void follow_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "griddepcontrol.wait;\n"
      "griddepcontrol.launch_dependents;" ::
          : "memory");
#endif
}
#endif

}  // namespace cbam::cuda
