// Where memory lies that the race build watches: regions of global memory, shared arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "access.h"

namespace emulator {

struct Block;

inline bool inside(uintptr_t begin, uintptr_t end, const Access& access) {
  return begin <= access.address && access.address + access.bytes <= end;
}

// The span found last for each page's hash: kernels walk several arrays at once.
constexpr size_t kCachedSpans = 64;
extern Span* cached_spans[kCachedSpans];
Span* find_other_span(const Access& access);

// Null where there is nothing to check: memory of the thread alone. Reports what lies nowhere.
inline Span* find_span(const Access& access) {
  Span* const cached = cached_spans[access.address / 4096 % kCachedSpans];
  return inside(cached->begin, cached->end, access) ? cached : find_other_span(access);
}

// As find_span, but it must be global memory.
Span* find_source(const Access& access);
[[noreturn]] void report_out_of_bounds(const Access& access);
const char* verb(const Access& access);

uint32_t code_offset(const void* code);

// Threads with serial numbers up to `floor` are of another launch or gang.
void start_launch_spans(uint32_t floor);
void start_gang_spans(uint32_t floor);
void add_shared_span(const Block& block, const void* begin, size_t bytes, const char* name);
const std::deque<Span>& all_shared_spans();

}  // namespace emulator
