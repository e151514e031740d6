// Sums over the rows and the columns of the slices of x and dout that a block of the resident
// backward holds, and how x comes and goes where there is no room for all of it.
#pragma once

#include "../primitives/vector_io.cuh"
#include "resident_backward.h"
#include "resident_parts.cuh"
#include "resident_tile.cuh"

namespace cbam::cuda {

// What a block has of shared memory, and what it puts out for the others.
template <class T>
struct BackwardMemory {
  using A = acc_t<T>;
  ResidentBackwardShared<T, A> shared;
  BackwardExchange<A> exchange;
};

// What the blocks of a team have put out where this one has `own`, added in the order of ranks.
template <class A>
__device__ __forceinline__ A sum_over_team(const Team& team, const A* own) {
  A sum = A(0);
  read_from(team, [&](auto read) {
    for_batches<8>(
        0, team.size, 1, [&](int from) { return read(own, from); }, [&](int, A a) { sum += a; });
  });
  return sum;
}

// The chunks of x in the order in which they are loaded: those of a visit once, or where they do
// not all stay, twice. Chunk n goes to slot n % slots.
template <class T, bool kChannelsFirst, Split kSplit>
struct Loads {
  const ResidentBackward& p;
  const ResidentBlock<T, kChannelsFirst, kSplit>& block;
  const BackwardMemory<T>& m;
  int chunks;  // of a sample's slice here: some blocks have fewer rows
  int slots;
  int first = 0;  // of this walk over the visit

  __device__ __forceinline__ Loads(const ResidentBackward& p_,
                                   const ResidentBlock<T, kChannelsFirst, kSplit>& block_,
                                   const BackwardMemory<T>& m_)
      : p(p_), block(block_), m(m_) {
    const ResidentBackwardGeometry& g = p.geometry;
    chunks = (block.rows() + g.chunk - 1) / g.chunk;
    slots = g.holds_x() ? g.samples * chunks : g.x_slots;
  }
  __device__ __forceinline__ int per_walk() const { return p.geometry.samples * chunks; }
  __device__ __forceinline__ int walks() const { return p.geometry.holds_x() ? 1 : 2; }

  // Starts walk 0 or 1 of the block's visit.
  __device__ __forceinline__ void start(int walk) {
    first = (block.round * walks() + (walks() == 2 ? walk : 0)) * per_walk();
  }
  // Where chunk `number` of a sample stands, and where those are that follow it if all of x stays.
  __device__ __forceinline__ const T* chunk_of(int sample, int number) const {
    const int slot = (first + sample * chunks + number) % slots;
    return m.shared.x + int64_t{slot} * p.geometry.chunk * p.geometry.pitch;
  }
  __device__ __forceinline__ void wait(int sample, int number) const {
    const int n = first + sample * chunks + number;
    wait_for_chunk(p.geometry, m.shared.x_landed + n % slots, n / slots & 1);
    wait_for_chunk(p.geometry, m.shared.dout_landed + sample * p.geometry.chunks + number,
                   block.parity());
  }
  // Load number n, if there is such a sample.
  __device__ __forceinline__ void load(int n) const {
    const ResidentBackwardGeometry& g = p.geometry;
    if (!copies(g, n)) return;
    const int round = n / (walks() * per_walk()), within = n % per_walk();
    const int sample = within / chunks, number = within % chunks, slot = n % slots;
    if (sample < block.samples_in(round))
      load_chunk(g, block, p.x, round, sample, number,
                 m.shared.x + int64_t{slot} * g.chunk * g.pitch, m.shared.x_landed + slot);
  }
  // The next to take the place of chunk `number`, which nobody reads any more.
  __device__ __forceinline__ void replace(int sample, int number) const {
    load(first + sample * chunks + number + slots);
  }
};

// Some rows of every sample's slices: all of them, or those of one chunk. `landed`: they are there.
template <class T, bool kChannelsFirst, Split kSplit>
struct RowsOfBoth {
  const Loads<T, kChannelsFirst, kSplit>& loads;
  int first, end;
  bool landed;

  __device__ __forceinline__ const T* x(int sample, int row) const {
    const ResidentBackwardGeometry& g = loads.p.geometry;
    return loads.chunk_of(sample, first / g.chunk) + (row - first) * g.pitch;
  }
  __device__ __forceinline__ const T* dout(int sample, int row) const {
    const ResidentBackwardGeometry& g = loads.p.geometry;
    return loads.m.shared.dout + (int64_t{sample} * g.rows + row) * g.pitch;
  }
  // Until rows [from, to] are there.
  __device__ __forceinline__ void wait(int sample, int from, int to) const {
    if (landed) return;
    const int chunk = loads.p.geometry.chunk;
    for (int number = from / chunk; number <= to / chunk; ++number) loads.wait(sample, number);
  }
};

// Calls body(rows) for all rows of the visit at once where x stays, else for those of one chunk
// after the other, whose place the next one takes.
template <bool kChannelsFirst, Split kSplit, class T, class Body>
__device__ __forceinline__ void walk_both(Loads<T, kChannelsFirst, kSplit>& loads, int walk,
                                          Body body) {
  const ResidentBackwardGeometry& g = loads.p.geometry;
  loads.start(walk);
  const int rows = loads.block.rows(), step = g.holds_x() ? rows : g.chunk;
  for (int first = 0; first < rows; first += step) {
    if (!g.holds_x()) loads.wait(0, first / g.chunk);
    // The first walk has waited for what stays.
    const bool landed = !g.holds_x() || walk == 1;
    body(RowsOfBoth<T, kChannelsFirst, kSplit>{loads, first, min(first + step, rows), landed});
    hand_over_rows(g);
    __syncthreads();
    if (!g.holds_x()) loads.replace(0, first / g.chunk);
  }
}

// Columns that a thread reads at once, where rows are whole groups of them.
template <class T>
constexpr int kColumnsTogether = kBytesTogether / static_cast<int>(sizeof(T));

// Calls body with how many columns threads read at once, as a constant. Rows of whole vectors are
// whole groups; others may be.
template <bool kWhole, class T, class Body>
__device__ __forceinline__ void with_columns_together(int cols, Body body) {
  if (kWhole || cols % kColumnsTogether<T> == 0)
    body(std::integral_constant<int, kColumnsTogether<T>>{});
  else
    body(std::integral_constant<int, 1>{});
}

// put(sample, row, sum over the row's columns of value(row, i, x, dout)) for these rows of every
// sample, where value is made for the kCount columns of each vector: columns(sample, first column).
template <int kCount, bool kChannelsFirst, Split kSplit, class T, class Columns, class Put>
__device__ __forceinline__ void sum_rows(const RowsOfBoth<T, kChannelsFirst, kSplit>& of,
                                         Columns columns, Put put) {
  using A = acc_t<T>;
  const Loads<T, kChannelsFirst, kSplit>& loads = of.loads;
  const ResidentBackwardGeometry& g = loads.p.geometry;
  const int count = of.end - of.first, together = (count + kRowsTogether - 1) / kRowsTogether;
  const int total = loads.block.samples * count, groups = loads.block.samples * together;
  const int lane = threadIdx.x % g.lanes, at_once = g.threads / g.lanes;
  const int vectors = loads.block.cols() / kCount;
  // Where there are few rows, several share them; parts of a sum are added in their order. Visits
  // of fewer samples are cut as the others are, so that a sample's bits do not depend on its place.
  const int parts = max(1, min(at_once / (g.samples * together), vectors / g.lanes));
  A* aside = loads.m.shared.sum;  // [parts, total]
  for (int done = 0; done < groups * parts; done += at_once) {
    const int i = done + static_cast<int>(threadIdx.x) / g.lanes;
    const int part = i % parts, group = i / parts;
    const int sample = group / together, row = of.first + group % together * kRowsTogether;
    A sum[kRowsTogether] = {};
    if (group < groups) {
      const T* x = of.x(sample, row);
      const T* dout = of.dout(sample, row);
      int at[kRowsTogether];  // of the last row again, where there are fewer
#pragma unroll
      for (int r = 0; r < kRowsTogether; ++r) at[r] = min(r, of.end - 1 - row) * g.pitch;
      of.wait(sample, row, min(row + kRowsTogether, of.end) - 1);
#pragma unroll 1  // rows enough are under way
      for (int v = part * g.lanes + lane; v < vectors; v += parts * g.lanes) {
        const auto value = columns(sample, v * kCount);
#pragma unroll
        for (int r = 0; r < kRowsTogether; ++r) {
          const auto of_x = widen(load_staged<kCount>(x + at[r] + v * kCount));
          const auto of_dout = widen(load_staged<kCount>(dout + at[r] + v * kCount));
#pragma unroll
          for (int k = 0; k < kCount; ++k)
            sum[r] += value(row + r, k, of_x.value[k], of_dout.value[k]);
        }
      }
    }
    sum_lanes(sum, g.lanes);
#pragma unroll
    for (int r = 0; r < kRowsTogether; ++r) {
      if (lane > 0 || group >= groups || row + r >= of.end) continue;
      if (parts == 1)
        put(sample, row + r, sum[r]);
      else
        aside[part * total + sample * count + row + r - of.first] = sum[r];
    }
  }
  if (parts == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < total; i += g.threads) {
    A sum = A(0);
    for (int part = 0; part < parts; ++part) sum += aside[part * total + i];
    put(i / count, of.first + i % count, sum);
  }
}

// put(sample, column, sum over these rows of value(column, x, dout)) for every column of every
// sample, where value is made for each row: rows(sample, row). A thread takes kCount columns.
template <int kCount, bool kChannelsFirst, Split kSplit, class T, class Rows, class Put>
__device__ __forceinline__ void sum_columns(const RowsOfBoth<T, kChannelsFirst, kSplit>& of,
                                            Rows rows, Put put) {
  using A = acc_t<T>;
  const Loads<T, kChannelsFirst, kSplit>& loads = of.loads;
  const ResidentBackwardGeometry& g = loads.p.geometry;
  const int vectors = loads.block.cols() / kCount, total = loads.block.samples * vectors;
  const auto gather = [&](int i, int group, A(&sum)[kCount]) {
    const int sample = i / vectors, col = i % vectors * kCount;
    const T* x = of.x(sample, of.first) + col;
    const T* dout = of.dout(sample, of.first) + col;
    const int step = of.landed ? of.end - of.first : g.chunk;
    int row = of.first + group;
    for (int first = of.first; row < of.end; first += step) {
      const int end = min(of.end, first + step);
      of.wait(sample, first, end - 1);
#pragma unroll 4
      for (; row < end; row += g.groups) {
        const int at = (row - of.first) * g.pitch;
        const auto value = rows(sample, row);
        const auto of_x = widen(load_staged<kCount>(x + at));
        const auto of_dout = widen(load_staged<kCount>(dout + at));
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum[k] += value(col + k, of_x.value[k], of_dout.value[k]);
      }
    }
  };
  const auto put_vector = [&](int k, int i, A sum) {
    put(i / vectors, i % vectors * kCount + k, sum);
  };
  if (g.groups == 1) {
    for (int i = threadIdx.x; i < total; i += g.threads) {
      A sum[kCount] = {};
      gather(i, 0, sum);
#pragma unroll
      for (int k = 0; k < kCount; ++k) put_vector(k, i, sum[k]);
    }
    return;
  }
  const int group = threadIdx.x / total, i = threadIdx.x % total;
  A sum[kCount] = {};
  if (group < g.groups) gather(i, group, sum);
  add_parts(sum, group < g.groups, group, g.groups, i, total, loads.m.shared.sum, put_vector);
}

}  // namespace cbam::cuda
