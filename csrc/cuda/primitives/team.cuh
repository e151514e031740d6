// The blocks that hold a sample together: who they are, a barrier, and what they put out for each
// other to read. Two kinds: a thread-block cluster, which reads its blocks' shared memory, and the
// blocks of a cooperative launch, which exchange through global memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels/kernels.h"

#if defined(CBAM_EMULATED)
#include "emulator_device.h"
#else
#include <cooperative_groups.h>
#endif

namespace cbam::cuda {

#if defined(CBAM_EMULATED)

__device__ __forceinline__ void cluster_barrier(emulator::Place place = emulator::Place::here()) {
  emulator::cluster_barrier(place);
}
__device__ __forceinline__ void grid_barrier(emulator::Place place = emulator::Place::here()) {
  emulator::grid_barrier(place);
}
template <class E>
__device__ __forceinline__ const E* in_block(const E* shared, int rank) {
  return static_cast<const E*>(emulator::in_block(shared, static_cast<unsigned>(rank)));
}

#else

// All threads of the cluster; what they wrote before it, all of them may read after it.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}

// The same array in the shared memory of block `rank` of the cluster.
template <class E>
__device__ __forceinline__ const E* in_block(const E* shared, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  const E* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return mapped;
#else
  return shared;
#endif
}

// All threads of a cooperative launch.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

#endif

// Where there are none, the compiler leaves out what is for them.
#if defined(CBAM_EMULATED) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// The same for both kinds of team.
struct Team {
  bool cluster;
  int size, rank;  // of this block
  int64_t stride;  // bytes from what one block puts out in global memory to what the next one does

  // Between what blocks put out and where others read it. Without clusters all teams wait for each
  // other, so that every team must come to as many barriers.
#if defined(CBAM_EMULATED)
  void barrier(emulator::Place place = emulator::Place::here()) const {
    if (cluster)
      emulator::cluster_barrier(place);
    else
      emulator::grid_barrier(place);
  }
#else
  __device__ __forceinline__ void barrier() const {
    if (kHasClusters && cluster)
      cluster_barrier();
    else
      grid_barrier();
  }
#endif

  // What block `from` of the team put out where this one has `own`.
  template <class E>
  __device__ __forceinline__ E read(const E* own, int from) const {
    if (kHasClusters && cluster) return *in_block(own, from);
    const char* theirs = reinterpret_cast<const char*>(own) + (from - rank) * stride;
    return __ldcg(reinterpret_cast<const E*>(theirs));
  }
};

}  // namespace cbam::cuda
