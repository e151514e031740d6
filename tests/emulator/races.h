// What the scheduler tells the race detector. Only the race build has one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "include/emulator_host.h"

namespace emulator {

struct Block;
struct CopyBarrier;

}  // namespace emulator

namespace emulator::races {

#if defined(CBAM_EMULATOR_RACE)
void start_launch(const Launch& launch);
void start_gang(int blocks, uint64_t first);
void enter_block(int slot);
void end_block(const Block& block);
void add_shared_array(const Block& block, const void* begin, size_t bytes, const char* name);
void block_barrier();
void team_barrier(int first_slot, int blocks);
void warp_barrier(int warp, unsigned lanes);
void fence();
void proxy_fence();
void atomic(const void* p, size_t bytes, const void* code);
void init_barrier(const void* object, const void* code);
void use_barrier(const void* object, const void* code);
void arrive(const CopyBarrier& barrier);
void end_phase(const CopyBarrier& barrier);
void wait(const CopyBarrier& barrier);
// Null where no mbarrier waits for the copy yet; later one does.
void copy(const void* to, const void* from, size_t bytes, const CopyBarrier* barrier,
          const void* code);
void bind_copy(const void* to, const void* from, size_t bytes, const CopyBarrier& barrier);
void prefetch(const void* from, size_t bytes, const void* code);
#else
inline void start_launch(const Launch&) {}
inline void start_gang(int, uint64_t) {}
inline void enter_block(int) {}
inline void end_block(const Block&) {}
inline void add_shared_array(const Block&, const void*, size_t, const char*) {}
inline void block_barrier() {}
inline void team_barrier(int, int) {}
inline void warp_barrier(int, unsigned) {}
inline void fence() {}
inline void proxy_fence() {}
inline void atomic(const void*, size_t, const void*) {}
inline void init_barrier(const void*, const void*) {}
inline void use_barrier(const void*, const void*) {}
inline void arrive(const CopyBarrier&) {}
inline void end_phase(const CopyBarrier&) {}
inline void wait(const CopyBarrier&) {}
inline void copy(const void*, const void*, size_t, const CopyBarrier*, const void*) {}
inline void bind_copy(const void*, const void*, size_t, const CopyBarrier&) {}
inline void prefetch(const void*, size_t, const void*) {}
#endif

}  // namespace emulator::races
