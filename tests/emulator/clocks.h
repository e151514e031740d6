// Who knows of whose past accesses: the order that barriers, mbarriers, and fences with atomics,
// make.
//
// A thread's epoch is its block's phase, the number of block barriers passed, and below that the
// number of its own steps: warp barriers, fences of either kind and arrivals. Within a block the
// phase decides almost always; what a thread knows of other blocks, and of copies, is kept in
// vector clocks that exist only where fences, mbarriers or teams of blocks are used.
//
// Copies are accesses of the mbarrier that they end in, as if it were a thread more of the block,
// whose epoch is the mbarrier's phase: whoever waits for the phase knows of them.
#pragma once

#include <cstdint>

#include "scheduler.h"
#include "shadow.h"

namespace emulator {

struct BlockTime {
  uint32_t first_thread;  // its serial number
  uint32_t phase;
  uint32_t step[kMostThreads];  // of each thread
};

extern BlockTime* block_time;  // of the current block
extern uint32_t threads_per_block;

constexpr int kPhaseShift = 16;

inline uint32_t current_serial() {
  return block_time->first_thread + static_cast<uint32_t>(machine.current->number);
}
inline uint32_t current_epoch() {
  return block_time->phase << kPhaseShift | block_time->step[machine.current->number];
}

// Hands out serial numbers; returns the last one before this launch.
uint32_t start_launch_clocks(const Launch& launch);
// The first of these blocks runs as number `position` of its launch, counted from 0. Returns the
// last serial number before them.
uint32_t start_gang_clocks(int blocks, uint64_t position);
void enter_block_clocks(int slot);

// Whether the current thread may rely on `moment` being over, where its own block's phases do not
// decide it.
bool known_from_others(const Moment& moment);

// Whether the current thread, of which `now` is the present, may rely on `moment` being over.
inline bool happened_before(const Moment& moment, const Moment& now) {
  if (moment.thread == now.thread) return true;
  const bool own_block = moment.thread - block_time->first_thread < threads_per_block;
  if (own_block && moment.epoch >> kPhaseShift < block_time->phase) return true;
  return known_from_others(moment);
}

void block_barrier_clocks();
void team_barrier_clocks(int first, int blocks);
void warp_barrier_clocks(int warp, unsigned lanes);
void fence_clocks();
void atomic_clocks(const void* p);

void arrive_clocks(const CopyBarrier& barrier);
void end_phase_clocks(const CopyBarrier& barrier);
void wait_clocks(const CopyBarrier& barrier);
// What the current thread did so far may be followed by accesses of bulk copies.
void hand_over_clocks();
// Whether the thread of this moment handed over behind it.
bool handed_over(const Moment& moment);
// Of a copy's accesses. Null: of one that no mbarrier waits for yet.
Moment moment_of_copy(const CopyBarrier* barrier, uint32_t code);

// Of a serial number of this launch: how many blocks ran before, the thread's number, and whether
// it is a thread and not an mbarrier.
uint64_t position_of(uint32_t serial);
uint32_t number_of(uint32_t serial);
bool is_thread(uint32_t serial);

}  // namespace emulator
