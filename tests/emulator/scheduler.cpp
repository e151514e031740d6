#include "scheduler.h"

#include <algorithm>
#include <numeric>

#include "races.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Machine machine;

void ReadySet::add(int warp, unsigned lanes) {
  if (!(warps_ >> warp & 1)) lanes_[warp] = 0;
  lanes_[warp] |= lanes;
  warps_ |= 1u << warp;
}

void ReadySet::seed(uint64_t value) {
  random_.seed(static_cast<unsigned>(value * 104729 + 1));
  last_warp_ = 0;
}

int ReadySet::choose_warp(Order order) {
  if (order == Order::kAscending) return __builtin_ctz(warps_);
  if (order == Order::kDescending) return 31 - __builtin_clz(warps_);
  // Mostly goes on with the same warp, so that warps drift apart.
  if (warps_ >> last_warp_ & 1 && random_() % 8) return last_warp_;
  const uint32_t from = warps_ & ~0u << random_() % kMostWarps;
  return __builtin_ctz(from ? from : warps_);
}

int ReadySet::choose_lane(Order order, unsigned lanes) {
  if (order == Order::kAscending) return __builtin_ctz(lanes);
  if (order == Order::kDescending) return 31 - __builtin_clz(lanes);
  const unsigned from = lanes & ~0u << random_() % kWarpLanes;
  return __builtin_ctz(from ? from : lanes);
}

int ReadySet::take(Order order) {
  if (!warps_) return -1;
  const int warp = last_warp_ = choose_warp(order);
  const int lane = choose_lane(order, lanes_[warp]);
  lanes_[warp] &= ~(1u << lane);
  if (!lanes_[warp]) warps_ &= ~(1u << warp);
  return warp * kWarpLanes + lane;
}

namespace {

void run_threads();

FiberPool fibers(run_threads);

Thread* take_ready() {
  const int number = machine.ready.take(machine.schedule.order);
  return number < 0 ? nullptr : &machine.threads[number];
}

void make_current(Thread* thread) {
  machine.current = thread;
  threadIdx = thread->index;
}

Context& start_or_resume(Thread* thread) {
  if (!thread->fiber) thread->fiber = fibers.take();
  make_current(thread);
  return thread->fiber->context;
}

Context& return_to_host() {
  machine.current = nullptr;
  return machine.host;
}

// What every fiber runs: threads from begin to end, one after another. A thread that has not begun
// follows on the same stack without a switch, so kernels without barriers never switch at all.
void run_threads() {
  for (;;) {
    machine.launch->thread(machine.launch->arguments);

    Thread& done = *machine.current;
    Fiber* const fiber = done.fiber;
    leave_barriers(done);
    Thread* const next = take_ready();
    if (!next && machine.live) report_deadlock();
    done.fiber = nullptr;
    if (next && !next->fiber) {
      next->fiber = fiber;
      make_current(next);
      continue;
    }
    fibers.give_back(fiber);
    switch_context(fiber->context, next ? start_or_resume(next) : return_to_host());
  }
}

void number_threads(const dim3& extent) {
  machine.threads.resize(static_cast<size_t>(extent.x) * extent.y * extent.z);
  int number = 0;
  for (Thread& thread : machine.threads) {
    const unsigned n = static_cast<unsigned>(number);
    thread = {};
    thread.index = {n % extent.x, n / extent.x % extent.y, n / extent.x / extent.y};
    thread.number = number;
    thread.warp = number / kWarpLanes;
    thread.lane = number % kWarpLanes;
    ++number;
  }
}

void start_block(uint64_t number) {
  blockIdx = block_index(number);
  machine.live = static_cast<int>(machine.threads.size());
  machine.barrier = {};
  machine.ready.clear();
  for (Thread& thread : machine.threads) thread.exited = false;
  for (int first = 0; first < machine.live; first += kWarpLanes) {
    const int lanes = std::min(kWarpLanes, machine.live - first);
    Warp& warp = machine.warps[first / kWarpLanes];
    warp = {lanes == kWarpLanes ? ~0u : (1u << lanes) - 1, 0};
    machine.ready.add(first / kWarpLanes, warp.lanes);
  }
  poison_shared_memory();
  races::start_block(number);
}

std::vector<uint32_t> shuffled_blocks(uint64_t count, uint64_t seed) {
  std::vector<uint32_t> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::minstd_rand random(static_cast<unsigned>(seed * 7919 + 1));
  for (uint64_t i = count; i > 1; --i) std::swap(blocks[i - 1], blocks[random() % i]);
  return blocks;
}

}  // namespace

uint3 block_index(uint64_t number) {
  const dim3& grid = machine.launch->grid;
  return {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
          static_cast<unsigned>(number / grid.x / grid.y)};
}

void wait_for_others() {
  Thread* const waiting = machine.current;
  Thread* const next = take_ready();
  if (!next) report_deadlock();
  if (next != waiting) switch_context(waiting->fiber->context, start_or_resume(next));
}

void abandon_launch() {
  machine.failed = true;
  Context& abandoned = machine.current->fiber->context;
  switch_context(abandoned, return_to_host());
  __builtin_unreachable();
}

void run_blocks(const Launch& launch) {
  machine.launch = &launch;
  machine.failed = false;
  machine.ready.seed(machine.schedule.seed);
  blockDim = launch.block;
  gridDim = launch.grid;
  number_threads(launch.block);
  races::start_launch(launch);

  const Order order = machine.schedule.order;
  const uint64_t count = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  std::vector<uint32_t> shuffled;
  if (order == Order::kRandom) shuffled = shuffled_blocks(count, machine.schedule.seed);
  for (uint64_t i = 0; i < count && !machine.failed; ++i) {
    start_block(order == Order::kAscending    ? i
                : order == Order::kDescending ? count - 1 - i
                                              : shuffled[i]);
    switch_context(machine.host, start_or_resume(take_ready()));
  }

  if (machine.failed) fibers.restart_all();
  end_shared_memory();
  machine.launch = nullptr;
}

}  // namespace emulator
