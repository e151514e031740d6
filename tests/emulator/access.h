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
// Nothing that threads did there may be left to another proxy than a bulk copy's.
void check_proxies(const Span& span, const Access& access);
// A block's exit must come after all that others read of this array of it.
void check_exit(const Span& span);
// The last access to these bytes becomes that of another thread and epoch, where it was `before`'s.
void replace_moments(Span& span, const Access& access, const Moment& before, const Moment& moment);
void forget_reported_races();

// access.cpp: the region that allows it, else one that holds it, else null.
Region* region_of(const Span& span, const Access& access);
const void* code_address(uint32_t code);
// The number of the block that ran as number `position` of the launch.
uint64_t executed_block(uint64_t position);

}  // namespace emulator
