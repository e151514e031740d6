// What the resident backward is handed, and the shared memory that it takes.
#pragma once

#include "backward.h"
#include "resident.h"

namespace cbam::cuda {

// Threads of the blocks on a multiprocessor, with 128 registers each: one for each of the 392
// vectors of 16 bytes in a row of 56x56 in 16 bits, five for those of 28x28.
constexpr int kBackwardThreads = 512;
// Rows whose sums a thread makes together, and bytes of each that it reads at once: what belongs
// to the columns is read once for the rows. More would not fit into registers.
constexpr int kRowsTogether = 4, kBytesTogether = 8;

struct ResidentBackwardGeometry : ResidentGeometry {
  // Chunks of x that a block has room for: all of a visit's, or a few that come and go, so that x
  // is read twice. dout stays in any case.
  int x_slots;
  // How threads share vectors while dx is written.
  Access access;      // kVector or kPacked
  int row_group;      // 1 unless access is kPacked
  int threads_along;  // threads side by side along a group of rows

  CBAM_INLINE_MEMBER bool holds_x() const { return x_slots == samples * chunks; }
  // Pixels of a block whose maps the convolution's gradients take.
  CBAM_INLINE_MEMBER int mapped_pixels() const {
    return split == Split::kPixels ? pixels : boxes_each * boxes.pixels();
  }
  // Shares of the convolution's gradients that a sample has.
  CBAM_INLINE_MEMBER int64_t conv_shares() const {
    return split == Split::kPixels ? team : boxes.boxes();
  }
};

struct ResidentBackward : Resident {
  Matrix dout;
  void* dx;  // or null
  int64_t dx_sample_stride, dx_row_stride;
  const void* d_channel_gate;  // acc [samples, channels], or null: what else reached the gate
  const void* d_spatial_gate;  // acc [samples, pixels], or null
  // For the gradients of the weights, null where nobody asked for them.
  void* dm;        // acc [samples, channels]
  void* d_hidden;  // acc [samples, 2, hidden]
  void* d_conv;    // acc [samples * conv_shares, 2 * taps + 1], the bias last
  ResidentBackwardGeometry geometry;
};

// For the geometry's split: resident_backward.cu, resident_backward_pixels.cu.
template <Split kSplit>
void resident_backward(DType dtype, bool channels_first, const ResidentBackward& p,
                       const Grid& grid, Stream stream);
template <Split kSplit>
const char* why_no_resident_backward(DType dtype, bool channels_first,
                                     const ResidentBackwardGeometry& geometry, const Grid& grid);

// What the blocks of a team read of each other: in the shared memory of each, or in global memory.
template <class A>
struct BackwardExchange {
  A* d_spatial;          // [samples, pixels that it holds]: its share of the sums over channels;
                         // by pixels their dz
  A* hidden;             // [mlp_samples, hidden]: its share of the second layer's sums
  A* d_hidden;           // [units that it adds up, mlp_samples, 2]
  StagedTerms<A> terms;  // [samples, pixels]: of those in this block's boxes; by pixels none
  // By pixels, else none.
  A* d_channel;  // [channels of x]: its share of the sums over pixels
  A* d_pooled;   // [2, channels]: of those whose gates it makes

  // In a cluster, where every block has what belongs to all pixels in the same place.
  template <class Carver>
  CBAM_INLINE_MEMBER BackwardExchange(Carver& carver, const ResidentBackwardGeometry& g, int units,
                                      const StagedTerms<A>& of_pixels)
      : d_spatial(carver.template array<A>(int64_t{g.samples} * g.pixels, "d_spatial")),
        hidden(carver.template array<A>(int64_t{units} * g.mlp_samples(), "hidden")),
        d_hidden(carver.template array<A>(g.shared_values(units, 2 * g.mlp_samples()),
                                          "d_hidden shared")),
        terms(of_pixels),
        d_channel(carver.template array<A>(by_pixels(g, g.held_channels), "d_channel shares")),
        d_pooled(carver.template array<A>(by_pixels(g, 2 * g.channels), "d_pooled")) {}

  CBAM_INLINE_MEMBER BackwardExchange(ExchangeCarver& carver, const ResidentBackwardGeometry& g,
                                      int units)
      : d_spatial(carver.array<A>(int64_t{g.samples} * g.pixels, "d_spatial")),
        hidden(carver.array<A>(int64_t{units} * g.mlp_samples(), "hidden")),
        d_hidden(carver.array<A>(g.shared_values(units, 2 * g.mlp_samples()), "d_hidden shared")),
        terms(carver, g.split == Split::kPixels ? 0 : int64_t{g.samples} * g.pixels),
        d_channel(carver.array<A>(by_pixels(g, g.held_channels), "d_channel shares")),
        d_pooled(carver.array<A>(by_pixels(g, 2 * g.channels), "d_pooled")) {}

 private:
  CBAM_INLINE_MEMBER static int by_pixels(const ResidentBackwardGeometry& g, int values) {
    return g.split == Split::kPixels ? values : 0;
  }
};

// What a block alone looks at.
template <class T, class A>
struct ResidentBackwardShared {
  T* dout;                     // [samples, rows, pitch]
  T* x;                        // [x_slots, chunk, pitch]
  CopyBarrier* dout_landed;    // [samples, chunks]; none where copies go through registers
  CopyBarrier* x_landed;       // [x_slots]
  A* d_channel;                // [samples, channels that it holds]
  A* dm;                       // [channels, mlp_samples]
  A* d_hidden;                 // [hidden, 2 * mlp_samples]: of mean and of max of each sample
  StagedTerms<A> of_channels;  // [samples, channels that it holds]
  StagedTerms<A> of_pixels;    // [samples, pixels that it holds]
  A* weight;                   // [2, taps]
  A* dz;                       // [boxes_each, box with its halo, rows padded]
  A* maps;                     // [boxes_each, 2, pixels of a box]; by pixels [2, pixels]
  HeldWeights held;
  A* sum;  // [kMostAside, threads]: where several share a row or a column

  template <class Carver>
  CBAM_INLINE_MEMBER ResidentBackwardShared(Carver& carver, const ResidentBackwardGeometry& g,
                                            int units, const Space& space)
      : dout(carver.template array<T>(int64_t{g.samples} * g.rows * g.pitch, "dout tile")),
        x(carver.template array<T>(int64_t{g.x_slots} * g.chunk * g.pitch, "x tile")),
        dout_landed(carver.template array<CopyBarrier>(
            g.copy == Copy::kPlain ? 0 : int64_t{g.samples} * g.chunks, "dout landed")),
        x_landed(
            carver.template array<CopyBarrier>(g.copy == Copy::kPlain ? 0 : g.x_slots, "x landed")),
        d_channel(carver.template array<A>(int64_t{g.samples} * g.held_channels, "d_channel")),
        dm(carver.template array<A>(int64_t{g.channels} * g.mlp_samples(), "dm")),
        d_hidden(carver.template array<A>(int64_t{units} * 2 * g.mlp_samples(), "d_hidden")),
        of_channels(carver, int64_t{g.samples} * g.held_channels),
        of_pixels(carver, int64_t{g.samples} * g.pixels),
        weight(carver.template array<A>(int64_t{2} * space.taps(), "weight")),
        dz(carver.template array<A>(g.boxes_each * staged_dz(g.boxes, space), "dz")),
        maps(carver.template array<A>(int64_t{2} * g.mapped_pixels(), "maps")),
        held(carver, g, units),
        sum(carver.template array<A>(int64_t{kMostAside} * g.threads, "sum")) {}
};

}  // namespace cbam::cuda
