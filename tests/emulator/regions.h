// The memory that kernels may touch, as the host said, and how much of it they did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>

namespace emulator {

// Adds up over regions of the same name and over launches.
struct Count {
  std::string name;
  uint64_t read = 0, written = 0;
};

struct Region {
  uintptr_t begin, end;
  bool writable;
  Count* count;
  int granule_shift;  // as fine as any access so far needed, see shadow.h
};

std::deque<Region>& watched_regions();
// "name read written", line by line.
std::string describe_counts();
void reset_counts();

}  // namespace emulator
