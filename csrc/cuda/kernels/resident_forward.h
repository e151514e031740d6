// What the resident forward is handed, and the shared memory that it takes.
#pragma once

#include "resident.h"

namespace cbam::cuda {

// Threads of the blocks on a multiprocessor, with 128 registers each.
constexpr int kForwardThreads = 512;

// Rows that a group of lanes walks along together.
constexpr int kRowsAlong = 2;

struct ResidentForwardGeometry : ResidentGeometry {
  int band;        // pixels whose maps are exchanged at a time
  int neighbours;  // pixels whose maps a thread makes where channels come first: those of a vector,
                   // of half of one, or a single one; `groups` threads share their channels

  // The pooled vectors that the MLP's sums are made for.
  CBAM_INLINE_MEMBER int vectors() const { return 2 * mlp_samples(); }
  // From the pooled values of a channel to those of the next: neither of 8 lanes that read a vector
  // each meets another in a bank.
  CBAM_INLINE_MEMBER int pooled_pitch() const { return samples == 1 ? 2 : vectors() + 4; }
  // Whether the spatial gates stand where the maps were.
  CBAM_INLINE_MEMBER bool gates_replace_maps() const {
    return cluster && split == Split::kChannels;
  }
  // Elements of what is put out of a box's gates, and of a sample's maps: whole vectors.
  CBAM_INLINE_MEMBER int gates_each() const { return in_whole_vectors(boxes.pixels()); }
  CBAM_INLINE_MEMBER int map_pitch() const { return in_whole_vectors(band); }

  CBAM_INLINE_MEMBER static int in_whole_vectors(int sums) {
    constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(float));
    return (sums + kCount - 1) / kCount * kCount;
  }
};

struct ResidentForward : Resident {
  void* out;
  int64_t out_sample_stride, out_row_stride;
  EndingRows ending;
  ResidentForwardGeometry geometry;
};

// For the geometry's split: resident_forward.cu, resident_forward_pixels.cu.
template <Split kSplit>
void resident_forward(DType dtype, bool channels_first, const ResidentForward& p, const Grid& grid,
                      Stream stream);
template <Split kSplit>
const char* why_no_resident_forward(DType dtype, bool channels_first, bool training,
                                    const Grid& grid);

// What the blocks of a team read of each other: in the shared memory of each, or in global memory.
template <class A>
struct ForwardExchange {
  A* hidden;        // [hidden, vectors]: this block's share of the first layer's sums
  A* maps;          // [2, samples, band in whole vectors]: mean and max over the channels it holds
  int32_t* argmax;  // [samples, band in whole vectors]; by pixels none
  A* gates;         // [boxes_each, pixels of a box in whole vectors]; by pixels [channels]: the
                    // channel gates that this block makes
  A* both;          // [units that it adds up, mlp_samples]: the sum of both hidden vectors; in the
                    // same place, before there are gates
  // By pixels, else none.
  A* pools;              // [2, channels of x]: sum and maximum over this block's pixels
  int32_t* pool_argmax;  // [channels of x]

  template <class Carver>
  CBAM_INLINE_MEMBER ForwardExchange(Carver& carver, const ResidentForwardGeometry& g, int units,
                                     const Space& space, bool training)
      : hidden(carver.template array<A>(g.in_whole_vectors(units * g.vectors()), "hidden")),
        maps(carver.template array<A>(map_values(g, space), "maps")),
        argmax(carver.template array<int32_t>(
            training && g.split == Split::kChannels ? int64_t{g.samples} * g.map_pitch() : 0,
            "argmax")),
        gates(carver.template array<A>(gate_values(g, units), "gates or both")),
        both(gates),
        pools(carver.template array<A>(int64_t{2} * pooled_channels(g), "pools")),
        pool_argmax(
            carver.template array<int32_t>(training ? pooled_channels(g) : 0, "pool argmax")) {}

 private:
  CBAM_INLINE_MEMBER static int64_t gate_values(const ResidentForwardGeometry& g, int units) {
    if (g.split == Split::kPixels) return g.channels;
    const int64_t gates = int64_t{g.boxes_each} * g.gates_each();
    const int64_t both = g.shared_values(units, g.mlp_samples());
    return gates > both ? gates : both;
  }
  // In a cluster the spatial gates follow in the same place, once the maps are gates.
  CBAM_INLINE_MEMBER static int64_t map_values(const ResidentForwardGeometry& g,
                                               const Space& space) {
    const int64_t maps = int64_t{2} * g.samples * g.map_pitch();
    const int64_t gates = int64_t{g.samples} * space.pixels();
    return g.gates_replace_maps() && gates > maps ? gates : maps;
  }
  CBAM_INLINE_MEMBER static int64_t pooled_channels(const ResidentForwardGeometry& g) {
    return g.split == Split::kPixels ? g.held_channels : 0;
  }
};

// What a block alone looks at.
template <class T, class A>
struct ResidentForwardShared {
  T* tile;              // [samples, rows, pitch]
  CopyBarrier* landed;  // [samples, chunks]; none where copies go through registers
  A* pooled;            // [channels, vectors]: mean and max of each sample in turn
  A* both;              // [hidden, vectors / 2]: the sum of both hidden vectors; in the same place
  A* staged;            // [2, a box with its halo, rows padded]; in the same place
  A* gate;              // [samples, channels that it holds]
  A* weight;            // [2, taps], and the bias
  A* spatial;           // [samples, pixels that it holds]; none where the gates replace the maps
  HeldWeights held;
  ColumnScratch<A> scratch;

  template <class Carver>
  CBAM_INLINE_MEMBER ResidentForwardShared(Carver& carver, const ResidentForwardGeometry& g,
                                           int units, const Space& space, bool training)
      : tile(carver.template array<T>(int64_t{g.samples} * g.rows * g.pitch, "tile")),
        landed(carver.template array<CopyBarrier>(
            g.copy == Copy::kPlain ? 0 : int64_t{g.samples} * g.chunks, "landed")),
        pooled(carver.template array<A>(passing_values(g, units, space), "pooled, both or staged")),
        both(pooled),
        staged(pooled),
        gate(carver.template array<A>(int64_t{g.samples} * g.held_channels, "gate")),
        weight(carver.template array<A>(int64_t{2} * space.taps() + 1, "weight")),
        spatial(carver.template array<A>(g.gates_replace_maps() ? 0 : int64_t{g.samples} * g.pixels,
                                         "spatial")),
        held(carver, g, units),
        scratch{carver.template array<A>(shared_columns(g), "sum"),
                carver.template array<A>(shared_columns(g), "max"),
                carver.template array<int32_t>(training ? shared_columns(g) : 0, "argmax")} {}

 private:
  // What is looked at in one stage after the other.
  CBAM_INLINE_MEMBER static int64_t passing_values(const ResidentForwardGeometry& g, int units,
                                                   const Space& space) {
    const int64_t pooled = int64_t{g.pooled_pitch()} * g.channels;
    const int64_t both = int64_t{g.mlp_samples()} * units, staged = 2 * g.boxes.staged(space);
    const int64_t of_gate = pooled > both ? pooled : both;
    return of_gate > staged ? of_gate : staged;
  }
  CBAM_INLINE_MEMBER static int shared_columns(const ResidentForwardGeometry& g) {
    return g.groups > 1 && g.neighbours == 1 ? g.threads : 0;
  }
};

}  // namespace cbam::cuda
