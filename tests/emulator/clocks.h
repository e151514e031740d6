// Who knows of whose past accesses: the order that barriers, and fences with atomics, make.
//
// A thread's epoch is its block's phase, the number of block barriers passed, and below that the
// number of its own warp barriers and fences. One block runs at a time, so within it the phase
// decides almost always; what a thread knows of other blocks is kept in vector clocks that exist
// only where fences and atomics are used.
#pragma once

#include <cstdint>

#include "scheduler.h"
#include "shadow.h"

namespace emulator {

struct BlockTime {
  uint32_t first_thread;  // its serial number
  uint32_t phase;
  uint32_t step[kMostThreads];  // warp barriers and fences of each thread
};

extern BlockTime block_time;

constexpr int kPhaseShift = 16;

inline uint32_t current_serial() {
  return block_time.first_thread + static_cast<uint32_t>(machine.current->number);
}
inline uint32_t current_epoch() {
  return block_time.phase << kPhaseShift | block_time.step[machine.current->number];
}

// Hands out serial numbers; returns the last one before this launch.
uint32_t start_launch_clocks(const Launch& launch);
// The block that runs as number `position` of its launch, counted from 0.
void start_block_clocks(uint64_t position);

// Whether the current thread may rely on `moment` being over, where its own block's phases do not
// decide it.
bool known_from_others(const Moment& moment);

// Whether the current thread, of which `now` is the present, may rely on `moment` being over.
inline bool happened_before(const Moment& moment, const Moment& now) {
  if (moment.thread == now.thread) return true;
  const bool own_block = moment.thread - block_time.first_thread < machine.threads.size();
  if (own_block && moment.epoch >> kPhaseShift < block_time.phase) return true;
  return known_from_others(moment);
}

void block_barrier_clocks();
void warp_barrier_clocks(int warp, unsigned lanes);
void fence_clocks();
void atomic_clocks(const void* p);

// Of a serial number of this launch: how many blocks ran before, and the thread's number.
uint64_t position_of(uint32_t serial);
uint32_t number_of(uint32_t serial);

}  // namespace emulator
