// What a thread knows of others' past, as a value that many threads share.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

// What is known of `who` (a thread, a copy barrier, or all of a block): all before epoch `until`.
struct Known {
  uint64_t who;
  uint32_t until;
};

inline uint64_t thread_key(uint32_t serial) { return uint64_t{serial} << 1; }
inline uint64_t block_key(uint32_t first_serial) { return uint64_t{first_serial} << 1 | 1; }

// Sorted by who; never changed once shared.
using Clock = std::vector<Known>;
using ClockPointer = std::shared_ptr<const Clock>;

// Sorts, and keeps of each the latest.
ClockPointer clock_of(std::vector<Known> known);
bool knows(const Clock& clock, uint64_t who, uint32_t epoch);
// Either one itself where it holds all of the other: clocks that are equal mostly are the same.
ClockPointer merged(const ClockPointer& a, const ClockPointer& b);
// Without what is known of those from `first` to before `end`.
ClockPointer without(const ClockPointer& clock, uint64_t first, uint64_t end);

}  // namespace emulator
