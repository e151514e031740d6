// Shared arrays: each a piece of the heap of its own, between red zones, poisoned for every block.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "races.h"
#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

namespace {

constexpr size_t kRedZone = 128;

// At least one red zone behind, as a multiple of the alignment.
size_t allocated_bytes(size_t bytes) {
  return kRedZone + (bytes + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
}

class SharedArray {
 public:
  SharedArray(size_t offset, size_t bytes, const char* name)
      : offset(offset),
        bytes(bytes),
        name(name),
        allocation_(static_cast<char*>(std::aligned_alloc(kRedZone, allocated_bytes(bytes)))) {
    if (!allocation_) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(allocation_, kRedZone);
    ASAN_POISON_MEMORY_REGION(begin() + bytes, allocated_bytes(bytes) - kRedZone - bytes);
#endif
    poison();
    races::add_shared_array(begin(), bytes, name);
  }

  void free() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(allocation_, allocated_bytes(bytes));
#endif
    std::free(allocation_);
  }

  char* begin() const { return allocation_ + kRedZone; }
  void poison() { std::memset(begin(), 0xff, bytes); }

  size_t offset, bytes;
  const char* name;

 private:
  char* allocation_;
};

std::vector<SharedArray> arrays;  // of the launch

std::string describe(size_t offset, size_t bytes, const char* name) {
  return std::string("shared array `") + name + "` (" + std::to_string(bytes) +
         " bytes at offset " + std::to_string(offset) + ")";
}

void check_new_array(size_t offset, size_t bytes, const char* name) {
  const size_t launched = machine.launch->shared_bytes;
  if (offset + bytes > launched)
    fail({describe(offset, bytes, name) + " does not fit in the " + std::to_string(launched) +
          " bytes that the launch asked for"});
  for (const SharedArray& other : arrays)
    if (offset < other.offset + other.bytes && other.offset < offset + bytes)
      fail({describe(offset, bytes, name) + " overlaps the " +
            describe(other.offset, other.bytes, other.name)});
}

}  // namespace

unsigned char* dynamic_shared_memory() {
  static unsigned char base;
  return &base;
}

void* shared_array(size_t offset, size_t bytes, const char* name) {
  for (const SharedArray& array : arrays)
    if (array.offset == offset && array.bytes == bytes) return array.begin();
  check_new_array(offset, bytes, name);
  return arrays.emplace_back(offset, bytes, name).begin();
}

void poison_shared_memory() {
  for (SharedArray& array : arrays) array.poison();
}

void end_shared_memory() {
  for (SharedArray& array : arrays) array.free();
  arrays.clear();
}

}  // namespace emulator
