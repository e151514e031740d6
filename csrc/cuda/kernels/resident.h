// What both resident kernels are handed: how a team of blocks holds samples on the chip, each block
// a slice of the channels or of the pixels, from the first read of x to the last write.
#pragma once

#include "../primitives/async_copy.cuh"
#include "kernels.h"

namespace cbam::cuda {

// Samples of a visit, at most: they share one reading of the MLP's weights.
constexpr int kMostVisited = 8;

// Sums of a thread that are added up with those of others at a time.
constexpr int kMostAside = 2;

// How x, and dout in a backward, come to shared memory.
enum class Copy {
  kPlain,  // through registers
  kAsync,  // 16 bytes at a time by every thread, from compute capability 8.0 on
  kBulk,   // in long pieces by the copy engine, from 9.0 on
};

// What of a sample a block of a team holds.
enum class Split {
  kChannels,  // all pixels of some channels: the team merges the maps
  kPixels,    // some pixels of all channels: the team merges the pools
};

struct ResidentGeometry {
  bool cluster;  // blocks of a team are a cluster; else all blocks run at once and exchange through
                 // global memory
  int team;      // blocks that hold the samples of a visit together
  int threads;   // of a block: all of a multiprocessor's, or half of them
  int64_t teams;  // each of which visits every teams-th group of samples
  int samples;    // of a visit; 1 where blocks hold pixels
  Split split;
  int channels;       // whose gates a block makes, at most; some make those of a group fewer
  int channel_group;  // what blocks are given at a time; if they hold it, whole vectors
  int held_channels;  // that a block holds, at most: those, or all
  int pixels;         // that a block holds, at most; all where it holds channels
  int pixel_group;    // as channel_group, where blocks hold pixels
  int rows, pitch;    // of a slice of one sample: channels of pixels, or pixels of channels
  int chunk;          // rows that are loaded together
  int chunks;         // of a slice
  int lanes;          // threads that share a row where sums run along rows
  int groups;         // and a column where they run down columns
  Copy copy;
  BoxGeometry boxes;   // what the convolution is computed in; boxes go round the blocks of the team
  int boxes_each;      // boxes of a visit that a block takes, at most
  int weight_bytes;    // of a weight of the MLP, where those of a block's channels stay on the chip
                       // for all visits; else 0
  bool shares_units;   // a block adds up the team's sums of some hidden units for all blocks; else
                       // of all units for itself
  bool fetches_ahead;  // brings the next visit's tensors, but for an x that is read twice, to the
                       // second-level cache once its own are pooled or have been walked through
  int64_t exchange;  // bytes that a block puts out for the others in global memory; 0 in a cluster

  // The samples that the MLP's sums are made for; what belongs to absent ones is zero.
  CBAM_INLINE_MEMBER int mlp_samples() const { return samples == 1 ? 1 : kMostVisited; }
  // Values of hidden units that a block adds up for the others, so many of a unit.
  CBAM_INLINE_MEMBER int64_t shared_values(int units, int each) const {
    return shares_units ? int64_t{each} * ((units + team - 1) / team) : 0;
  }
  // Bytes of global memory through which all teams exchange: a line in which each counts its
  // blocks, then what every block puts out.
  CBAM_INLINE_MEMBER int64_t counts() const { return teams * kLineBytes; }
  CBAM_INLINE_MEMBER int64_t exchanged() const {
    return cluster ? 0 : counts() + teams * team * exchange;
  }
};

// What is the same in both directions.
struct Resident {
  int64_t samples;
  int channels, hidden;
  Space space;
  Matrix x;
  Weights weights;
  Saved saved;     // written by the forward, all null in inference; read by the backward
  char* exchange;  // geometry.exchanged() bytes, or null
  SharedLayout layout;
};

// How the blocks of a team share what is given out in groups: evenly but for one group, which the
// first blocks have more.
struct Shares {
  int group, each, more;

  CBAM_INLINE_MEMBER Shares(int count, int group_, int team)
      : group(group_), each(count / group_ / team), more(count / group_ - each * team) {}
  CBAM_INLINE_MEMBER int first(int rank) const {
    return (rank * each + (rank < more ? rank : more)) * group;
  }
  CBAM_INLINE_MEMBER int count(int rank) const { return (each + (rank < more)) * group; }
  // The block whose share this place is in.
  CBAM_INLINE_MEMBER int owner(int place) const {
    const int number = place / group, larger = more * (each + 1);
    return number < larger ? number / (each + 1) : more + (number - larger) / each;
  }
};

// The weights of the MLP that belong to the channels whose gates a block makes, of their own type.
struct HeldWeights {
  char* fc1;  // [hidden, channels]
  char* fc2;  // [channels, hidden]

  template <class Carver>
  CBAM_INLINE_MEMBER HeldWeights(Carver& carver, const ResidentGeometry& g, int units)
      : fc1(carver.template array<char>(int64_t{g.weight_bytes} * units * g.channels, "fc1")),
        fc2(carver.template array<char>(int64_t{g.weight_bytes} * units * g.channels, "fc2")) {}
};

// Where threads that share a column leave what each has of it.
template <class A>
struct ColumnScratch {
  A* sum;  // [threads]; so are the following, which sums alone do not need
  A* max;
  int32_t* argmax;
};

// Hands out parts of global memory as SharedCarver does of shared memory.
class ExchangeCarver {
 public:
  CBAM_INLINE_MEMBER explicit ExchangeCarver(char* base) : base_(base) {}

  template <class E>
  CBAM_INLINE_MEMBER E* array(int64_t count, const char*) {
    E* taken = base_ ? reinterpret_cast<E*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(E)) + 15) / 16 * 16;
    return taken;
  }
  CBAM_INLINE_MEMBER int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Why a problem has no plan, where its dtype has no kernel.
inline constexpr const char* kNoResidentKernel = "there is no resident kernel of this dtype";

}  // namespace cbam::cuda
