// One access of a kernel to memory, as the race build sees it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shadow.h"

namespace emulator {

struct Access {
  enum Kind { kRead, kWrite, kAtomic };

  uintptr_t address;
  size_t bytes;
  Kind kind;
  uint32_t code;  // offset in its library of the instruction behind it
};

// races.cpp
void check_races(Span& span, const Access& access);
void forget_reported_races();

// access.cpp: the region that allows it, else one that holds it, else null.
Region* region_of(const Span& span, const Access& access);
const void* code_address(uint32_t code);
// The number of the block that ran as number `position` of the launch.
uint64_t executed_block(uint64_t position);

}  // namespace emulator
