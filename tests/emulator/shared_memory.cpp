#include "shared_memory.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "races.h"
#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

namespace {

constexpr size_t kRedZone = 128;
constexpr size_t kCopyGranule = 16;

// At least one red zone behind, as a multiple of the alignment.
size_t allocated_bytes(size_t bytes) {
  return kRedZone + (bytes + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
}

std::string describe(size_t offset, size_t bytes, const char* name) {
  return std::string("shared array `") + name + "` (" + std::to_string(bytes) +
         " bytes at offset " + std::to_string(offset) + ")";
}

void check_new_array(size_t offset, size_t bytes, const char* name) {
  const size_t launched = machine.launch->shared_bytes;
  if (offset + bytes > launched)
    fail({describe(offset, bytes, name) + " does not fit in the " + std::to_string(launched) +
          " bytes that the launch asked for"});
  for (const SharedArray& other : machine.block->shared)
    if (offset < other.offset + other.bytes && other.offset < offset + bytes)
      fail({describe(offset, bytes, name) + " overlaps the " +
            describe(other.offset, other.bytes, other.name)});
}

}  // namespace

SharedArray::SharedArray(size_t offset, size_t bytes, const char* name)
    : offset(offset),
      bytes(bytes),
      name(name),
      allocation_(static_cast<char*>(std::aligned_alloc(kRedZone, allocated_bytes(bytes)))) {
  if (!allocation_) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(allocation_, kRedZone);
  ASAN_POISON_MEMORY_REGION(begin() + bytes, allocated_bytes(bytes) - kRedZone - bytes);
#endif
  std::memset(begin(), 0xff, bytes);
  races::add_shared_array(*machine.block, begin(), bytes, name);
}

void SharedArray::free() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(allocation_, allocated_bytes(bytes));
#endif
  std::free(allocation_);
}

char* SharedArray::begin() const { return allocation_ + kRedZone; }

bool SharedArray::holds(const void* p, size_t size) const {
  const char* const from = static_cast<const char*>(p);
  return begin() <= from && from + size <= begin() + bytes;
}

void SharedArray::restart() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(begin(), bytes);
#endif
  std::memset(begin(), 0xff, bytes);
  carved = false;
}

void SharedArray::hide() {
  std::memset(begin(), 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(begin(), bytes);
#endif
}

bool SharedArray::claim(const void* to, size_t size) {
  claimed_.resize((bytes + kCopyGranule - 1) / kCopyGranule);
  const size_t first = static_cast<size_t>(static_cast<const char*>(to) - begin()) / kCopyGranule;
  for (size_t i = first; i < first + size / kCopyGranule; ++i) {
    if (claimed_[i]) return false;
    claimed_[i] = true;
  }
  return true;
}

void SharedArray::let_go(const void* to, size_t size) {
  const size_t first = static_cast<size_t>(static_cast<const char*>(to) - begin()) / kCopyGranule;
  for (size_t i = first; i < first + size / kCopyGranule; ++i) claimed_[i] = false;
}

void restart_shared_memory(SharedMemory& arrays) {
  for (SharedArray& array : arrays) array.restart();
}

void hide_shared_memory(SharedMemory& arrays) {
  for (SharedArray& array : arrays) array.hide();
}

void free_shared_memory(SharedMemory& arrays) {
  for (SharedArray& array : arrays) array.free();
  arrays.clear();
}

SharedArray* find_array(Block& block, const void* p, size_t bytes) {
  for (SharedArray& array : block.shared)
    if (array.carved && array.holds(p, bytes)) return &array;
  return nullptr;
}

unsigned char* dynamic_shared_memory() {
  static unsigned char base;
  return &base;
}

void* shared_array(size_t offset, size_t bytes, const char* name) {
  SharedMemory& arrays = machine.block->shared;
  for (SharedArray& array : arrays)
    if (array.offset == offset && array.bytes == bytes) {
      array.carved = true;
      return array.begin();
    }
  check_new_array(offset, bytes, name);
  return arrays.emplace_back(offset, bytes, name).begin();
}

}  // namespace emulator
