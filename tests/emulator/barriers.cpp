// Barriers of a block, a cluster and a grid, the wait for the launch before, and what is wrong with
// how they are used.
#include <cstring>
#include <map>
#include <string>

#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr const char kOfBlock[] = "__syncthreads";
constexpr const char kOfCluster[] = "cluster_barrier";
constexpr const char kOfGrid[] = "grid_barrier";
constexpr const char kOfPart[] = "part_barrier";

std::string waiting_in(const Barrier& barrier, const char* operation) {
  return threads_that(barrier.arrived, "wait in ") + operation + " at " + describe(barrier.place);
}

// Counts this thread in, with what that may prove wrong.
void arrive(Barrier& barrier, const char* operation, int exited, Place place) {
  Thread& thread = *machine.current;
  thread.operation = operation;
  thread.place = place;
  if (exited)
    fail({std::string(operation) + " at " + describe(place) + " after " +
          threads_that(exited, "exited")});
  if (barrier.arrived == 0) {
    barrier.place = place;
    barrier.first = &thread;
  } else if (!same(place, barrier.place)) {
    fail({"divergent barrier: " + waiting_in(barrier, operation) + " (the first is " +
          describe_thread(barrier.first->block->index, barrier.first->index) +
          "), and this one came to " + describe(place)});
  }
  ++barrier.arrived;
}

int count_votes(Vote vote, int votes, int voters) {
  switch (vote) {
    case Vote::kNone: return 0;
    case Vote::kAny: return votes > 0;
    case Vote::kAll: return votes == voters;
    case Vote::kCount: return votes;
  }
  return 0;
}

void let_go_on(Block& block) {
  const int warps = (block.live + kWarpLanes - 1) / kWarpLanes;
  for (int warp = 0; warp < warps; ++warp) make_ready(block, warp, block.warps[warp].lanes);
}

void release_block(Vote vote) {
  Block& block = *machine.block;
  block.barrier.result = count_votes(vote, block.barrier.votes, block.live);
  block.barrier.arrived = block.barrier.votes = 0;
  races::block_barrier();
  let_go_on(block);
}

void team_barrier(Team& team, const char* operation, Place place) {
  arrive(team.barrier, operation, team.threads - team.live, place);
  if (team.barrier.arrived == team.live) {
    team.barrier.arrived = 0;
    races::team_barrier(team.first, team.blocks);
    for (int slot = team.first; slot < team.first + team.blocks; ++slot)
      let_go_on(*machine.slots[static_cast<size_t>(slot)]);
  }
  wait_for_others();
}

// The parts of so many blocks each that the grid is cut into; some threads may have left.
void cut_grid(int blocks) {
  for (int first = 0; first < machine.gang; first += blocks) {
    Team part = {first, blocks};
    for (int slot = first; slot < first + blocks; ++slot) {
      const Block& block = *machine.slots[static_cast<size_t>(slot)];
      part.threads += static_cast<int>(block.threads.size());
      part.live += block.live;
    }
    machine.parts.push_back(part);
  }
}

Team* part_of(const Block& block) {
  if (machine.parts.empty()) return nullptr;
  return &machine.parts[static_cast<size_t>(block.slot / machine.parts[0].blocks)];
}

// A block has come to the barrier of its part.
void count_block(Team& part, unsigned* arrived, Place place) {
  if (*arrived != part.counted)
    fail({std::string(kOfPart) + " at " + describe(place) + ": the count of the part's blocks is " +
          std::to_string(*arrived) + ", not " + std::to_string(part.counted) +
          ": it was not set to 0 before, or something overwrote it"});
  *arrived = ++part.counted;
}

void expect_cooperative(const char* operation, Place place) {
  if (!machine.launch->cooperative)
    fail({std::string(operation) + " at " + describe(place) +
          " in a launch that is not cooperative"});
}

void leave(const Barrier& barrier, const char* operation) {
  if (barrier.arrived) fail({"exits while " + waiting_in(barrier, operation)});
}

// The last thread of a block has left.
void end_block(Block& block) {
  leave_copies(block);
  if (block.cluster->blocks == 1) return;
  races::end_block(block);
  hide_shared_memory(block.shared);
}

// Threads that wait at the same place, and in how many blocks.
struct Waiting {
  int threads = 0, blocks = 0;
  const Block* last = nullptr;
};

std::string describe(const Waiting& waiting, const std::string& where) {
  const std::string threads = threads_that(waiting.threads, "");
  if (machine.gang == 1) return threads + where;
  if (waiting.blocks > 1)
    return threads + "of " + std::to_string(waiting.blocks) + " blocks " + where;
  return threads + "of block " + describe_index(waiting.last->index) + " " + where;
}

}  // namespace

bool same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string threads_that(int count, const char* verb) {
  return std::to_string(count) + (count == 1 ? " thread " : " threads ") + verb;
}

int block_barrier(Vote vote, bool predicate, Place place) {
  Block& block = *machine.block;
  const int exited = static_cast<int>(block.threads.size()) - block.live;
  arrive(block.barrier, kOfBlock, exited, place);
  block.barrier.votes += predicate;
  if (block.barrier.arrived == block.live) release_block(vote);
  wait_for_others();
  return block.barrier.result;
}

void cluster_barrier(Place place) { team_barrier(*machine.block->cluster, kOfCluster, place); }

void grid_barrier(Place place) {
  expect_cooperative(kOfGrid, place);
  team_barrier(machine.grid, kOfGrid, place);
}

void part_barrier(unsigned* arrived, int blocks, Place place) {
  expect_cooperative(kOfPart, place);
  const int parted = machine.parts.empty() ? blocks : machine.parts[0].blocks;
  if (blocks < 1 || machine.gang % blocks || blocks != parted)
    fail({std::string(kOfPart) + " at " + describe(place) + ": " + std::to_string(machine.gang) +
          " blocks do not come in parts of " + std::to_string(blocks) +
          (blocks == parted ? "" : ", and came in parts of " + std::to_string(parted))});
  if (machine.parts.empty()) cut_grid(blocks);
  Block& block = *machine.block;
  Team& part = *part_of(block);
  if (++block.at_part == block.live) {
    block.at_part = 0;
    count_block(part, arrived, place);
  }
  team_barrier(part, kOfPart, place);
}

void wait_for_previous_launch() { machine.current->after_previous = true; }

void leave_launch(const Thread& thread) {
  if (machine.launch->overlaps && !thread.after_previous)
    fail({"exits without a wait for the launch before"});
}

void leave_barriers(Thread& thread) {
  Block& block = *machine.block;
  thread.exited = true;
  --block.live;
  --block.cluster->live;
  --machine.grid.live;
  Team* const part = part_of(block);
  if (part) --part->live;
  leave(block.barrier, kOfBlock);
  leave(block.cluster->barrier, kOfCluster);
  leave(machine.grid.barrier, kOfGrid);
  if (part) leave(part->barrier, kOfPart);
  leave_warp(thread);
  if (!block.live) end_block(block);
}

void report_deadlock() {
  std::map<std::string, Waiting> waiting;
  for (int slot = 0; slot < machine.gang; ++slot) {
    const Block& block = *machine.slots[static_cast<size_t>(slot)];
    for (const Thread& thread : block.threads) {
      const std::string where = thread.exited ? "have exited"
                                              : std::string("wait in ") + thread.operation +
                                                    " at " + describe(thread.place);
      Waiting& there = waiting[where];
      ++there.threads;
      there.blocks += there.last != &block;
      there.last = &block;
    }
  }
  std::string text = "deadlock:";
  for (const auto& [where, there] : waiting) text += "\n    " + describe(there, where);
  fail({text});
}

}  // namespace emulator
