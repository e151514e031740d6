// Barriers of a block and of a warp, votes and shuffles, and what is wrong with how they are used.
#include <cstring>
#include <map>
#include <string>

#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

// As a thread's source lane, where it is in no shuffle. A barrier alone orders memory.
constexpr int kVote = -1;
constexpr int kBarrier = -2;

bool same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string threads_that(size_t count, const char* verb) {
  return std::to_string(count) + (count == 1 ? " thread " : " threads ") + verb;
}

size_t exited_threads() { return machine.threads.size() - static_cast<size_t>(machine.live); }

// Counts this thread in, with what that may prove wrong.
void arrive_at_block_barrier(Place place) {
  BlockBarrier& barrier = machine.barrier;
  if (exited_threads())
    fail({"__syncthreads at " + describe(place) + " after " +
          threads_that(exited_threads(), "exited")});
  if (barrier.arrived == 0) {
    barrier.place = place;
    barrier.first_thread = machine.current->number;
  } else if (!same(place, barrier.place)) {
    fail({"divergent barrier: " + threads_that(barrier.arrived, "wait in __syncthreads at ") +
          describe(barrier.place) + " (the first is thread " +
          std::to_string(barrier.first_thread) + "), and this one came to " + describe(place)});
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

void release_block(Vote vote) {
  BlockBarrier& barrier = machine.barrier;
  barrier.result = count_votes(vote, barrier.votes, machine.live);
  barrier.arrived = barrier.votes = 0;
  races::block_barrier();
  const int warps = (machine.live + kWarpLanes - 1) / kWarpLanes;
  for (int warp = 0; warp < warps; ++warp) machine.ready.add(warp, machine.warps[warp].lanes);
}

Thread& lane_of(int warp, int lane) { return machine.threads[warp * kWarpLanes + lane]; }

template <class Body>
void for_each_lane(unsigned lanes, Body body) {
  for (; lanes; lanes &= lanes - 1) body(__builtin_ctz(lanes));
}

std::string describe_lanes(unsigned lanes) {
  std::string text = lanes & (lanes - 1) ? "lanes" : "lane";
  for_each_lane(lanes, [&](int lane) { text += " " + std::to_string(lane); });
  return text;
}

// A shuffle or ballot's results, where all of `lanes` have come.
void exchange(const Thread& asking, unsigned lanes) {
  uint64_t ballot = 0;
  for_each_lane(lanes, [&](int lane) { ballot |= (lane_of(asking.warp, lane).given & 1) << lane; });
  unsigned missing = 0;
  for_each_lane(lanes, [&](int lane) {
    Thread& thread = lane_of(asking.warp, lane);
    if (thread.source_lane < 0) {
      thread.received = ballot;
    } else if (lanes >> thread.source_lane & 1) {
      thread.received = lane_of(asking.warp, thread.source_lane).given;
    } else {
      thread.received = ~0ull;
      missing |= 1u << thread.source_lane;
    }
  });
  if (missing)
    report({std::string(asking.operation) + " at " + describe(asking.place) + " reads from " +
            describe_lanes(missing) + " of warp " + std::to_string(asking.warp) +
            ", not taking part"});
}

// Lets a warp operation happen if all lanes named in `asking`'s mask have come; those that have
// exited are not waited for.
void try_warp_operation(const Thread& asking) {
  Warp& warp = machine.warps[asking.warp];
  const unsigned lanes = asking.mask & warp.lanes;
  if ((warp.waiting & lanes) != lanes) return;
  for_each_lane(lanes, [&](int lane) {
    const Thread& other = lane_of(asking.warp, lane);
    if ((other.mask & warp.lanes) != lanes || !same(other.place, asking.place))
      fail({"divergent warp operation: lane " + std::to_string(asking.lane) + " is in " +
            asking.operation + " at " + describe(asking.place) + ", lane " + std::to_string(lane) +
            " in " + other.operation + " at " + describe(other.place)});
  });
  exchange(asking, lanes);
  if (asking.source_lane == kBarrier) races::warp_barrier(asking.warp, lanes);
  warp.waiting &= ~lanes;
  machine.ready.add(asking.warp, lanes);
}

}  // namespace

int block_barrier(Vote vote, bool predicate, Place place) {
  Thread& thread = *machine.current;
  thread.operation = "__syncthreads";
  thread.place = place;
  arrive_at_block_barrier(place);
  machine.barrier.votes += predicate;
  if (machine.barrier.arrived == machine.live) release_block(vote);
  wait_for_others();
  return machine.barrier.result;
}

namespace {

uint64_t warp_operation(const char* operation, unsigned mask, uint64_t given, int source_lane,
                        Place place) {
  Thread& thread = *machine.current;
  thread.operation = operation;
  thread.place = place;
  thread.mask = mask;
  thread.given = given;
  thread.source_lane = source_lane;
  if (!(mask >> thread.lane & 1))
    fail({std::string(operation) + " at " + describe(place) + ": lane " +
          std::to_string(thread.lane) + " is not in its own mask"});
  machine.warps[thread.warp].waiting |= 1u << thread.lane;
  try_warp_operation(thread);
  wait_for_others();
  return thread.received;
}

}  // namespace

void warp_barrier(unsigned mask, Place place) {
  warp_operation("__syncwarp", mask, 0, kBarrier, place);
}

unsigned warp_ballot(unsigned mask, bool predicate, Place place) {
  return static_cast<unsigned>(warp_operation("vote", mask, predicate, kVote, place));
}

uint64_t warp_shuffle(unsigned mask, uint64_t value, int source_lane, Place place) {
  return warp_operation("shuffle", mask, value, source_lane, place);
}

int lane_number() { return machine.current->lane; }

void leave_barriers(Thread& thread) {
  thread.exited = true;
  --machine.live;
  if (machine.barrier.arrived)
    fail({"exits while " + threads_that(machine.barrier.arrived, "wait in __syncthreads at ") +
          describe(machine.barrier.place)});
  Warp& warp = machine.warps[thread.warp];
  warp.lanes &= ~(1u << thread.lane);
  for_each_lane(warp.waiting, [&](int lane) { try_warp_operation(lane_of(thread.warp, lane)); });
}

void report_deadlock() {
  std::map<std::string, size_t> waiting;
  for (const Thread& thread : machine.threads)
    if (!thread.exited)
      ++waiting[std::string("wait in ") + thread.operation + " at " + describe(thread.place)];
  std::string text = "deadlock:";
  for (const auto& [where, count] : waiting) text += "\n    " + threads_that(count, where.c_str());
  if (exited_threads()) text += "\n    " + threads_that(exited_threads(), "have exited");
  fail({text});
}

}  // namespace emulator
