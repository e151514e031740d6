// The emulated machine: the blocks that run at the same time, their threads, and who runs next.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "copies.h"
#include "emulator.h"
#include "fibers.h"
#include "findings.h"
#include "include/cuda_runtime.h"
#include "ready.h"
#include "shared_memory.h"

namespace emulator {

struct Block;

struct Thread {
  uint3 index;
  int number;  // in its block
  int warp, lane;
  Block* block;
  Fiber* fiber;  // null before it starts and after it exits
  bool exited;
  bool after_previous;  // has waited for the launch before

  // What it waits for, or waited for last.
  const char* operation;
  Place place;
  unsigned mask;
  uint64_t given, received;
  int source_lane;
};

struct Warp {
  unsigned lanes;    // those that exist and have not exited
  unsigned waiting;  // those in a warp operation
};

// A barrier that some threads may have reached.
struct Barrier {
  int arrived;
  int votes;
  int result;  // of the barrier before
  Place place;
  const Thread* first;
};

// Blocks that follow each other and have a barrier together: a cluster, a cooperative grid, or a
// part of one.
struct Team {
  int first, blocks;  // slots of the gang
  int threads = 0;
  int live = 0;  // threads that have not exited
  Barrier barrier = {};
  unsigned counted = 0;  // blocks of a part that have come to its barriers
};

struct Block {
  int slot;  // in the gang
  uint3 index;
  Team* cluster;  // often of this block alone
  std::vector<Thread> threads;
  Warp warps[kMostWarps];
  int live = 0;  // threads that have not exited
  Barrier barrier;
  int at_part = 0;  // threads that have come to the part's barrier
  ReadySet ready;
  SharedMemory shared;
  CopyState copies;
};

// The blocks that run at the same time, the gang, are one block of an ordinary launch, a cluster,
// or all blocks of a cooperative launch. Each takes a slot, whose memory serves the next gang
// again.
struct Machine {
  const Launch* launch = nullptr;
  Schedule schedule;
  Context host;
  Thread* current = nullptr;  // null while the host runs
  Block* block = nullptr;     // of the current thread
  std::vector<std::unique_ptr<Block>> slots;
  int gang = 1;           // how many slots this launch uses
  Block* only = nullptr;  // the first, often the only one
  std::vector<Team> clusters;
  Team grid = {};           // all of the gang
  std::vector<Team> parts;  // of the grid; none before blocks come to a barrier of theirs
  ReadyBlocks ready;
  bool failed = false;
};

extern Machine machine;

// Runs every block; findings tell how it went.
void run_blocks(const Launch& launch);

uint3 block_index(uint64_t number);
uint3 thread_index(uint32_t number);

inline void make_ready(Block& block, int warp, unsigned lanes) {
  block.ready.add(warp, lanes);
  machine.ready.add(block.slot);
}

// Lets other threads run until something makes the current one ready again.
void wait_for_others();

// Ends the launch from within one of its threads.
[[noreturn]] void abandon_launch();

// barriers.cpp: what an exit means for those that wait.
void leave_barriers(Thread& thread);
[[noreturn]] void report_deadlock();
// What is wrong with an exit without wait_for_previous_launch().
void leave_launch(const Thread& thread);

// warps.cpp
void leave_warp(Thread& thread);

// "3 threads wait"
std::string threads_that(int count, const char* verb);
bool same(Place a, Place b);

}  // namespace emulator
