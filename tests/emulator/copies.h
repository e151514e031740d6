// Copies that go on while threads do something else, and the mbarriers that they end in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "include/emulator_device.h"

namespace emulator {

struct Block;
struct Thread;

// Bytes of shared memory that a copy writes.
struct Piece {
  void* to;
  const void* from;
  size_t bytes;
  uint32_t phase;  // of the mbarrier that it ends in
};

// An mbarrier's state; what stands in shared memory only tells whether something overwrote it.
struct CopyBarrier {
  uint64_t* object;
  Block* block;
  int number;  // in its block, in order of initialisation
  int initialiser;
  bool published = false;
  unsigned arrivals;  // that a phase takes
  unsigned pending;
  int64_t expected_bytes = 0;      // below 0 where bytes arrive before they are expected
  uint32_t phase = 0;              // how many have ended
  Place copied_at = {};            // of the last copy
  std::vector<Piece> pieces = {};  // of copies that no thread has waited for
  std::vector<Thread*> waiting = {};
};

// What a block has of both.
struct CopyState {
  std::deque<CopyBarrier> barriers;
  size_t under_way = 0;  // copies
  size_t unbound = 0;    // copies by threads that no mbarrier waits for yet
};

// copy_barriers.cpp
CopyBarrier& used_barrier(const char* operation, uint64_t* object, Place place, const void* code);
void arrive(CopyBarrier& barrier, const char* operation, Place place);
void end_bytes(CopyBarrier& barrier, int64_t bytes, const char* operation, Place place);

// What the last launch brought to a cache.
struct Prefetched {
  uintptr_t begin;
  size_t bytes;
};

// copies.cpp
extern std::vector<Prefetched> prefetched;
extern unsigned long long prefetched_bytes;  // of all launches since the last reset
extern size_t copies_under_way;              // of the gang
// Where the schedule wants it, lets a copy arrive before the next thread runs.
void maybe_end_copy();
// Lets the copy arrive that has waited longest; false where there is none.
bool end_oldest_copy();
void forget_copies();
// Some thread knows that the copies of the phases so far have ended.
void let_go_of_pieces(CopyBarrier& barrier);
// What an exit means for copies of this block.
void leave_copies(Block& block);

}  // namespace emulator
