// What the scheduler tells the race detector. Only the race build has one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "include/emulator_host.h"

namespace emulator::races {

#if defined(CBAM_EMULATOR_RACE)
void start_launch(const Launch& launch);
void start_block(uint64_t number);
void add_shared_array(const void* begin, size_t bytes, const char* name);
void block_barrier();
void warp_barrier(int warp, unsigned lanes);
void fence();
void atomic(const void* p, size_t bytes, const void* code);
#else
inline void start_launch(const Launch&) {}
inline void start_block(uint64_t) {}
inline void add_shared_array(const void*, size_t, const char*) {}
inline void block_barrier() {}
inline void warp_barrier(int, unsigned) {}
inline void fence() {}
inline void atomic(const void*, size_t, const void*) {}
#endif

}  // namespace emulator::races
