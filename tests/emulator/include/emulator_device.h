// What kernels call, mostly through the CUDA names in cuda_runtime.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Where in the sources something was called, for reports.
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Never null; arrays do not lie behind it but come from shared_array().
unsigned char* dynamic_shared_memory();

// The block's array at `offset` of its dynamic shared memory: the same for all its threads, filled
// with 0xff (NaN in every float format) when first asked for, between red zones.
void* shared_array(size_t offset, size_t bytes, const char* name);

enum class Vote { kNone, kAny, kAll, kCount };

int block_barrier(Vote vote, bool predicate, Place place);
void warp_barrier(unsigned mask, Place place);
unsigned warp_ballot(unsigned mask, bool predicate, Place place);
uint64_t warp_shuffle(unsigned mask, uint64_t value, int source_lane, Place place);
int lane_number();

// The blocks of a cluster, of a cooperative launch, and of a part of one: blocks that follow each
// other, `blocks` of them in every part, which count themselves in `arrived`, at first 0.
void cluster_barrier(Place place);
void grid_barrier(Place place);
void part_barrier(unsigned* arrived, int blocks, Place place);
// Where the shared array that `shared` points into has the same place in block `rank` of the
// cluster.
const void* in_block(const void* shared, unsigned rank);

void fence();

// Every thread of a launch that overlaps with the one before calls it.
void wait_for_previous_launch();

// mbarriers. One that copies end in must be published before the first.
void mbarrier_init(uint64_t* b, unsigned arrivals, Place place);
void mbarrier_publish_inits();
void mbarrier_arrive_expect(uint64_t* b, unsigned bytes, Place place);
// This thread's arrival, once all its copies so far have arrived; orders nothing else.
void mbarrier_arrive_after_copies(uint64_t* b, Place place);
// Waits while the phase that has not ended yet has this parity.
void mbarrier_wait(uint64_t* b, unsigned parity, Place place);

// Copies from global to shared memory of the own block. The target is filled with 0xff at once; the
// source is read when the bytes arrive, which is up to the schedule.
void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* b, Place place);
void async_copy(void* to, const void* from, unsigned bytes, Place place);
// By threads whose shared memory bulk copies write next, behind a barrier.
void proxy_fence();
// Brings global memory to a cache: nothing but a check of what may be asked for.
void prefetch(const void* from, unsigned bytes, Place place);

// An atomic operation: what is there, and what it becomes.
uint64_t begin_atomic(const void* p, size_t bytes, Place place);
void end_atomic(void* p, size_t bytes, uint64_t value);

[[noreturn]] void misaligned_access(const void* p, size_t bytes, size_t alignment, Place place);

template <class T>
inline void check_alignment(const T* p, Place place) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T))
    misaligned_access(p, sizeof(T), alignof(T), place);
}

}  // namespace emulator
