// Who can run: of each block its warps and lanes, and of all blocks those that have any.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kWarpLanes = 32;
constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kWarpLanes;

// Threads of a block that can run: which warps, and of each which lanes.
class ReadySet {
 public:
  void clear() { warps_ = 0; }
  bool empty() const { return !warps_; }
  void add(int warp, unsigned lanes);
  // So that a launch depends on nothing before it.
  void seed(uint64_t value);
  // The next thread's number as the order wants it; takes it out. There must be one.
  int take(Order order);

 private:
  int choose_warp(Order order);
  int choose_lane(Order order, unsigned lanes);

  uint32_t warps_ = 0;
  uint32_t lanes_[kMostWarps] = {};
  int last_warp_ = 0;
  std::minstd_rand random_;
};

// Blocks of which some thread can run.
class ReadyBlocks {
 public:
  // Room for so many blocks, none of which is ready.
  void restart(int blocks);
  void seed(uint64_t value);
  void add(int block) { words_[word_of(block)] |= bit(block); }
  void remove(int block) { words_[word_of(block)] &= ~bit(block); }
  // The block that runs next as the order wants it, or -1; leaves it in.
  int choose(Order order);
  // True once in `times`, by chance.
  bool by_chance(unsigned times) { return random_() % times == 0; }
  unsigned random_below(unsigned end) { return static_cast<unsigned>(random_() % end); }

 private:
  static constexpr int kWordBits = 64;
  static uint64_t bit(int block) { return uint64_t{1} << block % kWordBits; }
  static size_t word_of(int block) { return static_cast<size_t>(block) / kWordBits; }
  int first_from(int block) const;
  int last() const;
  int random();

  int blocks_ = 0;
  int last_block_ = 0;
  std::vector<uint64_t> words_;
  std::minstd_rand random_;
};

// ---- every switch between threads goes through these --------------------------------------------

inline void ReadySet::add(int warp, unsigned lanes) {
  if (!(warps_ >> warp & 1)) lanes_[warp] = 0;
  lanes_[warp] |= lanes;
  warps_ |= 1u << warp;
}

inline int ReadySet::choose_warp(Order order) {
  if (order == Order::kAscending) return __builtin_ctz(warps_);
  if (order == Order::kDescending) return 31 - __builtin_clz(warps_);
  // Mostly goes on with the same warp, so that warps drift apart.
  if (warps_ >> last_warp_ & 1 && random_() % 8) return last_warp_;
  const uint32_t from = warps_ & ~0u << random_() % kMostWarps;
  return __builtin_ctz(from ? from : warps_);
}

inline int ReadySet::choose_lane(Order order, unsigned lanes) {
  if (order == Order::kAscending) return __builtin_ctz(lanes);
  if (order == Order::kDescending) return 31 - __builtin_clz(lanes);
  const unsigned from = lanes & ~0u << random_() % kWarpLanes;
  return __builtin_ctz(from ? from : lanes);
}

inline int ReadySet::take(Order order) {
  const int warp = last_warp_ = choose_warp(order);
  const int lane = choose_lane(order, lanes_[warp]);
  lanes_[warp] &= ~(1u << lane);
  if (!lanes_[warp]) warps_ &= ~(1u << warp);
  return warp * kWarpLanes + lane;
}

}  // namespace emulator
