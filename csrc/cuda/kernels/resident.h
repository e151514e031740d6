// What the resident forward is handed, and the shared memory that it takes. A team of blocks holds
// some samples of x in shared memory, each block a slice of the channels, from the first read of x
// to the last write of out.
#pragma once

#include "../primitives/async_copy.cuh"
#include "kernels.h"

namespace cbam::cuda {

// Threads of a block: on every multiprocessor 512 in all, with 128 registers each.
constexpr int kMostTeamThreads = 512;
// Samples of a visit, at most: they share one reading of the MLP's weights.
constexpr int kMostVisited = 8;

// How x comes to shared memory.
enum class Copy {
  kPlain,  // through registers
  kAsync,  // 16 bytes at a time by every thread, from compute capability 8.0 on
  kBulk,   // in long pieces by the copy engine, from 9.0 on
};

struct ResidentGeometry {
  bool cluster;  // blocks of a team are a cluster; else all blocks run at once and exchange through
                 // global memory
  int team;      // blocks that hold the samples of a visit together
  int threads;   // of a block: all of a multiprocessor's, or half of them
  int64_t teams;    // each of which visits every teams-th group of samples
  int samples;      // of a visit
  int channels;     // of a block; the last may have fewer
  int rows, pitch;  // of a slice of one sample: channels of pixels, or pixels of channels
  int chunk;        // rows that are loaded together
  int chunks;       // of a slice
  int lanes;        // threads that share a row where sums run along rows
  int groups;       // and a column where they run down columns
  Copy copy;
  int band;           // pixels whose maps are exchanged at a time
  BoxGeometry boxes;  // what the spatial gate is computed in; boxes go round the blocks of the team
  int boxes_each;     // boxes of a visit that a block takes, at most
  int64_t exchange;   // bytes that a block puts out for the others in global memory; 0 in a cluster

  // The pooled vectors that the MLP's sums are made for; those of absent samples are zeros.
  CBAM_INLINE_MEMBER int vectors() const { return samples == 1 ? 2 : 2 * kMostVisited; }
};

// resident_forward.cu
struct Resident {
  int64_t samples;
  int channels, hidden;
  Space space;
  const void* x;
  int64_t x_sample_stride, x_row_stride;  // in elements
  void* out;
  int64_t out_sample_stride, out_row_stride;
  Weights weights;
  Saved saved;     // all null in inference
  void* exchange;  // teams * team * geometry.exchange bytes, or null
  ResidentGeometry geometry;
};
void resident_forward(DType dtype, bool channels_first, const Resident& p, const Grid& grid,
                      Stream stream);
bool can_run_resident(DType dtype, bool channels_first, bool training, const Grid& grid);

// Hands out parts of global memory as SharedCarver does of shared memory.
class ExchangeCarver {
 public:
  CBAM_INLINE_MEMBER explicit ExchangeCarver(void* base) : base_(static_cast<char*>(base)) {}

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

// What the blocks of a team read of each other: in the shared memory of each, or in global memory.
template <class A>
struct Exchange {
  A* hidden;        // [hidden, vectors]: this block's share of the first layer's sums
  A* maps;          // [2, samples, band]: mean and max over this block's channels
  int32_t* argmax;  // [samples, band]
  A* gates;         // [boxes_each, pixels of a box]

  template <class Carver>
  CBAM_INLINE_MEMBER Exchange(Carver& carver, const ResidentGeometry& g, int units,
                              const Space& space, bool training)
      : hidden(carver.template array<A>(int64_t{units} * g.vectors(), "hidden")),
        maps(carver.template array<A>(map_values(g, space), "maps")),
        argmax(
            carver.template array<int32_t>(training ? int64_t{g.samples} * g.band : 0, "argmax")),
        gates(carver.template array<A>(int64_t{g.boxes_each} * g.boxes.pixels(), "gates")) {}

 private:
  // In a cluster the spatial gates follow in the same place, once the maps are gates.
  CBAM_INLINE_MEMBER static int64_t map_values(const ResidentGeometry& g, const Space& space) {
    const int64_t maps = int64_t{2} * g.samples * g.band;
    const int64_t gates = int64_t{g.samples} * space.pixels();
    return g.cluster && gates > maps ? gates : maps;
  }
};

// What a block alone looks at.
template <class T, class A>
struct ResidentShared {
  T* tile;              // [samples, rows, pitch]
  CopyBarrier* landed;  // [samples, chunks]; none where copies go through registers
  A* pooled;            // [vectors, channels]: mean and max of each sample in turn
  A* both;              // [vectors / 2, hidden]: the sum of both hidden vectors
  A* gate;              // [samples, channels]
  A* weight;            // [2, taps], and the bias
  A* staged;            // [2, a box with its halo, rows padded]
  A* spatial;           // [samples, pixels]; null where Exchange has room for it
  A* sum;               // [threads]: where several share a column
  A* max;               // [threads]
  int32_t* argmax;      // [threads]

  CBAM_INLINE_MEMBER ResidentShared(SharedCarver& carver, const ResidentGeometry& g, int units,
                                    const Space& space, bool training)
      : tile(carver.array<T>(int64_t{g.samples} * g.rows * g.pitch, "tile")),
        landed(carver.array<CopyBarrier>(g.copy == Copy::kPlain ? 0 : int64_t{g.samples} * g.chunks,
                                         "landed")),
        pooled(carver.array<A>(int64_t{g.vectors()} * g.channels, "pooled")),
        both(carver.array<A>(int64_t{g.vectors()} / 2 * units, "both")),
        gate(carver.array<A>(int64_t{g.samples} * g.channels, "gate")),
        weight(carver.array<A>(int64_t{2} * space.taps() + 1, "weight")),
        staged(carver.array<A>(2 * g.boxes.staged(space), "staged")),
        spatial(carver.array<A>(g.cluster ? 0 : int64_t{g.samples} * space.pixels(), "spatial")),
        sum(carver.array<A>(scratch(g), "sum")),
        max(carver.array<A>(scratch(g), "max")),
        argmax(carver.array<int32_t>(training ? scratch(g) : 0, "argmax")) {}

 private:
  CBAM_INLINE_MEMBER static int scratch(const ResidentGeometry& g) {
    return g.groups > 1 ? g.threads : 0;
  }
};

}  // namespace cbam::cuda
