#include "clocks.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace emulator {

BlockTime block_time;

namespace {

// What is known of `who` (a thread, or all of a block): everything before epoch `until`.
struct Known {
  uint64_t who;
  uint32_t until;
};

uint64_t thread_key(uint32_t serial) { return uint64_t{serial} << 1; }
uint64_t block_key(uint32_t first_serial) { return uint64_t{first_serial} << 1 | 1; }

// A vector clock, sorted by who; never changed once shared.
using Clock = std::vector<Known>;
using ClockPointer = std::shared_ptr<const Clock>;

bool knows(const Clock& clock, uint64_t who, uint32_t epoch) {
  const auto found = std::lower_bound(clock.begin(), clock.end(), who,
                                      [](const Known& a, uint64_t b) { return a.who < b; });
  return found != clock.end() && found->who == who && epoch < found->until;
}

ClockPointer merged(const ClockPointer& a, const ClockPointer& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto sum = std::make_shared<Clock>();
  sum->reserve(a->size() + b->size());
  auto left = a->begin();
  auto right = b->begin();
  while (left != a->end() || right != b->end()) {
    if (right == b->end() || (left != a->end() && left->who < right->who)) {
      sum->push_back(*left++);
    } else if (left == a->end() || right->who < left->who) {
      sum->push_back(*right++);
    } else {
      sum->push_back({left->who, std::max(left->until, right->until)});
      ++left, ++right;
    }
  }
  return sum;
}

struct ThreadClocks {
  ClockPointer known;     // beyond phases and warp barriers
  ClockPointer acquired;  // from atomics, valid after the next fence
  ClockPointer released;  // as of the last fence, what later atomics pass on
};

// What each lane knows of its warp's other lanes: their steps below this.
struct WarpClocks {
  uint32_t known[kWarpLanes][kWarpLanes];
};

ThreadClocks threads[kMostThreads];
WarpClocks warps[kMostWarps];
bool warp_barriers_used = false, fences_used = false;     // in this block
std::unordered_map<const void*, ClockPointer> passed_on;  // by atomics, per address
uint32_t launch_floor = 0, next_launch_floor = 0;
uint32_t threads_per_block;

constexpr uint32_t kMostSteps = (1u << kPhaseShift) - 1;

void next_step(int thread) {
  if (++block_time.step[thread] > kMostSteps)
    fail({"more than 65535 warp barriers and fences in a thread: too many for the race build"});
}

void learn(ThreadClocks& thread, const ClockPointer& clock) {
  thread.known = merged(thread.known, clock);
}

}  // namespace

uint32_t start_launch_clocks(const Launch& launch) {
  threads_per_block = launch.block.x * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const uint64_t serials = blocks * threads_per_block;
  constexpr uint64_t kLastSerial = UINT32_MAX;
  if (next_launch_floor + serials > kLastSerial) {
    if (serials > kLastSerial)
      throw std::length_error("emulator: too many threads for the race build");
    forget_shadow();
    next_launch_floor = 0;
  }
  launch_floor = next_launch_floor;
  next_launch_floor += static_cast<uint32_t>(serials);
  passed_on.clear();
  return launch_floor;
}

void start_block_clocks(uint64_t position) {
  block_time.first_thread = launch_floor + 1 + static_cast<uint32_t>(position * threads_per_block);
  block_time.phase = 0;
  if (warp_barriers_used || fences_used) std::memset(block_time.step, 0, sizeof block_time.step);
  if (warp_barriers_used) std::memset(warps, 0, sizeof warps);
  if (fences_used) std::fill(std::begin(threads), std::end(threads), ThreadClocks());
  warp_barriers_used = fences_used = false;
}

uint64_t position_of(uint32_t serial) { return (serial - launch_floor - 1) / threads_per_block; }
uint32_t number_of(uint32_t serial) { return (serial - launch_floor - 1) % threads_per_block; }

bool known_from_others(const Moment& moment) {
  const Thread& me = *machine.current;
  const uint32_t other = moment.thread - block_time.first_thread;
  const bool own_warp =
      other < threads_per_block && static_cast<int>(other / kWarpLanes) == me.warp;
  const uint32_t step = moment.epoch & kMostSteps;
  if (own_warp && step < warps[me.warp].known[me.lane][other % kWarpLanes]) return true;
  const ClockPointer& clock = threads[me.number].known;
  if (!clock) return false;
  const uint32_t first_of_block = moment.thread - number_of(moment.thread);
  return knows(*clock, block_key(first_of_block), moment.epoch) ||
         knows(*clock, thread_key(moment.thread), moment.epoch);
}

void block_barrier_clocks() {
  if (++block_time.phase >> (32 - kPhaseShift))
    fail({"more than 65535 barriers in a block: too many for the race build"});
  if (!fences_used) return;
  ClockPointer all;
  for (uint32_t i = 0; i < threads_per_block; ++i) all = merged(all, threads[i].known);
  for (uint32_t i = 0; i < threads_per_block; ++i) threads[i].known = all;
}

void warp_barrier_clocks(int warp, unsigned lanes) {
  warp_barriers_used = true;
  const int first = warp * kWarpLanes;
  uint32_t together[kWarpLanes] = {};
  ClockPointer all;
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const uint32_t* known = warps[warp].known[lane];
    for (int i = 0; i < kWarpLanes; ++i) together[i] = std::max(together[i], known[i]);
    next_step(first + lane);
    together[lane] = block_time.step[first + lane];
    if (fences_used) all = merged(all, threads[first + lane].known);
  }
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    std::memcpy(warps[warp].known[lane], together, sizeof together);
    if (all) threads[first + lane].known = all;
  }
}

void fence_clocks() {
  fences_used = true;
  const Thread& me = *machine.current;
  ThreadClocks& mine = threads[me.number];
  learn(mine, mine.acquired);
  mine.acquired = nullptr;

  // Passed on with later atomics: all that this thread knows, and did itself.
  const uint32_t warp_start = block_time.first_thread + static_cast<uint32_t>(me.warp * kWarpLanes);
  const uint32_t phase = block_time.phase << kPhaseShift;
  Clock own;
  own.push_back({block_key(block_time.first_thread), phase});
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    uint32_t until = warps[me.warp].known[me.lane][lane];
    if (lane == me.lane) until = block_time.step[me.number] + 1;
    if (until) own.push_back({thread_key(warp_start + static_cast<uint32_t>(lane)), phase | until});
  }
  std::sort(own.begin(), own.end(), [](const Known& a, const Known& b) { return a.who < b.who; });
  mine.released = merged(mine.known, std::make_shared<const Clock>(std::move(own)));
  next_step(me.number);
}

void atomic_clocks(const void* p) {
  ThreadClocks& mine = threads[machine.current->number];
  const auto found = passed_on.find(p);
  if (found != passed_on.end()) {
    fences_used = true;
    mine.acquired = merged(mine.acquired, found->second);
  }
  if (!mine.released) return;
  ClockPointer& passed = found != passed_on.end() ? found->second : passed_on[p];
  passed = merged(passed, mine.released);
}

}  // namespace emulator
