#include "clocks.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "vector_clock.h"

namespace emulator {

BlockTime* block_time = nullptr;
uint32_t threads_per_block;

namespace {

struct ThreadClocks {
  ClockPointer known;     // beyond phases and warp barriers
  ClockPointer acquired;  // from atomics, valid after the next fence
  ClockPointer released;  // as of the last fence, what later atomics pass on
};

// What each lane knows of its warp's other lanes: their steps below this.
struct WarpClocks {
  uint32_t known[kWarpLanes][kWarpLanes];
};

struct BlockClocks : BlockTime {
  std::vector<ThreadClocks> threads;
  std::vector<WarpClocks> warps;
  // Since the block started. Where no thread knows of others, there is nothing to merge.
  bool warp_barriers_used = false, others_known = false;
};

// What arrivals at an mbarrier pass on.
struct Arrivals {
  ClockPointer known;       // what the threads that arrived in this phase know of others
  std::vector<Known> done;  // what they did themselves
  ClockPointer passed_on;   // by the phases that have ended
};

std::vector<std::unique_ptr<BlockClocks>> slots;
BlockClocks* mine = nullptr;                              // of the current block
std::unordered_map<const void*, ClockPointer> passed_on;  // by atomics, per address
std::unordered_map<const CopyBarrier*, Arrivals> arrivals_at;
std::unordered_map<uint32_t, uint32_t> handed_over_at;  // epochs of threads, by serial number
uint32_t launch_floor = 0, next_launch_floor = 0;
uint32_t serials_per_block;

constexpr uint32_t kMostSteps = (1u << kPhaseShift) - 1;

// Serial numbers of a block behind those of its threads: for copies that no mbarrier waits for,
// then for its mbarriers, of which the last ones share one.
constexpr uint32_t kCopySerials = 128;
constexpr uint32_t kNeverOver = UINT32_MAX;

void next_step(int thread) {
  if (++mine->step[thread] > kMostSteps)
    fail(
        {"more than 65535 warp barriers, fences and arrivals in a thread: too many for the race "
         "build"});
}

ThreadClocks& clocks_of_current() {
  return mine->threads[static_cast<size_t>(machine.current->number)];
}

void learn(ThreadClocks& thread, const ClockPointer& clock) {
  mine->others_known = true;
  thread.known = merged(thread.known, clock);
}

void next_phase(BlockClocks& block) {
  if (++block.phase >> (32 - kPhaseShift))
    fail({"more than 65535 barriers in a block: too many for the race build"});
}

ClockPointer known_to_all(const BlockClocks& block, ClockPointer all) {
  for (const ThreadClocks& thread : block.threads) all = merged(all, thread.known);
  return all;
}

void tell_all(BlockClocks& block, const ClockPointer& clock) {
  for (ThreadClocks& thread : block.threads)
    if (thread.known != clock) thread.known = clock;
}

// What the phase says already; what is known of the block's mbarriers stays.
ClockPointer without_threads(const ClockPointer& clock, const BlockClocks& block) {
  return without(clock, thread_key(block.first_thread),
                 thread_key(block.first_thread + threads_per_block));
}

// What the current thread did, and what its block did before its barriers.
void add_own_past(std::vector<Known>* known) {
  const Thread& me = *machine.current;
  const uint32_t warp_start = mine->first_thread + static_cast<uint32_t>(me.warp * kWarpLanes);
  const uint32_t phase = mine->phase << kPhaseShift;
  const WarpClocks& warp = mine->warps[static_cast<size_t>(me.warp)];
  known->push_back({block_key(mine->first_thread), phase});
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    uint32_t until = warp.known[me.lane][lane];
    if (lane == me.lane) until = mine->step[me.number] + 1;
    if (until)
      known->push_back({thread_key(warp_start + static_cast<uint32_t>(lane)), phase | until});
  }
}

uint32_t serial_of(const CopyBarrier& barrier) {
  const auto number = std::min(static_cast<uint32_t>(barrier.number) + 1, kCopySerials - 1);
  return slots[static_cast<size_t>(barrier.block->slot)]->first_thread + threads_per_block + number;
}

void start_block_clocks(BlockClocks& block, uint64_t position) {
  block.first_thread = launch_floor + 1 + static_cast<uint32_t>(position * serials_per_block);
  block.phase = 0;
  const bool warps_fit = block.warps.size() * kWarpLanes >= threads_per_block;
  if (block.threads.size() != threads_per_block || block.others_known)
    block.threads.assign(threads_per_block, {});
  if (!warps_fit || block.warp_barriers_used)
    block.warps.assign((threads_per_block + kWarpLanes - 1) / kWarpLanes, {});
  std::memset(block.step, 0, threads_per_block * sizeof *block.step);
  block.warp_barriers_used = block.others_known = false;
}

}  // namespace

uint32_t start_launch_clocks(const Launch& launch) {
  threads_per_block = launch.block.x * launch.block.y * launch.block.z;
  serials_per_block = threads_per_block + kCopySerials;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const uint64_t serials = blocks * serials_per_block;
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

uint32_t start_gang_clocks(int blocks, uint64_t position) {
  const auto count = static_cast<size_t>(blocks);
  while (slots.size() < count) slots.push_back(std::make_unique<BlockClocks>());
  for (size_t slot = 0; slot < count; ++slot) start_block_clocks(*slots[slot], position + slot);
  arrivals_at.clear();
  handed_over_at.clear();
  enter_block_clocks(0);
  return slots[0]->first_thread - 1;
}

void enter_block_clocks(int slot) { block_time = mine = slots[static_cast<size_t>(slot)].get(); }

uint64_t position_of(uint32_t serial) { return (serial - launch_floor - 1) / serials_per_block; }
uint32_t number_of(uint32_t serial) { return (serial - launch_floor - 1) % serials_per_block; }
bool is_thread(uint32_t serial) { return number_of(serial) < threads_per_block; }

bool known_from_others(const Moment& moment) {
  const Thread& me = *machine.current;
  const uint32_t other = moment.thread - mine->first_thread;
  const bool own_warp =
      other < threads_per_block && static_cast<int>(other / kWarpLanes) == me.warp;
  const uint32_t step = moment.epoch & kMostSteps;
  const WarpClocks& warp = mine->warps[static_cast<size_t>(me.warp)];
  if (own_warp && step < warp.known[me.lane][other % kWarpLanes]) return true;
  const ClockPointer& clock = clocks_of_current().known;
  if (!clock) return false;
  if (knows(*clock, thread_key(moment.thread), moment.epoch)) return true;
  const uint32_t number = number_of(moment.thread);
  return number < threads_per_block &&
         knows(*clock, block_key(moment.thread - number), moment.epoch);
}

void block_barrier_clocks() {
  next_phase(*mine);
  if (!mine->others_known) return;
  tell_all(*mine, without_threads(known_to_all(*mine, nullptr), *mine));
}

void team_barrier_clocks(int first, int blocks) {
  if (blocks == 1) return block_barrier_clocks();
  const auto begin = slots.begin() + first, end = begin + blocks;
  ClockPointer all;
  std::vector<Known> past;
  for (auto block = begin; block != end; ++block) {
    next_phase(**block);
    all = known_to_all(**block, all);
    past.push_back({block_key((*block)->first_thread), (*block)->phase << kPhaseShift});
  }
  for (auto block = begin; block != end; ++block) all = without_threads(all, **block);
  all = merged(all, clock_of(std::move(past)));
  for (auto block = begin; block != end; ++block) {
    (*block)->others_known = true;
    tell_all(**block, all);
  }
}

void warp_barrier_clocks(int warp, unsigned lanes) {
  mine->warp_barriers_used = true;
  WarpClocks& clocks = mine->warps[static_cast<size_t>(warp)];
  ThreadClocks* const threads = &mine->threads[static_cast<size_t>(warp * kWarpLanes)];
  const int first = warp * kWarpLanes;
  uint32_t together[kWarpLanes] = {};
  ClockPointer all;
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const uint32_t* known = clocks.known[lane];
    for (int i = 0; i < kWarpLanes; ++i) together[i] = std::max(together[i], known[i]);
    next_step(first + lane);
    together[lane] = mine->step[first + lane];
    if (mine->others_known) all = merged(all, threads[lane].known);
  }
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    std::memcpy(clocks.known[lane], together, sizeof together);
    if (all) threads[lane].known = all;
  }
}

void fence_clocks() {
  ThreadClocks& clocks = clocks_of_current();
  learn(clocks, clocks.acquired);
  clocks.acquired = nullptr;
  // Passed on with later atomics: all that this thread knows, and did itself.
  std::vector<Known> past;
  add_own_past(&past);
  clocks.released = merged(clocks.known, clock_of(std::move(past)));
  next_step(machine.current->number);
}

void atomic_clocks(const void* p) {
  ThreadClocks& clocks = clocks_of_current();
  const auto found = passed_on.find(p);
  if (found != passed_on.end()) {
    mine->others_known = true;
    clocks.acquired = merged(clocks.acquired, found->second);
  }
  if (!clocks.released) return;
  ClockPointer& passed = found != passed_on.end() ? found->second : passed_on[p];
  passed = merged(passed, clocks.released);
}

void arrive_clocks(const CopyBarrier& barrier) {
  Arrivals& arrivals = arrivals_at[&barrier];
  arrivals.known = merged(arrivals.known, clocks_of_current().known);
  add_own_past(&arrivals.done);
  next_step(machine.current->number);
}

void end_phase_clocks(const CopyBarrier& barrier) {
  Arrivals& arrivals = arrivals_at[&barrier];
  arrivals.done.push_back({thread_key(serial_of(barrier)), barrier.phase + 1});
  const ClockPointer done = clock_of(std::move(arrivals.done));
  arrivals.passed_on = merged(arrivals.passed_on, merged(arrivals.known, done));
  arrivals.known = nullptr;
  arrivals.done.clear();
}

void wait_clocks(const CopyBarrier& barrier) {
  const auto found = arrivals_at.find(&barrier);
  if (found != arrivals_at.end()) learn(clocks_of_current(), found->second.passed_on);
}

void hand_over_clocks() {
  next_step(machine.current->number);
  handed_over_at[current_serial()] = current_epoch();
}

bool handed_over(const Moment& moment) {
  const auto found = handed_over_at.find(moment.thread);
  return found != handed_over_at.end() && moment.epoch < found->second;
}

Moment moment_of_copy(const CopyBarrier* barrier, uint32_t code) {
  if (!barrier) return {mine->first_thread + threads_per_block, kNeverOver, code, 0};
  return {serial_of(*barrier), barrier->phase, code, 0};
}

}  // namespace emulator
