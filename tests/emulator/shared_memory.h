// A block's shared arrays: each a piece of the heap of its own, between red zones.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

struct Block;

class SharedArray {
 public:
  SharedArray(size_t offset, size_t bytes, const char* name);
  void free();

  char* begin() const;
  bool holds(const void* p, size_t bytes) const;
  // As a new block finds it: NaN, not carved yet.
  void restart();
  // Nobody may look at it until it restarts.
  void hide();

  // For the bytes that a copy writes, until a thread has waited for it: false where another copy
  // writes some of them.
  bool claim(const void* to, size_t bytes);
  void let_go(const void* to, size_t bytes);

  size_t offset, bytes;
  const char* name;
  bool carved = true;  // by the block that runs

 private:
  char* allocation_;
  std::vector<bool> claimed_;  // 16 bytes each
};

using SharedMemory = std::vector<SharedArray>;

void restart_shared_memory(SharedMemory& arrays);
void hide_shared_memory(SharedMemory& arrays);
void free_shared_memory(SharedMemory& arrays);

// The array of this block that holds these bytes, or null.
SharedArray* find_array(Block& block, const void* p, size_t bytes);

}  // namespace emulator
