// The blocks that hold a sample together: who they are, a barrier, and what they put out for each
// other to read. Two kinds: a thread-block cluster, which reads its blocks' shared memory, and
// blocks of a cooperative launch, which exchange through global memory. Behind open() no team waits
// for another one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../kernels/kernels.h"
#include "shared_storage.cuh"

#if defined(CBAM_EMULATED)
#include "emulator_device.h"
#else
#include <cooperative_groups.h>
#endif

namespace cbam::cuda {

// Where a part of a cooperative launch counts its blocks: at first 0, and from there on barrier
// after barrier.
__device__ __forceinline__ unsigned* arrivals(char* counts, int blocks) {
  return reinterpret_cast<unsigned*>(counts + blockIdx.x / blocks * kLineBytes);
}

// blockIdx.x, read anew each time: a value that follows from it takes no register from one use to
// the next.
__device__ __forceinline__ unsigned block_index() {
#if defined(CBAM_EMULATED)
  return blockIdx.x;
#else
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
#endif
}

#if defined(CBAM_EMULATED)

__device__ __forceinline__ void cluster_barrier(emulator::Place place = emulator::Place::here()) {
  emulator::cluster_barrier(place);
}
__device__ __forceinline__ void grid_barrier(emulator::Place place = emulator::Place::here()) {
  emulator::grid_barrier(place);
}
__device__ __forceinline__ void part_barrier(char* counts, int blocks,
                                             emulator::Place place = emulator::Place::here()) {
  emulator::part_barrier(arrivals(counts, blocks), blocks, place);
}
template <class E>
__device__ __forceinline__ E read_in_block(const E* own, int rank) {
  return *static_cast<const E*>(emulator::in_block(own, static_cast<unsigned>(rank)));
}

#else

// All threads of the cluster; what they wrote before it, all of them may read after it. One thread
// of a block makes that visible for all: a fence of the cluster is one of the whole device, and
// every warp would wait for its own.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}

// What stands in the shared memory of block `rank` of the cluster where this block has `own`; by
// its address there, which takes half the registers of a generic one.
template <class E>
__device__ __forceinline__ E read_in_block(const E* own, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(own)), "r"(rank));
  E value;
  if constexpr (sizeof(E) == 16) {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at)
                 : "memory");
  } else if constexpr (sizeof(E) == 8) {
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "r"(at)
                 : "memory");
  } else {
    static_assert(sizeof(E) == 4);
    unsigned bits;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(at) : "memory");
    memcpy(&value, &bits, sizeof value);
  }
  return value;
#else
  return *own;
#endif
}

// All threads of a cooperative launch.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// All threads of the part, which are so many blocks.
__device__ __forceinline__ void part_barrier(char* counts, int blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const size_t arrived = __cvta_generic_to_global(arrivals(counts, blocks));
    unsigned count;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(count)
                 : "l"(arrived)
                 : "memory");
    const unsigned all = (count / blocks + 1) * blocks;
    for (++count; count < all;)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
  }
  __syncthreads();
}

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
  int stride;      // bytes from what one block puts out in global memory to what the next one does;
                   // for a whole team far below 2 GB, as all of it is made in shared memory
  char* counts;    // a line for each team, where its blocks count themselves; null in a cluster

  // By all blocks of the launch, before the first barrier.
  __device__ __forceinline__ void open() const {
    if (kHasClusters && cluster) return;
    if (rank == 0 && threadIdx.x == 0) *arrivals(counts, size) = 0;
    grid_barrier();
  }

  // Between what blocks put out and where others read it.
#if defined(CBAM_EMULATED)
  void barrier(emulator::Place place = emulator::Place::here()) const {
    if (cluster)
      emulator::cluster_barrier(place);
    else
      part_barrier(counts, size, place);
  }
#else
  __device__ __forceinline__ void barrier() const {
    if (kHasClusters && cluster)
      cluster_barrier();
    else
      part_barrier(counts, size);
  }
#endif
};

// Calls body(read), where read(own, from) is what block `from` of the team put out where this one
// has `own`: once for each kind of team, so that reads that follow each other have no branch
// between them and are under way together.
template <class Body>
__device__ __forceinline__ void read_from(const Team& team, Body body) {
  if (kHasClusters && team.cluster)
    body([](const auto* own, int from) { return read_in_block(own, from); });
  else
    body([&](const auto* own, int from) {
      const char* theirs = reinterpret_cast<const char*>(own) + (from - team.rank) * team.stride;
      return __ldcg(reinterpret_cast<decltype(own)>(theirs));
    });
}

}  // namespace cbam::cuda
