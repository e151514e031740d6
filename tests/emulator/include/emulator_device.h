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

void fence();

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
