// mbarriers: phases that end when so many threads have arrived and all bytes that they expect.
#include <cstdlib>
#include <string>

#include "copies.h"
#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

// Stands in shared memory for an mbarrier that works.
constexpr uint64_t kMark = 0x7265697272616263;
constexpr unsigned kMostArrivals = (1u << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;

std::string at(const char* operation, Place place) {
  return std::string(operation) + " at " + describe(place);
}

CopyBarrier* find(const uint64_t* object) {
  for (CopyBarrier& barrier : machine.block->copies.barriers)
    if (barrier.object == object) return &barrier;
  return nullptr;
}

void end_phase(CopyBarrier& barrier) {
  races::end_phase(barrier);
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (const Thread* thread : barrier.waiting)
    make_ready(*thread->block, thread->warp, 1u << thread->lane);
  barrier.waiting.clear();
}

void try_end_phase(CopyBarrier& barrier, const char* operation, Place place) {
  if (barrier.pending) return;
  if (barrier.expected_bytes < 0)
    fail({at(operation, place) + ": " + std::to_string(-barrier.expected_bytes) +
          " bytes more have arrived than the mbarrier's phase expects"});
  if (!barrier.expected_bytes) end_phase(barrier);
}

}  // namespace

CopyBarrier& used_barrier(const char* operation, uint64_t* object, Place place, const void* code) {
  CopyBarrier* const barrier = find(object);
  if (!barrier) fail({at(operation, place) + ": no mbarrier of this block was initialised there"});
  if (*object != kMark) fail({at(operation, place) + ": something overwrote the mbarrier"});
  races::use_barrier(object, code);
  return *barrier;
}

void arrive(CopyBarrier& barrier, const char* operation, Place place) {
  if (!barrier.pending)
    fail({at(operation, place) + ": more than the " + std::to_string(barrier.arrivals) +
          " arrivals of a phase of the mbarrier"});
  --barrier.pending;
  try_end_phase(barrier, operation, place);
}

static void add_bytes(CopyBarrier& barrier, int64_t bytes, const char* operation, Place place) {
  barrier.expected_bytes += bytes;
  if (std::abs(barrier.expected_bytes) > kMostBytes)
    fail({at(operation, place) + ": " + std::to_string(barrier.expected_bytes) +
          " bytes are too many for an mbarrier"});
}

void end_bytes(CopyBarrier& barrier, int64_t bytes, const char* operation, Place place) {
  add_bytes(barrier, -bytes, operation, place);
  try_end_phase(barrier, operation, place);
}

__attribute__((noinline)) void mbarrier_init(uint64_t* b, unsigned arrivals, Place place) {
  constexpr const char kName[] = "initialisation of an mbarrier";
  if (reinterpret_cast<uintptr_t>(b) % sizeof *b) misaligned_access(b, sizeof *b, sizeof *b, place);
  if (!find_array(*machine.block, b, sizeof *b))
    fail({at(kName, place) + ": not in a shared array of this block"});
  if (arrivals < 1 || arrivals > kMostArrivals)
    fail({at(kName, place) + ": for " + std::to_string(arrivals) + " arrivals"});
  if (find(b)) fail({at(kName, place) + ": it has been initialised before"});
  races::init_barrier(b, __builtin_return_address(0));
  *b = kMark;
  auto& barriers = machine.block->copies.barriers;
  CopyBarrier& barrier = barriers.emplace_back();
  barrier.object = b;
  barrier.block = machine.block;
  barrier.number = static_cast<int>(barriers.size()) - 1;
  barrier.initialiser = machine.current->number;
  barrier.arrivals = barrier.pending = arrivals;
}

void mbarrier_publish_inits() {
  for (CopyBarrier& barrier : machine.block->copies.barriers)
    if (barrier.initialiser == machine.current->number) barrier.published = true;
}

__attribute__((noinline)) void mbarrier_arrive_expect(uint64_t* b, unsigned bytes, Place place) {
  constexpr const char kName[] = "arrival at an mbarrier";
  CopyBarrier& barrier = used_barrier(kName, b, place, __builtin_return_address(0));
  races::arrive(barrier);
  add_bytes(barrier, bytes, kName, place);
  arrive(barrier, kName, place);
}

// Looks again when it runs again: by then yet another phase may have ended.
__attribute__((noinline)) void mbarrier_wait(uint64_t* b, unsigned parity, Place place) {
  constexpr const char kName[] = "mbarrier_wait";
  const void* const code = __builtin_return_address(0);
  CopyBarrier& barrier = used_barrier(kName, b, place, code);
  if (parity > 1) fail({at(kName, place) + ": parity " + std::to_string(parity)});
  Thread& thread = *machine.current;
  thread.operation = kName;
  thread.place = place;
  while (barrier.phase % 2 == parity) {
    barrier.waiting.push_back(&thread);
    wait_for_others();
  }
  if (!barrier.pieces.empty()) let_go_of_pieces(barrier);
  races::wait(barrier);
}

}  // namespace emulator
