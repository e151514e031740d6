#include "spans.h"

#include <link.h>

#include <algorithm>
#include <deque>
#include <string>

#include "scheduler.h"

namespace emulator {

Span* cached_spans[kCachedSpans];

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
std::vector<Span*> sorted_shared_spans;
uint32_t gang_floor = 0;  // serial numbers up to this one are of threads before

Span no_span = {};

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

uintptr_t distance(uintptr_t begin, uintptr_t end, uintptr_t address) {
  return address < begin ? begin - address : address >= end ? address - end : 0;
}

Span* search_span(const Access& access) {
  const auto behind =
      std::upper_bound(global_spans.begin(), global_spans.end(), access.address,
                       [](uintptr_t address, const Span& span) { return address < span.begin; });
  if (behind != global_spans.begin() && inside(behind[-1].begin, behind[-1].end, access))
    return &behind[-1];
  const auto shared =
      std::upper_bound(sorted_shared_spans.begin(), sorted_shared_spans.end(), access.address,
                       [](uintptr_t address, const Span* span) { return address < span->begin; });
  if (shared != sorted_shared_spans.begin() && inside(shared[-1]->begin, shared[-1]->end, access))
    return shared[-1];
  return nullptr;
}

}  // namespace

const char* verb(const Access& access) {
  constexpr const char* kVerbs[] = {"read", "write", "atomic"};
  return kVerbs[access.kind];
}

void report_out_of_bounds(const Access& access) {
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

Span* find_other_span(const Access& access) {
  if (is_private(access)) return nullptr;
  Span* const span = search_span(access);
  if (!span) report_out_of_bounds(access);
  return cached_spans[access.address / 4096 % kCachedSpans] = span;
}

Span* find_source(const Access& access) {
  Span* const span = is_private(access) ? nullptr : find_span(access);
  if (!span || span->shared) report_out_of_bounds(access);
  return span;
}

uint32_t code_offset(const void* code) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - library.begin);
}

const void* code_address(uint32_t code) {
  return reinterpret_cast<const void*>(library.begin + code);
}

void start_launch_spans(uint32_t floor) {
  merge_regions_into_spans();
  for (Span& span : global_spans) {
    span.floor = floor;
    allocate_cells(&span);
  }
  shared_spans.clear();
  sorted_shared_spans.clear();
  std::fill(std::begin(cached_spans), std::end(cached_spans), &no_span);
}

void start_gang_spans(uint32_t floor) {
  gang_floor = floor;
  for (Span& span : shared_spans) {
    span.floor = floor;
    span.read_elsewhere = false;
  }
}

void add_shared_span(const Block& block, const void* begin, size_t bytes, const char* name) {
  Span& span = shared_spans.emplace_back();
  span.begin = reinterpret_cast<uintptr_t>(begin);
  span.end = span.begin + bytes;
  span.name = name;
  span.shared = true;
  span.block = &block;
  span.floor = gang_floor;
  span.granule_shift = kCoarsestGranuleShift;
  allocate_cells(&span);
  const auto behind =
      std::upper_bound(sorted_shared_spans.begin(), sorted_shared_spans.end(), &span,
                       [](const Span* a, const Span* b) { return a->begin < b->begin; });
  sorted_shared_spans.insert(behind, &span);
}

const std::deque<Span>& all_shared_spans() { return shared_spans; }

}  // namespace emulator
