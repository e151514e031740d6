#include "ready.h"

namespace emulator {

void ReadySet::seed(uint64_t value) {
  random_.seed(static_cast<unsigned>(value * 104729 + 1));
  last_warp_ = 0;
}

void ReadyBlocks::restart(int blocks) {
  blocks_ = blocks;
  last_block_ = 0;
  words_.assign(word_of(blocks - 1) + 1, 0);
}

void ReadyBlocks::seed(uint64_t value) {
  random_.seed(static_cast<unsigned>(value * 15485863 + 1));
}

int ReadyBlocks::first_from(int block) const {
  uint64_t word = words_[word_of(block)] & ~uint64_t{0} << block % kWordBits;
  for (size_t i = word_of(block);;) {
    if (word) return static_cast<int>(i) * kWordBits + __builtin_ctzll(word);
    if (++i == words_.size()) return -1;
    word = words_[i];
  }
}

int ReadyBlocks::last() const {
  for (size_t i = words_.size(); i-- > 0;)
    if (words_[i]) return static_cast<int>(i) * kWordBits + 63 - __builtin_clzll(words_[i]);
  return -1;
}

// Mostly the same block, so that blocks drift apart.
int ReadyBlocks::random() {
  if (words_[word_of(last_block_)] & bit(last_block_) && !by_chance(16)) return last_block_;
  const int found = first_from(static_cast<int>(random_below(static_cast<unsigned>(blocks_))));
  return last_block_ = found < 0 ? first_from(0) : found;
}

int ReadyBlocks::choose(Order order) {
  if (order == Order::kAscending) return first_from(0);
  if (order == Order::kDescending) return last();
  const int found = random();
  if (found < 0) last_block_ = 0;
  return found;
}

}  // namespace emulator
