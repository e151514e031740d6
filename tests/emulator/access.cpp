// Looks at every load and store of a kernel: g++ -fsanitize=thread puts a call before each, and
// here are the functions called. Checks bounds, counts bytes, hands on to the race detector.
#include "access.h"

#include <string>
#include <vector>

#include "clocks.h"
#include "races.h"
#include "scheduler.h"
#include "spans.h"

namespace emulator {

namespace {

std::vector<uint32_t> executed;  // numbers of blocks, in the order in which they run

bool allows(const Region& region, const Access& access) {
  return access.kind == Access::kRead || region.writable;
}

void count_bytes(const Span& span, const Access& access) {
  Region* const region = span.regions.size() == 1 ? span.regions[0] : region_of(span, access);
  if (!region) report_out_of_bounds(access);
  if (!allows(*region, access))
    fail({std::string(verb(access)) + " of `" + region->count->name + "` + " +
              std::to_string(access.address - region->begin) + ", which is read-only",
          code_address(access.code)});
  if (region->writable && machine.launch->overlaps && !machine.current->after_previous)
    fail({std::string(verb(access)) + " of `" + region->count->name +
              "` before the wait for the launch before",
          code_address(access.code)});
  if (access.kind != Access::kWrite) region->count->read += access.bytes;
  if (access.kind != Access::kRead) region->count->written += access.bytes;
}

// Shared memory of another block.
void check_elsewhere(Span& span, const Access& access) {
  const auto refuse = [&](const char* why) {
    fail({std::string(verb(access)) + " of `" + span.name + "` of block " +
              describe_index(span.block->index) + why,
          code_address(access.code)});
  };
  if (span.block->cluster != machine.block->cluster)
    refuse(", which is in no cluster with this one");
  if (!span.block->live) refuse(": the shared memory of an exited block");
  span.read_elsewhere = true;
}

Access access_of(const void* p, size_t bytes, Access::Kind kind, const void* code) {
  return {reinterpret_cast<uintptr_t>(p), bytes, kind, code_offset(code)};
}

void check_access(const void* p, size_t bytes, Access::Kind kind, const void* code) {
  if (!machine.current) return;  // the host's own
  const Access access = access_of(p, bytes, kind, code);
  Span* const span = find_span(access);
  if (!span) return;
  if (!span->shared)
    count_bytes(*span, access);
  else if (span->block != machine.block)
    check_elsewhere(*span, access);
  check_races(*span, access);
}

// The compiler took the address to be aligned, and may have chosen instructions that need it.
template <size_t bytes>
void check_aligned_access(const void* p, Access::Kind kind, const void* code) {
  constexpr size_t kAlignment = bytes < 8 ? bytes : 8;
  if (machine.current && reinterpret_cast<uintptr_t>(p) % kAlignment)
    fail({"misaligned access of " + std::to_string(bytes) + " bytes", code});
  check_access(p, bytes, kind, code);
}

}  // namespace

Region* region_of(const Span& span, const Access& access) {
  Region* found = nullptr;
  for (Region* region : span.regions) {
    if (!inside(region->begin, region->end, access)) continue;
    if (allows(*region, access)) return region;
    if (!found) found = region;
  }
  return found;
}

uint64_t executed_block(uint64_t position) { return executed[position]; }

namespace races {

void start_launch(const Launch& launch) {
  restart_shadow();
  forget_reported_races();
  start_launch_spans(start_launch_clocks(launch));
  executed.clear();
}

void start_gang(int blocks, uint64_t first) {
  start_gang_spans(start_gang_clocks(blocks, executed.size()));
  for (uint64_t number = first; number < first + static_cast<uint64_t>(blocks); ++number)
    executed.push_back(static_cast<uint32_t>(number));
}

void enter_block(int slot) { enter_block_clocks(slot); }

void end_block(const Block& block) {
  block_barrier_clocks();
  for (const Span& span : all_shared_spans())
    if (span.block == &block && span.read_elsewhere) check_exit(span);
}

void add_shared_array(const Block& block, const void* begin, size_t bytes, const char* name) {
  if (bytes) add_shared_span(block, begin, bytes, name);
}

void block_barrier() { block_barrier_clocks(); }
void team_barrier(int first_slot, int blocks) { team_barrier_clocks(first_slot, blocks); }
void warp_barrier(int warp, unsigned lanes) { warp_barrier_clocks(warp, lanes); }
void fence() { fence_clocks(); }
void proxy_fence() { hand_over_clocks(); }

void atomic(const void* p, size_t bytes, const void* code) {
  atomic_clocks(p);
  check_access(p, bytes, Access::kAtomic, code);
}

void init_barrier(const void* object, const void* code) {
  check_access(object, sizeof(uint64_t), Access::kWrite, code);
}
// Only its initialisation has to come before; uses may come in any order.
void use_barrier(const void* object, const void* code) {
  check_access(object, sizeof(uint64_t), Access::kRead, code);
}

void arrive(const CopyBarrier& barrier) { arrive_clocks(barrier); }
void end_phase(const CopyBarrier& barrier) { end_phase_clocks(barrier); }
void wait(const CopyBarrier& barrier) { wait_clocks(barrier); }

// The thread that starts it must be allowed to do what it does; who else may follow only behind it.
void copy(const void* to, const void* from, size_t bytes, const CopyBarrier* barrier,
          const void* code) {
  const Access read = access_of(from, bytes, Access::kRead, code);
  const Access write = access_of(to, bytes, Access::kWrite, code);
  Span* const source = find_source(read);
  count_bytes(*source, read);
  const Moment moment = moment_of_copy(barrier, read.code);
  check_races(*source, read);
  replace_moments(*source, read, {current_serial(), current_epoch(), 0, 0}, moment);
  Span* const target = find_span(write);
  if (barrier) check_proxies(*target, write);
  check_races(*target, write);
  replace_moments(*target, write, {current_serial(), current_epoch(), 0, 0}, moment);
}

void bind_copy(const void* to, const void* from, size_t bytes, const CopyBarrier& barrier) {
  const Access read = access_of(from, bytes, Access::kRead, nullptr);
  const Access write = access_of(to, bytes, Access::kWrite, nullptr);
  const Moment before = moment_of_copy(nullptr, 0), moment = moment_of_copy(&barrier, 0);
  replace_moments(*find_span(read), read, before, moment);
  replace_moments(*find_span(write), write, before, moment);
}

void prefetch(const void* from, size_t bytes, const void* code) {
  find_source(access_of(from, bytes, Access::kRead, code));
}

}  // namespace races

}  // namespace emulator

// ---- what instrumented code calls ---------------------------------------------------------------

using emulator::Access;

#define EMULATOR_SIZED_ACCESS(bytes)                                                       \
  void __tsan_read##bytes(void* p) {                                                       \
    emulator::check_aligned_access<bytes>(p, Access::kRead, __builtin_return_address(0));  \
  }                                                                                        \
  void __tsan_write##bytes(void* p) {                                                      \
    emulator::check_aligned_access<bytes>(p, Access::kWrite, __builtin_return_address(0)); \
  }                                                                                        \
  void __tsan_unaligned_read##bytes(void* p) {                                             \
    emulator::check_access(p, bytes, Access::kRead, __builtin_return_address(0));          \
  }                                                                                        \
  void __tsan_unaligned_write##bytes(void* p) {                                            \
    emulator::check_access(p, bytes, Access::kWrite, __builtin_return_address(0));         \
  }

extern "C" {
EMULATOR_SIZED_ACCESS(1)
EMULATOR_SIZED_ACCESS(2)
EMULATOR_SIZED_ACCESS(4)
EMULATOR_SIZED_ACCESS(8)
EMULATOR_SIZED_ACCESS(16)

void __tsan_read_range(void* p, size_t bytes) {
  emulator::check_access(p, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  emulator::check_access(p, bytes, Access::kWrite, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// The guard of a function's static variable.
char __tsan_atomic8_load(const char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
}
