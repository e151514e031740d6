// Barriers of a warp, votes and shuffles, and what is wrong with how they are used.
#include <string>

#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

// As a thread's source lane, where it is in no shuffle. A barrier alone orders memory.
constexpr int kVote = -1;
constexpr int kBarrier = -2;

Thread& lane_of(int warp, int lane) {
  return machine.block->threads[static_cast<size_t>(warp * kWarpLanes + lane)];
}

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
  Warp& warp = machine.block->warps[asking.warp];
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
  make_ready(*machine.block, asking.warp, lanes);
}

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
  machine.block->warps[thread.warp].waiting |= 1u << thread.lane;
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

void leave_warp(Thread& thread) {
  Warp& warp = machine.block->warps[thread.warp];
  warp.lanes &= ~(1u << thread.lane);
  for_each_lane(warp.waiting, [&](int lane) { try_warp_operation(lane_of(thread.warp, lane)); });
}

}  // namespace emulator
