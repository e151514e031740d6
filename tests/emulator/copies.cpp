#include "copies.h"

#include <cstring>
#include <string>
#include <unordered_map>

#include "races.h"
#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

size_t copies_under_way = 0;
std::vector<Prefetched> prefetched;
unsigned long long prefetched_bytes = 0;

namespace {

constexpr uintptr_t kAlignment = 16;
constexpr const char kMisaligned[] = ": addresses and size must be multiples of 16";
constexpr const char kBulkCopy[] = "bulk copy";
constexpr const char kCopyByThread[] = "copy";
constexpr const char kPrefetch[] = "prefetch";
constexpr const char kArrival[] = "arrival behind copies";

// A copy under way, or with no bytes a thread's arrival behind its own copies.
struct Copy {
  Thread* thread;
  CopyBarrier* barrier;  // null: a copy by a thread
  void* to;
  const void* from;
  size_t bytes;
  uint32_t phase;  // of the barrier, that it belongs to
  Place place;

  bool in_order() const { return !barrier || !bytes; }
};

std::deque<Copy> under_way;

// Of copies by threads since their last arrival behind copies.
std::unordered_map<const Thread*, std::vector<Piece>> unbound;

std::string describe(const char* operation, size_t bytes, Place place) {
  const std::string size = bytes ? " of " + std::to_string(bytes) + " bytes" : "";
  return operation + size + " at " + describe(place);
}

// What asan knows about it; a copy reads outside of instrumented code.
bool readable([[maybe_unused]] const void* from, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return !__asan_region_is_poisoned(const_cast<void*>(from), bytes);
#else
  return true;
#endif
}

void check_source(const char* operation, const void* from, size_t bytes, Place place) {
  if (!bytes || (reinterpret_cast<uintptr_t>(from) | bytes) % kAlignment)
    fail({describe(operation, bytes, place) + kMisaligned});
  if (!readable(from, bytes))
    fail({describe(operation, bytes, place) + " starts outside of what may be read"});
}

// Claims the bytes that it writes.
void check_copy(const char* operation, void* to, const void* from, size_t bytes, Place place) {
  const auto refuse = [&](const std::string& why) {
    fail({describe(operation, bytes, place) + why});
  };
  check_source(operation, from, bytes, place);
  if (reinterpret_cast<uintptr_t>(to) % kAlignment) refuse(kMisaligned);
  SharedArray* const array = find_array(*machine.block, to, bytes);
  if (!array) refuse(" does not end in one shared array of its own block");
  if (!array->claim(to, bytes))
    refuse(std::string(" into `") + array->name +
           "`: another copy into the same bytes is under way, for no thread has waited for it");
}

void check_phase(const Copy& copy, const char* operation) {
  if (copy.barrier->phase != copy.phase)
    fail({describe(operation, copy.bytes, copy.place) +
          ": the mbarrier's phase ended before, for it expected fewer bytes or arrivals"});
}

void end(const Copy& copy) {
  --copies_under_way;
  --copy.thread->block->copies.under_way;
  if (!copy.bytes) {
    check_phase(copy, kArrival);
    arrive(*copy.barrier, kArrival, copy.place);
    return;
  }
  std::memcpy(copy.to, copy.from, copy.bytes);
  if (!copy.barrier) return;
  check_phase(copy, kBulkCopy);
  end_bytes(*copy.barrier, static_cast<int64_t>(copy.bytes), kBulkCopy, copy.place);
}

void end_copy(size_t number) {
  const auto chosen = under_way.begin() + static_cast<std::ptrdiff_t>(number);
  const Copy copy = *chosen;
  under_way.erase(chosen);
  end(copy);
}

void start(const Copy& copy) {
  if (copy.bytes) std::memset(copy.to, 0xff, copy.bytes);
  ++copies_under_way;
  ++copy.thread->block->copies.under_way;
  if (machine.schedule.order == Order::kDescending)
    end(copy);
  else
    under_way.push_back(copy);
}

}  // namespace

// Any of the oldest; those by one thread in their order, so that its arrival comes behind them.
void maybe_end_copy() {
  constexpr size_t kWindow = 32;
  if (machine.schedule.order != Order::kRandom || !machine.ready.by_chance(4)) return;
  const size_t window = under_way.size() < kWindow ? under_way.size() : kWindow;
  const size_t chosen = machine.ready.random_below(static_cast<unsigned>(window));
  size_t number = chosen;
  if (under_way[chosen].in_order())
    for (number = 0; number < chosen; ++number)
      if (under_way[number].thread == under_way[chosen].thread && under_way[number].in_order())
        break;
  end_copy(number);
}

bool end_oldest_copy() {
  if (under_way.empty()) return false;
  end_copy(0);
  return true;
}

void forget_copies() {
  under_way.clear();
  copies_under_way = 0;
  unbound.clear();
}

void let_go_of_pieces(CopyBarrier& barrier) {
  std::vector<Piece> later;
  for (const Piece& piece : barrier.pieces)
    if (piece.phase < barrier.phase)
      find_array(*barrier.block, piece.to, piece.bytes)->let_go(piece.to, piece.bytes);
    else
      later.push_back(piece);
  barrier.pieces.swap(later);
}

// Whether a copy has arrived is up to the schedule; that nothing waited for it is not.
void leave_copies(Block& block) {
  const CopyState& copies = block.copies;
  if (copies.unbound) {
    unbound.clear();
    fail({"the block exits with " + std::to_string(copies.unbound) +
          " copies under way that no mbarrier waits for"});
  }
  for (const CopyBarrier& barrier : copies.barriers)
    if (!barrier.pieces.empty())
      fail({"the block exits with copies under way: no thread has waited for the one at " +
            describe(barrier.copied_at)});
  if (copies.under_way) fail({"the block exits with arrivals behind copies under way"});
}

__attribute__((noinline)) void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* b,
                                         Place place) {
  const void* const code = __builtin_return_address(0);
  check_copy(kBulkCopy, to, from, bytes, place);
  CopyBarrier& barrier = used_barrier(kBulkCopy, b, place, code);
  if (!barrier.published)
    fail({describe(kBulkCopy, bytes, place) +
          ": the thread that initialised the mbarrier has not published it"});
  races::copy(to, from, bytes, &barrier, code);
  barrier.pieces.push_back({to, from, bytes, barrier.phase});
  barrier.copied_at = place;
  start({machine.current, &barrier, to, from, bytes, barrier.phase, place});
}

__attribute__((noinline)) void async_copy(void* to, const void* from, unsigned bytes, Place place) {
  check_copy(kCopyByThread, to, from, bytes, place);
  races::copy(to, from, bytes, nullptr, __builtin_return_address(0));
  unbound[machine.current].push_back({to, from, bytes, 0});
  ++machine.block->copies.unbound;
  start({machine.current, nullptr, to, from, bytes, 0, place});
}

__attribute__((noinline)) void prefetch(const void* from, unsigned bytes, Place place) {
  check_source(kPrefetch, from, bytes, place);
  races::prefetch(from, bytes, __builtin_return_address(0));
  prefetched.push_back({reinterpret_cast<uintptr_t>(from), bytes});
  prefetched_bytes += bytes;
}

__attribute__((noinline)) void mbarrier_arrive_after_copies(uint64_t* b, Place place) {
  const void* const code = __builtin_return_address(0);
  CopyBarrier& barrier = used_barrier(kArrival, b, place, code);
  std::vector<Piece>& pieces = unbound[machine.current];
  for (Piece& piece : pieces) {
    races::bind_copy(piece.to, piece.from, piece.bytes, barrier);
    piece.phase = barrier.phase;
    barrier.pieces.push_back(piece);
    barrier.copied_at = place;
  }
  machine.block->copies.unbound -= pieces.size();
  pieces.clear();
  start({machine.current, &barrier, nullptr, nullptr, 0, barrier.phase, place});
}

}  // namespace emulator
