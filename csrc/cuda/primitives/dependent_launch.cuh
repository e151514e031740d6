// Launches that overlap with the one before them (Grid::overlaps): their blocks start as soon as
// all blocks of that one have come to their wait, and prepare while it still runs.
#pragma once

#include <cuda_runtime.h>

#if defined(CBAM_EMULATED)
#include "emulator_device.h"
#endif

namespace cbam::cuda {

#if defined(CBAM_EMULATED)

__device__ __forceinline__ void wait_for_previous_launch() { emulator::wait_for_previous_launch(); }

#else

// Until all launches before this one have ended and what they wrote can be read. Every kernel of a
// launch that overlaps calls it once, in all threads. Before it a kernel writes no global memory
// and reads none that an earlier launch may write, but that all kernels of an operator save its
// first may read the operator's inputs: as the next launch starts only behind this wait, whatever
// ran before the operator has ended by then.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "griddepcontrol.wait;\n"
      "griddepcontrol.launch_dependents;" ::
          : "memory");
#endif
}

#endif

}  // namespace cbam::cuda
