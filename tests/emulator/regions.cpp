#include "regions.h"

#include "emulator.h"
#include "shadow.h"

namespace emulator {

namespace {

std::deque<Count> counts;  // whose addresses regions keep

Count* count_of(const std::string& name) {
  for (Count& count : counts)
    if (count.name == name) return &count;
  counts.push_back({name});
  return &counts.back();
}

}  // namespace

std::deque<Region>& watched_regions() {
  static std::deque<Region> regions;
  return regions;
}

void watch(const void* begin, size_t bytes, const char* name, bool writable) {
  if (!bytes) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  watched_regions().push_back(
      {address, address + bytes, writable, count_of(name), kCoarsestGranuleShift});
}

void unwatch_all() { watched_regions().clear(); }

std::string describe_counts() {
  std::string text;
  for (const Count& count : counts)
    if (count.read || count.written)
      text += count.name + " " + std::to_string(count.read) + " " + std::to_string(count.written) +
              "\n";
  return text;
}

void reset_counts() {
  for (Count& count : counts) count.read = count.written = 0;
}

}  // namespace emulator
