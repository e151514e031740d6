// Looks at every load and store of a kernel: g++ -fsanitize=thread puts a call before each, and
// here are the functions called. Checks bounds, counts bytes, hands on to the race detector.
#include "access.h"

#include <link.h>

#include <algorithm>
#include <deque>
#include <string>
#include <vector>

#include "clocks.h"
#include "races.h"
#include "scheduler.h"

namespace emulator {

namespace {

// Addresses of this library as it is loaded: constants, and globals like threadIdx.
struct Library {
  uintptr_t begin, end;
};

Library find_library() {
  Library library{0, 0};
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    uintptr_t begin = UINTPTR_MAX, end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      begin = std::min(begin, info->dlpi_addr + segment.p_vaddr);
      end = std::max(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
    }
    const uintptr_t inside = reinterpret_cast<uintptr_t>(&find_library);
    if (inside < begin || inside >= end) return 0;
    *static_cast<Library*>(result) = {begin, end};
    return 1;
  };
  dl_iterate_phdr(visit, &library);
  return library;
}

const Library library = find_library();

std::vector<Span> global_spans;  // sorted; no two overlap
std::deque<Span> shared_spans;
std::vector<uint32_t> executed;  // numbers of blocks, in the order in which they run

// The span found last for each page's hash: kernels walk several arrays at once.
constexpr size_t kCachedSpans = 64;
Span no_span = {};
Span* cached_spans[kCachedSpans];

void merge_regions_into_spans() {
  std::vector<Region*> regions;
  for (Region& region : watched_regions()) regions.push_back(&region);
  std::stable_sort(regions.begin(), regions.end(),
                   [](const Region* a, const Region* b) { return a->begin < b->begin; });
  global_spans.clear();
  for (Region* region : regions) {
    if (global_spans.empty() || region->begin >= global_spans.back().end) {
      global_spans.emplace_back();
      global_spans.back().begin = region->begin;
      global_spans.back().name = region->count->name;
      global_spans.back().granule_shift = kCoarsestGranuleShift;
    }
    Span& span = global_spans.back();
    span.end = std::max(span.end, region->end);
    span.granule_shift = std::min(span.granule_shift, region->granule_shift);
  }
  // Of overlapping regions, those that were watched first come first.
  for (Span& span : global_spans)
    for (Region& region : watched_regions())
      if (region.begin >= span.begin && region.end <= span.end) span.regions.push_back(&region);
}

bool inside(uintptr_t begin, uintptr_t end, const Access& access) {
  return begin <= access.address && access.address + access.bytes <= end;
}

bool inside(const void* begin, size_t bytes, const Access& access) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  return inside(address, address + bytes, access);
}

// The thread's own stack, and for reading the kernel's parameters and the library's constants.
bool is_private(const Access& access) {
  const Context& stack = machine.current->fiber->context;
  if (inside(stack.begin, stack.bytes, access)) return true;
  if (access.kind != Access::kRead) return false;
  return inside(library.begin, library.end, access) ||
         inside(machine.launch->arguments, machine.launch->argument_bytes, access);
}

const char* verb(const Access& access) {
  constexpr const char* kVerbs[] = {"read", "write", "atomic"};
  return kVerbs[access.kind];
}

uintptr_t distance(uintptr_t begin, uintptr_t end, uintptr_t address) {
  return address < begin ? begin - address : address >= end ? address - end : 0;
}

[[noreturn]] void report_out_of_bounds(const Access& access) {
  std::string text = std::string("out of bounds: ") + verb(access) + " of " +
                     std::to_string(access.bytes) + " bytes";
  struct Neighbour {
    std::string name;
    uintptr_t begin, end;
  };
  std::vector<Neighbour> neighbours;
  for (const Span& span : shared_spans) neighbours.push_back({span.name, span.begin, span.end});
  for (const Region& region : watched_regions())
    neighbours.push_back({region.count->name, region.begin, region.end});
  const auto nearest = std::min_element(
      neighbours.begin(), neighbours.end(), [&](const Neighbour& a, const Neighbour& b) {
        return distance(a.begin, a.end, access.address) < distance(b.begin, b.end, access.address);
      });
  if (nearest == neighbours.end()) {
    text += ", and no memory is watched";
  } else if (access.address < nearest->begin) {
    text += ", " + std::to_string(nearest->begin - access.address) + " before the start of `" +
            nearest->name + "`";
  } else {
    text += " at `" + nearest->name + "` + " + std::to_string(access.address - nearest->begin) +
            ", which has " + std::to_string(nearest->end - nearest->begin);
  }
  fail({text, code_address(access.code)});
}

Span* search_span(const Access& access) {
  const auto behind =
      std::upper_bound(global_spans.begin(), global_spans.end(), access.address,
                       [](uintptr_t address, const Span& span) { return address < span.begin; });
  if (behind != global_spans.begin() && inside(behind[-1].begin, behind[-1].end, access))
    return &behind[-1];
  for (Span& span : shared_spans)
    if (inside(span.begin, span.end, access)) return &span;
  return nullptr;
}

// Null where there is nothing to check.
Span* find_span(const Access& access) {
  Span*& cached = cached_spans[access.address / 4096 % kCachedSpans];
  if (inside(cached->begin, cached->end, access)) return cached;
  if (is_private(access)) return nullptr;
  Span* const span = search_span(access);
  if (!span) report_out_of_bounds(access);
  return cached = span;
}

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
  if (access.kind != Access::kWrite) region->count->read += access.bytes;
  if (access.kind != Access::kRead) region->count->written += access.bytes;
}

void check_access(const void* p, size_t bytes, Access::Kind kind, const void* code) {
  if (!machine.current) return;  // the host's own
  const Access access{reinterpret_cast<uintptr_t>(p), bytes, kind,
                      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - library.begin)};
  Span* const span = find_span(access);
  if (!span) return;
  if (!span->shared) count_bytes(*span, access);
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

const void* code_address(uint32_t code) {
  return reinterpret_cast<const void*>(library.begin + code);
}

uint64_t executed_block(uint64_t position) { return executed[position]; }

namespace races {

void start_launch(const Launch& launch) {
  restart_shadow();
  forget_reported_races();
  merge_regions_into_spans();
  const uint32_t floor = start_launch_clocks(launch);
  for (Span& span : global_spans) {
    span.floor = floor;
    allocate_cells(&span);
  }
  shared_spans.clear();
  executed.clear();
  std::fill(std::begin(cached_spans), std::end(cached_spans), &no_span);
}

void start_block(uint64_t number) {
  start_block_clocks(executed.size());
  executed.push_back(static_cast<uint32_t>(number));
  for (Span& span : shared_spans) span.floor = block_time.first_thread - 1;
}

void add_shared_array(const void* begin, size_t bytes, const char* name) {
  if (!bytes) return;
  Span& span = shared_spans.emplace_back();
  span.begin = reinterpret_cast<uintptr_t>(begin);
  span.end = span.begin + bytes;
  span.name = name;
  span.shared = true;
  span.floor = block_time.first_thread - 1;
  span.granule_shift = kCoarsestGranuleShift;
  allocate_cells(&span);
}

void block_barrier() { block_barrier_clocks(); }
void warp_barrier(int warp, unsigned lanes) { warp_barrier_clocks(warp, lanes); }
void fence() { fence_clocks(); }

void atomic(const void* p, size_t bytes, const void* code) {
  atomic_clocks(p);
  check_access(p, bytes, Access::kAtomic, code);
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
