#include "scheduler.h"

#include <algorithm>
#include <numeric>

#include "races.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Machine machine;

namespace {

void run_threads();

FiberPool fibers(run_threads);

Thread* take_ready_of(Block& block) {
  return &block.threads[static_cast<size_t>(block.ready.take(machine.schedule.order))];
}

Thread* take_ready_of_gang() {
  const int slot = machine.ready.choose(machine.schedule.order);
  if (slot < 0) return nullptr;
  Block& block = *machine.slots[static_cast<size_t>(slot)];
  Thread* const thread = take_ready_of(block);
  if (block.ready.empty()) machine.ready.remove(slot);
  return thread;
}

// Null where no thread can run, and no copy under way can change that.
Thread* take_ready() {
  if (copies_under_way) maybe_end_copy();
  do {
    if (machine.gang > 1) {
      if (Thread* const thread = take_ready_of_gang()) return thread;
    } else if (!machine.only->ready.empty()) {
      return take_ready_of(*machine.only);
    }
  } while (end_oldest_copy());
  return nullptr;
}

void make_current(Thread* thread) {
  machine.current = thread;
  threadIdx = thread->index;
  if (machine.block == thread->block) return;
  machine.block = thread->block;
  blockIdx = thread->block->index;
  races::enter_block(thread->block->slot);
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
    leave_launch(done);
    leave_barriers(done);
    Thread* const next = take_ready();
    if (!next && machine.grid.live) report_deadlock();
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

void number_threads(Block& block, const dim3& extent) {
  block.threads.assign(static_cast<size_t>(extent.x) * extent.y * extent.z, {});
  int number = 0;
  for (Thread& thread : block.threads) {
    thread.index = thread_index(static_cast<uint32_t>(number));
    thread.number = number;
    thread.warp = number / kWarpLanes;
    thread.lane = number % kWarpLanes;
    thread.block = &block;
    ++number;
  }
}

// Blocks that run at the same time, and how they form clusters.
void form_gang(const Launch& launch, uint64_t blocks) {
  const auto cluster = static_cast<int>(launch.cluster.x);
  machine.gang = launch.cooperative ? static_cast<int>(blocks) : cluster;
  const auto gang = static_cast<size_t>(machine.gang);
  while (machine.slots.size() < gang) machine.slots.push_back(std::make_unique<Block>());
  machine.grid = {0, machine.gang};
  machine.clusters.clear();
  for (int first = 0; first < machine.gang; first += cluster)
    machine.clusters.push_back({first, cluster});
  for (int slot = 0; slot < machine.gang; ++slot) {
    Block& block = *machine.slots[static_cast<size_t>(slot)];
    block.slot = slot;
    block.cluster = &machine.clusters[static_cast<size_t>(slot / cluster)];
    block.copies = {};
    block.ready.seed(machine.schedule.seed + static_cast<uint64_t>(slot));
    number_threads(block, launch.block);
  }
  machine.only = machine.slots.front().get();
  machine.ready.restart(machine.gang);
  machine.ready.seed(machine.schedule.seed);
}

void start_block(Block& block, uint64_t number) {
  block.index = block_index(number);
  block.live = static_cast<int>(block.threads.size());
  block.barrier = {};
  block.at_part = 0;
  block.copies.barriers.clear();
  block.ready.clear();
  for (Thread& thread : block.threads) thread.exited = thread.after_previous = false;
  for (int first = 0; first < block.live; first += kWarpLanes) {
    const int lanes = std::min(kWarpLanes, block.live - first);
    Warp& warp = block.warps[first / kWarpLanes];
    warp = {lanes == kWarpLanes ? ~0u : (1u << lanes) - 1, 0};
    make_ready(block, first / kWarpLanes, warp.lanes);
  }
  restart_shared_memory(block.shared);
}

void start_team(Team& team) {
  const size_t threads = machine.slots[0]->threads.size();
  team.threads = team.live = team.blocks * static_cast<int>(threads);
  team.barrier = {};
}

// The blocks from number `first` on.
void run_gang(uint64_t first) {
  races::start_gang(machine.gang, first);
  for (int slot = 0; slot < machine.gang; ++slot)
    start_block(*machine.slots[static_cast<size_t>(slot)], first + static_cast<uint64_t>(slot));
  for (Team& cluster : machine.clusters) start_team(cluster);
  start_team(machine.grid);
  machine.parts.clear();
  machine.block = nullptr;
  switch_context(machine.host, start_or_resume(take_ready()));
}

std::vector<uint32_t> shuffled(uint64_t count, uint64_t seed) {
  std::vector<uint32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::minstd_rand random(static_cast<unsigned>(seed * 7919 + 1));
  for (uint64_t i = count; i > 1; --i) std::swap(numbers[i - 1], numbers[random() % i]);
  return numbers;
}

}  // namespace

uint3 block_index(uint64_t number) {
  const dim3& grid = machine.launch->grid;
  return {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
          static_cast<unsigned>(number / grid.x / grid.y)};
}

uint3 thread_index(uint32_t number) {
  const dim3& block = machine.launch->block;
  return {number % block.x, number / block.x % block.y, number / block.x / block.y};
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
  blockDim = launch.block;
  gridDim = launch.grid;
  const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  form_gang(launch, blocks);
  races::start_launch(launch);

  const Order order = machine.schedule.order;
  const uint64_t size = static_cast<uint64_t>(machine.gang), gangs = blocks / size;
  std::vector<uint32_t> numbers;
  if (order == Order::kRandom) numbers = shuffled(gangs, machine.schedule.seed);
  for (uint64_t i = 0; i < gangs && !machine.failed; ++i)
    run_gang(size * (order == Order::kAscending    ? i
                     : order == Order::kDescending ? gangs - 1 - i
                                                   : numbers[i]));

  if (machine.failed) fibers.restart_all();
  forget_copies();
  for (const auto& block : machine.slots) free_shared_memory(block->shared);
  machine.launch = nullptr;
}

}  // namespace emulator
