// Copies that go on while threads compute, and the mbarriers that they end in. As in catalogue.cu,
// variant 0 is right.
#include "catalogue.h"
#include "cuda/primitives/async_copy.cuh"
#include "cuda/primitives/team.cuh"
#include "cuda/primitives/vector_io.cuh"

namespace {

using cbam::cuda::arrive_after_copies;
using cbam::cuda::arrive_expecting;
using cbam::cuda::bulk_copy;
using cbam::cuda::copy_16_bytes;
using cbam::cuda::CopyBarrier;
using cbam::cuda::hand_over_to_bulk_copies;
using cbam::cuda::init;
using cbam::cuda::publish_inits;
using cbam::cuda::wait;

constexpr int kStages = 2;

// Tiles of kThreads ints, one after another in kStages buffers.
struct Stages {
  int* tiles;
  CopyBarrier *full, *empty;

  __device__ explicit Stages(SharedCarver& carver)
      : tiles(carver.array<int>(kStages * kThreads, "tiles")),
        full(carver.array<CopyBarrier>(kStages, "full")),
        empty(carver.array<CopyBarrier>(kStages, "empty")) {}
  __device__ int* tile(int k) const { return tiles + k % kStages * kThreads; }
  __device__ CopyBarrier* full_of(int k) const { return full + k % kStages; }
  __device__ CopyBarrier* empty_of(int k) const { return empty + k % kStages; }
};

// How often the stage of tile k was used before, as a parity.
__device__ int parity(int k) { return k / kStages % 2; }

__device__ void fetch(const Stages& s, const int* in, int k, int variant) {
  const int bytes = variant == 4 ? kTileBytes - 4 : kTileBytes;
  const int expected = variant == 6 ? bytes - 16 : variant == 7 ? bytes + 16 : bytes;
  const int* from = in + k * kThreads + (variant == 9 ? 16 : 0);
  if (variant != 8) arrive_expecting(s.full_of(k), expected);
  if (variant == 13) arrive_expecting(s.full_of(k), 0);
  bulk_copy(s.tile(k), from, bytes, s.full_of(k));
  if (variant == 8) arrive_expecting(s.full_of(k), expected);
}

// Each tile reversed, from bulk copies two tiles ahead. 1: no wait. 2: waits for the other parity.
// 3: fills a buffer before everybody has read it. 4: a size that is no multiple of 16. 5: mbarriers
// not published. 6: expects too little. 7: expects too much. 8: expects after the copy has started,
// which is right. 9: the last copy reads past the end. 10: the last copy is not waited for. 11:
// mbarriers not initialised. 12: initialised twice. 13: arrives twice. 14: two copies into
// the same bytes. 15: an mbarrier overwritten. 16: other threads do not wait for the mbarriers'
// initialisation. 17: hands nothing over to the copies. 18: only after the barrier.
__global__ void stream(const int* in, int* out, int tiles, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  const Stages s(carver);
  const int t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < (variant == 11 ? 1 : kStages); ++i) init(s.full + i, 1);
    if (variant == 12) init(s.full, 1);
    if (variant != 5) publish_inits();
    for (int k = 0; k < kStages; ++k) fetch(s, in, k, variant);
    if (variant == 14) bulk_copy(s.tile(0), in, kTileBytes, s.full_of(0));
    if (variant == 15) s.full[1] = 0;
  }
  if (variant != 16) __syncthreads();
  for (int k = 0; k < (variant == 10 ? tiles - 1 : tiles); ++k) {
    if (variant != 1) wait(s.full_of(k), variant == 2 ? 1 - parity(k) : parity(k));
    out[k * kThreads + t] = s.tile(k)[kThreads - 1 - t];
    if (variant < 17) hand_over_to_bulk_copies();
    if (variant != 3) __syncthreads();
    if (t == 0 && k + kStages < tiles) fetch(s, in, k + kStages, variant);
    if (variant == 18) hand_over_to_bulk_copies();
  }
}

// As stream, but mbarriers tell that a buffer has been read. 1: does not wait for them. 2: arrives
// before it reads.
__global__ void stream_without_syncthreads(const int* in, int* out, int tiles, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  const Stages s(carver);
  const int t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) init(s.full + i, 1);
    for (int i = 0; i < kStages; ++i) init(s.empty + i, kThreads);
    publish_inits();
  }
  __syncthreads();
  for (int k = 0; k < tiles + kStages; ++k) {
    const int read = k - kStages;
    if (read >= 0) {
      wait(s.full_of(read), parity(read));
      if (variant == 2) arrive_expecting(s.empty_of(read), 0);
      out[read * kThreads + t] = s.tile(read)[kThreads - 1 - t];
      hand_over_to_bulk_copies();
      if (variant != 2) arrive_expecting(s.empty_of(read), 0);
    }
    if (t || k >= tiles) continue;
    if (variant != 1) wait(s.empty_of(k), 1 - parity(k));
    fetch(s, in, k, 0);
  }
}

__device__ void fetch_by_threads(const Stages& s, const int* in, int k, int variant) {
  const int first = 4 * threadIdx.x;
  if (first >= kThreads) return;
  copy_16_bytes(s.tile(k) + first, in + k * kThreads + first);
  if (variant == 6 && k == 1) s.tile(0)[first] = 0;
  if (variant != 4) arrive_after_copies(s.full_of(k));
}

// As stream, by copies of the first threads. 1: no wait. 2: waits for the other parity. 3: fills a
// buffer before everybody has read it. 4: arrives for none, and nobody waits. 5: more threads
// arrive than the mbarrier counts. 6: writes a buffer under way.
__global__ void stream_by_threads(const int* in, int* out, int tiles, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  const Stages s(carver);
  const int t = threadIdx.x;
  if (t == 0)
    for (int i = 0; i < kStages; ++i) init(s.full + i, kThreads / 4 - (variant == 5));
  __syncthreads();
  for (int k = 0; k < kStages; ++k) fetch_by_threads(s, in, k, variant);
  for (int k = 0; k < tiles; ++k) {
    if (variant != 1 && variant != 4) wait(s.full_of(k), variant == 2 ? 1 - parity(k) : parity(k));
    out[k * kThreads + t] = s.tile(k)[kThreads - 1 - t];
    if (variant != 3) __syncthreads();
    if (variant != 4 && k + kStages < tiles) fetch_by_threads(s, in, k + kStages, variant);
  }
}

// Half of a tile by copies, half by stores. 1: with the arrival behind copies alone, which does not
// order stores.
__global__ void copy_and_store(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  const Stages s(carver);
  const int t = threadIdx.x, first = 4 * t;
  if (t == 0) init(s.full, kThreads);
  __syncthreads();
  if (first < kThreads / 2)
    copy_16_bytes(s.tiles + first, in + first);
  else if (t >= kThreads / 2)
    s.tiles[t] = in[t];
  arrive_after_copies(s.full);
  if (variant != 1) __syncthreads();
  wait(s.full, 0);
  out[t] = s.tiles[kThreads - 1 - t];
}

// Copies from what the block has written itself, for which a GPU also wants a proxy fence, of which
// the emulator knows nothing. 1: writes it again before the copy has read it.
__global__ void copy_back(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  const Stages s(carver);
  const int t = threadIdx.x;
  out[t] = in[t];
  __syncthreads();
  if (t == 0) {
    init(s.full, 1);
    publish_inits();
    fetch(s, out, 0, 0);
  }
  __syncthreads();
  if (variant == 1) out[t] = 0;
  wait(s.full, 0);
  out[t] = s.tiles[kThreads - 1 - t];
}

// The first block of a cluster fetches a tile that all blocks read. 1: a barrier of the cluster,
// but nobody waits for the copy before it.
__global__ void share(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  const Stages s(carver);
  const int t = threadIdx.x;
  if (blockIdx.x == 0 && t == 0) {
    init(s.full, 1);
    publish_inits();
    fetch(s, in, 0, 0);
    if (variant != 1) wait(s.full, 0);
  }
  cbam::cuda::cluster_barrier();
  out[blockIdx.x * kThreads + t] = cbam::cuda::read_in_block(s.tiles + t, 0);
  cbam::cuda::cluster_barrier();
  if (variant == 1 && blockIdx.x == 0) wait(s.full, 0);
}

// Each tile reversed, of which each thread has asked for some. 1: for a size that is no multiple of
// 16. 2: for more than there is.
__global__ void ask_ahead(const int* in, int* out, int variant) {
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  if (t % 4 == 0)
    cbam::cuda::prefetch(in + first + t, variant == 1 ? 12 : variant == 2 ? 2 * kTileBytes : 16);
  out[first + t] = in[first + kThreads - 1 - t];
}

constexpr size_t kSharedBytes = kStages * (kTileBytes + 2 * sizeof(CopyBarrier));

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* catalogue_stream(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(stream, 1, kSharedBytes, in, out, n / kThreads, variant);
}

const char* catalogue_stream_without_syncthreads(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(stream_without_syncthreads, 1, kSharedBytes, in, out, n / kThreads, variant);
}

const char* catalogue_stream_by_threads(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(stream_by_threads, 1, kSharedBytes, in, out, n / kThreads, variant);
}

const char* catalogue_copy_and_store(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(copy_and_store, 1, kSharedBytes, in, out, variant);
}

const char* catalogue_copy_back(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(copy_back, 1, kSharedBytes, in, out, variant);
}

const char* catalogue_ask_ahead(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(ask_ahead, n / kThreads, 0, in, out, variant);
}

const char* catalogue_share(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_together({n / kThreads}, share, n / kThreads, kThreads, kSharedBytes, in, out,
                      variant);
}
}
#pragma GCC visibility pop
