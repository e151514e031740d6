// The emulated machine: one block at a time, its threads, and who of them runs next.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "emulator.h"
#include "fibers.h"
#include "findings.h"
#include "include/cuda_runtime.h"

namespace emulator {

constexpr int kWarpLanes = 32;
constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kWarpLanes;

struct Thread {
  uint3 index;
  int number;  // in its block
  int warp, lane;
  Fiber* fiber;  // null before it starts and after it exits
  bool exited;

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

// Threads that can run: which warps, and of each which lanes.
class ReadySet {
 public:
  void clear() { warps_ = 0; }
  void add(int warp, unsigned lanes);
  // So that a launch depends on nothing before it.
  void seed(uint64_t value);
  // The next thread's number as the order wants it, or -1; takes it out.
  int take(Order order);

 private:
  int choose_warp(Order order);
  int choose_lane(Order order, unsigned lanes);

  uint32_t warps_ = 0;
  uint32_t lanes_[kMostWarps] = {};
  int last_warp_ = 0;
  std::minstd_rand random_;
};

// A barrier of the block that some threads may have reached.
struct BlockBarrier {
  int arrived;
  int votes;
  int result;  // of the barrier before
  Place place;
  int first_thread;
};

struct Machine {
  const Launch* launch = nullptr;
  Schedule schedule;
  Context host;
  Thread* current = nullptr;  // null while the host runs
  std::vector<Thread> threads;
  Warp warps[kMostWarps];
  int live = 0;  // threads of the block that have not exited
  BlockBarrier barrier;
  ReadySet ready;
  bool failed = false;
};

extern Machine machine;

// Runs every block; findings tell how it went.
void run_blocks(const Launch& launch);

uint3 block_index(uint64_t number);

// Lets other threads run until something makes the current one ready again.
void wait_for_others();

// Ends the launch from within one of its threads.
[[noreturn]] void abandon_launch();

// barriers.cpp: what an exit means for those that wait.
void leave_barriers(Thread& thread);
[[noreturn]] void report_deadlock();

// shared_memory.cpp
void poison_shared_memory();
void end_shared_memory();

}  // namespace emulator
