// What the race detector remembers of memory: for every few bytes, who wrote and read them last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "regions.h"

namespace emulator {

struct Block;

// An access in the past. Threads, and mbarriers for the copies that end in them, have serial
// numbers in the order in which their blocks run, over all launches; 0 is nobody.
struct Moment {
  uint32_t thread;
  uint32_t epoch;      // see clocks.h
  uint32_t code : 31;  // offset of the instruction in its library
  uint32_t atomic : 1;
};

// Two readers suffice in practice: one of them is another thread than the next writer's.
struct Cell {
  Moment write;
  Moment reads[2];
};

// One cell stands for 2^shift bytes. Every span starts coarse and is refined when an access is
// smaller, so that vector accesses stay cheap.
constexpr int kCoarsestGranuleShift = 4;

// Bytes without a gap that share cells: a shared array, or regions that overlap.
struct Span {
  uintptr_t begin, end;
  std::string name;
  bool shared;
  const Block* block;            // of a shared array
  bool read_elsewhere;           // by other blocks
  std::vector<Region*> regions;  // of global memory
  uint32_t floor;  // moments of threads up to this one are of an earlier launch or gang
  int granule_shift;
  bool touched;
  Cell* cells;

  uintptr_t origin() const { return begin & ~((uintptr_t{1} << kCoarsestGranuleShift) - 1); }
  size_t cell_count() const { return ((end - 1 - origin()) >> granule_shift) + 1; }
};

// Cells come from one arena, taken anew by every launch. They are never cleared: serial numbers
// below a span's floor tell that what they say is old.
void restart_shadow();
void allocate_cells(Span* span);
// Makes granules as small as an access of `bytes` at `address` needs.
void refine_cells(Span* span, uintptr_t address, size_t bytes);
// Before serial numbers start over.
void forget_shadow();

}  // namespace emulator
