#include "vector_clock.h"

#include <algorithm>
#include <utility>

namespace emulator {

namespace {

Clock::const_iterator find_from(const Clock& clock, uint64_t who) {
  return std::lower_bound(clock.begin(), clock.end(), who,
                          [](const Known& a, uint64_t b) { return a.who < b; });
}

bool holds_all(const Clock& clock, const Clock& other) {
  if (other.size() > clock.size()) return false;
  auto known = clock.begin();
  for (const Known& wanted : other) {
    while (known != clock.end() && known->who < wanted.who) ++known;
    if (known == clock.end() || known->who != wanted.who || known->until < wanted.until)
      return false;
  }
  return true;
}

ClockPointer merge(const Clock& a, const Clock& b) {
  auto sum = std::make_shared<Clock>();
  sum->reserve(a.size() + b.size());
  auto left = a.begin(), right = b.begin();
  while (left != a.end() || right != b.end()) {
    if (right == b.end() || (left != a.end() && left->who < right->who)) {
      sum->push_back(*left++);
    } else if (left == a.end() || right->who < left->who) {
      sum->push_back(*right++);
    } else {
      sum->push_back({left->who, std::max(left->until, right->until)});
      ++left, ++right;
    }
  }
  return sum;
}

// The merge before: all threads of a block tend to learn the same, one after another.
struct Merge {
  ClockPointer a, b, sum;
} last;

}  // namespace

ClockPointer clock_of(std::vector<Known> known) {
  std::sort(known.begin(), known.end(), [](const Known& a, const Known& b) {
    return a.who != b.who ? a.who < b.who : a.until > b.until;
  });
  known.erase(std::unique(known.begin(), known.end(),
                          [](const Known& a, const Known& b) { return a.who == b.who; }),
              known.end());
  return std::make_shared<const Clock>(std::move(known));
}

bool knows(const Clock& clock, uint64_t who, uint32_t epoch) {
  const auto found = find_from(clock, who);
  return found != clock.end() && found->who == who && epoch < found->until;
}

ClockPointer merged(const ClockPointer& a, const ClockPointer& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  if (a == last.a && b == last.b) return last.sum;
  last = {a, b, holds_all(*a, *b) ? a : holds_all(*b, *a) ? b : merge(*a, *b)};
  return last.sum;
}

ClockPointer without(const ClockPointer& clock, uint64_t first, uint64_t end) {
  if (!clock) return clock;
  const auto from = find_from(*clock, first), to = find_from(*clock, end);
  if (from == to) return clock;
  auto rest = std::make_shared<Clock>(clock->begin(), from);
  rest->insert(rest->end(), to, clock->end());
  return rest;
}

}  // namespace emulator
