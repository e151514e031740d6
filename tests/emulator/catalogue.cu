// Kernels with one mistake each, and their right twins: what the emulator must find, and must not.
// Variant 0 is right; the others are wrong. Entries return null, or the report of what was found.
#include "catalogue.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// out[i] = in[n - 1 - i] within each block, through shared memory.
// 1: no barrier between writing and reading it.
__global__ void reverse(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x, base = blockIdx.x * kThreads;
  tile[t] = in[base + t];
  if (variant != 1) __syncthreads();
  out[base + t] = tile[kThreads - 1 - t];
}

// As reverse, for rows one after another in the same shared memory.
// 1: no barrier before the next row overwrites it.
__global__ void reverse_rows(const int* in, int* out, int rows, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x;
  for (int row = 0; row < rows; ++row) {
    tile[t] = in[row * kThreads + t];
    __syncthreads();
    out[row * kThreads + t] = tile[kThreads - 1 - t];
    if (variant != 1) __syncthreads();
  }
}

// 1: half of the block waits at another barrier. 2: half of it leaves early. 3: one warp waits for
// a lane that waits for the block.
__global__ void meet(const int* in, int* out, int variant) {
  const int t = threadIdx.x;
  if (variant == 1 && t >= kThreads / 2) {
    __syncthreads();
    out[t] = in[t];
    return;
  }
  if (variant == 2 && t >= kThreads / 2) return;
  if (variant == 3 && t < 32 && t != 5) __syncwarp();
  __syncthreads();
  out[t] = in[t];
}

// Neighbours within a warp swap values. 1: a shuffle, which orders nothing, instead of __syncwarp.
// 2: nothing at all.
__global__ void swap_in_warp(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x;
  tile[t] = in[t];
  if (variant == 1)
    __shfl_xor_sync(kAllLanes, t, 1);
  else if (variant == 0)
    __syncwarp();
  out[t] = tile[t ^ 1];
}

// Sums of neighbours, the last with itself. 1: reads one past the shared array's end.
__global__ void add_neighbours(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x, last = variant == 1 ? kThreads : kThreads - 1;
  tile[t] = in[t];
  __syncthreads();
  out[t] = tile[t] + tile[min(t + 1, last)];
}

// 1: one past the end. 2: one before the start. 3: writes what may only be read.
__global__ void copy(int* in, int* out, int n, int variant) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= (variant == 1 ? n + 1 : n)) return;
  out[i] = in[variant == 2 ? i - 1 : i];
  if (variant == 3 && i == n - 1) in[i] = 0;
}

// 1: reads shared memory that nobody wrote.
__global__ void fill(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x;
  if (variant != 1 || t != 7) tile[t] = in[t];
  out[t] = tile[t];
}

// Writes by four ints, reads and writes again by halves of an int. 1: no barrier in between.
__global__ void copy_by_halves(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x;
  if (t < kThreads / 4)
    reinterpret_cast<int4*>(tile)[t] = __ldg(reinterpret_cast<const int4*>(in) + t);
  if (variant != 1) __syncthreads();
  for (int i = t; i < 2 * kThreads; i += kThreads)
    reinterpret_cast<short*>(out)[i] = reinterpret_cast<const short*>(tile)[i];
}

// 1: vectors of four that start at the second element.
__global__ void copy_vectors(const int* in, int* out, int n, int variant) {
  const int shift = variant == 1 ? 1 : 0;
  const int i = 4 * threadIdx.x;
  if (i + 4 + shift > n) return;
  const int4 vector = __ldg(reinterpret_cast<const int4*>(in + shift + i));
  *reinterpret_cast<int4*>(out + i) = vector;
}

// The block that finishes last adds up what each block wrote, and sets the counter back. Another
// thread than the one that counts writes, and yet another reads. 1: no fence before the counter.
// 2: no fence after it. 3: a fence, but a write after it.
__global__ void sum_in_last_block(const int* in, int* partial, unsigned* counter, int* out,
                                  int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* is_last = carver.array<int>(1, "is_last");
  const int value = in[blockIdx.x * kThreads + threadIdx.x];
  const int count = __syncthreads_count(value != 0);
  if (threadIdx.x == 32) partial[blockIdx.x] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (variant != 1) __threadfence();
    if (variant == 3) partial[blockIdx.x] = count;
    *is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (variant != 2) __threadfence();
  }
  __syncthreads();
  if (!*is_last || threadIdx.x != 64) return;
  *counter = 0;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block];
  *out = sum;
}

// 1: every block writes the same element.
__global__ void write_own(const int* in, int* out, int variant) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (in[i] > 0) out[variant == 1 ? threadIdx.x : i] = i;
}

// Sums over each warp. 1: the upper lanes are not in the mask. 2: lanes leave, others read them.
__global__ void sum_warps(const int* in, int* out, int variant) {
  const int t = threadIdx.x;
  if (variant == 2 && t % 32 == 31) return;
  int sum = in[t];
  for (int lanes = 16; lanes; lanes /= 2)
    sum += __shfl_xor_sync(variant == 1 ? 0xffffu : kAllLanes, sum, lanes);
  out[t] = sum;
}

// Two arrays. 1: asks at launch for the first alone. 2: its threads disagree about the second.
__global__ void two_arrays(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  int* second =
      carver.array<int>(variant == 2 && threadIdx.x == 9 ? kThreads / 2 : kThreads, "second");
  const int t = threadIdx.x;
  tile[t] = in[t];
  second[t] = tile[t];
  out[t] = second[t];
}

// Votes, shuffles of every kind and atomics, with results that the host can foresee.
__global__ void exchange(int* out) {
  const int t = threadIdx.x, lane = t % warpSize;
  int* mine = out + t * 8;
  mine[0] = __shfl_sync(kAllLanes, t, 3);
  mine[1] = __shfl_up_sync(kAllLanes, t, 1);
  mine[2] = __shfl_down_sync(kAllLanes, t, 1, 8);
  mine[3] = static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<double>(t), 5));
  mine[4] = static_cast<int>(__ballot_sync(kAllLanes, lane < 3));
  mine[5] = __any_sync(kAllLanes, lane == 9) + 2 * __all_sync(kAllLanes, lane < 31);
  mine[6] = __syncthreads_or(t == 40) + 2 * __syncthreads_and(t != 40);
  mine[7] = 0;
  __syncthreads();
  atomicAdd(&out[7], 1);
  atomicMax(&out[15], t);
}

__global__ void nothing() {}

// Reads and writes every element once, `rounds` times, four bytes at a time.
__global__ void walk(float* data, int n, int rounds) {
  const int stride = gridDim.x * blockDim.x;
  for (int round = 0; round < rounds; ++round)
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) data[i] += 1.0f;
}

// In a launch that overlaps with the one before. 1: no wait for that one. 2: a write before the
// wait.
__global__ void follow(const int* in, int* out, int variant) {
  const int i = blockIdx.x * kThreads + threadIdx.x, own = in[i];
  if (variant == 2) out[i] = own;
  if (variant != 1) cbam::cuda::wait_for_previous_launch();
  out[i] = own;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* catalogue_reverse(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(reverse, n / kThreads, kTileBytes, in, out, variant);
}

const char* catalogue_reverse_rows(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(reverse_rows, 1, kTileBytes, in, out, n / kThreads, variant);
}

const char* catalogue_meet(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(meet, 1, 0, in, out, variant);
}

const char* catalogue_swap_in_warp(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(swap_in_warp, 1, kTileBytes, in, out, variant);
}

const char* catalogue_add_neighbours(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(add_neighbours, 1, kTileBytes, in, out, variant);
}

const char* catalogue_copy(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(copy, n / kThreads + 1, 0, in, out, n, variant);
}

const char* catalogue_fill(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(fill, 1, kTileBytes, in, out, variant);
}

// From the first half of a buffer to its second, which lies inside of what may be read.
const char* catalogue_copy_within(int* buffer, int n) {
  emulator::unwatch_all();
  emulator::watch(buffer, 2 * n * sizeof(int), "whole", false);
  emulator::watch(buffer + n, n * sizeof(int), "half", true);
  return try_launch(copy, n / kThreads, 0, buffer, buffer + n, n, 0);
}

const char* catalogue_copy_by_halves(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(copy_by_halves, 1, kTileBytes, in, out, variant);
}

const char* catalogue_copy_vectors(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(copy_vectors, 1, 0, in, out, n, variant);
}

const char* catalogue_sum_in_last_block(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  const int blocks = n / kThreads;
  unsigned counter = 0;
  emulator::watch(&counter, sizeof counter, "counter", true);
  return try_launch(sum_in_last_block, blocks, 16, in, out + 1, &counter, out, variant);
}

const char* catalogue_write_own(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(write_own, n / kThreads, 0, in, out, variant);
}

const char* catalogue_sum_warps(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(sum_warps, 1, 0, in, out, variant);
}

const char* catalogue_two_arrays(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(two_arrays, 1, variant == 1 ? kTileBytes : 2 * kTileBytes, in, out, variant);
}

const char* catalogue_follow(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  Grid grid{n / kThreads, kThreads};
  grid.overlaps = true;
  return try_grid(follow, grid, in, out, variant);
}

const char* catalogue_exchange(int* out, int n) {
  emulator::unwatch_all();
  emulator::watch(out, n * sizeof(int), "out", true);
  return try_launch(exchange, 1, 0, out);
}

// With sizes that the caller chooses, to see which of them are refused.
const char* catalogue_nothing(int blocks, int threads, size_t shared_bytes) {
  try {
    const auto bytes = static_cast<int64_t>(shared_bytes);
    cbam::cuda::launch("nothing", nothing, {blocks, threads, bytes, bytes}, nullptr);
  } catch (const std::exception& error) {
    report = error.what();
    return report.c_str();
  }
  return nullptr;
}

const char* catalogue_without_opt_in(size_t shared_bytes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = dim3(1);
  config.dynamicSmemBytes = shared_bytes;
  const auto another_kernel = [](int) {};
  const cudaError_t status = cudaLaunchKernelEx(&config, +another_kernel, 0);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* catalogue_walk(float* data, int n, int blocks, int rounds) {
  emulator::unwatch_all();
  emulator::watch(data, n * sizeof(float), "data", true);
  return try_launch(walk, blocks, 0, data, n, rounds);
}

// `n` floats to 16 bits and back.
void catalogue_to_half(const float* from, unsigned short* to, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = __half_as_ushort(__float2half_rn(from[i]));
}
void catalogue_from_half(const unsigned short* from, float* to, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = __half2float(__ushort_as_half(from[i]));
}
void catalogue_to_bfloat16(const float* from, unsigned short* to, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = __bfloat16_as_ushort(__float2bfloat16_rn(from[i]));
}
void catalogue_from_bfloat16(const unsigned short* from, float* to, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = __bfloat162float(__ushort_as_bfloat16(from[i]));
}
}
#pragma GCC visibility pop
