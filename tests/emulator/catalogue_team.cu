// Blocks that work together: clusters, which read each other's shared memory, and cooperative
// launches, which exchange through global memory. As in catalogue.cu, variant 0 is right.
#include <vector>

#include "catalogue.h"
#include "cuda/primitives/team.cuh"

namespace {

using cbam::cuda::arrivals;
using cbam::cuda::cluster_barrier;
using cbam::cuda::grid_barrier;
using cbam::cuda::part_barrier;
using cbam::cuda::read_in_block;

// Where another block's array is, to look for it and to read it at different times.
const int* in_block(const int* own, int rank) {
  return static_cast<const int*>(emulator::in_block(own, static_cast<unsigned>(rank)));
}

// Every block puts out what the next block of its cluster has put into its shared memory.
// 1: no barrier before reading it. 2: none after it: a block exits while it is read. 3: none before
// the other's array is looked for. 4: looks behind the cluster. 5: half of each block waits at
// another barrier. 6: one block leaves early. 7: one block waits for itself alone. 8: reads past
// the end of the other's array.
__global__ void rotate(const int* in, int* out, int cluster, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  const int rank = blockIdx.x % cluster, next = variant == 4 ? rank + 1 : (rank + 1) % cluster;
  if (variant != 3) cluster_barrier();
  const int* others = in_block(tile, next);
  tile[t] = in[i];
  if (variant == 5 && t >= kThreads / 2) cluster_barrier();
  if (variant == 6 && rank == 1) return;
  if (variant == 7 && rank == 1) __syncthreads();
  if (variant == 7 && rank == 1 && t == 9) __syncthreads();
  if (variant != 1) cluster_barrier();
  out[i] = others[variant == 8 && t == kThreads - 1 ? kThreads : t];
  if (variant != 2) cluster_barrier();
}

// As rotate, with nothing but the own block: a barrier of the cluster is one of the block.
__global__ void reverse_alone(const int* in, int* out, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x, base = blockIdx.x * kThreads;
  tile[t] = in[base + t];
  if (variant != 1) cluster_barrier();
  out[base + t] = read_in_block(tile + kThreads - 1 - t, 0);
}

// Every thread adds up what all blocks have put out. 1: no barrier. 2: fences alone. 3: some
// threads wait for their cluster, which is their block. 4: one block leaves early.
__global__ void sum_over_grid(const int* in, int* partial, int* out, int variant) {
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  partial[i] = in[i];
  if (variant == 2) __threadfence();
  if (variant == 4 && blockIdx.x == 2) return;
  if (variant == 3 && t < 32)
    cluster_barrier();
  else if (variant != 1 && variant != 2)
    grid_barrier();
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block * kThreads + t];
  out[i] = sum;
}

// Every thread adds up what the blocks of its part have put out. 1: no barrier. 2: then half a
// part waits for itself. 3: some threads wait for the grid. 4: one block leaves early. 6: the
// count of blocks is not set to 0. 7: others may count themselves before it is. 8: something
// overwrites it.
__global__ void sum_over_parts(const int* in, int* partial, int* out, char* counts, int part,
                               int variant) {
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t, first = blockIdx.x / part * part;
  if (static_cast<int>(blockIdx.x) == first && t == 0 && variant != 6) *arrivals(counts, part) = 0;
  if (variant != 7) grid_barrier();
  partial[i] = in[i];
  if (variant == 8 && blockIdx.x == 1 && t == 5) *arrivals(counts, part) = 7;
  if (variant == 4 && blockIdx.x == 2) return;
  if (variant == 3 && t < 32)
    grid_barrier();
  else if (variant != 1)
    part_barrier(counts, part);
  if (variant == 2) part_barrier(counts, part / 2);
  int sum = 0;
  for (int block = first; block < first + part; ++block) sum += partial[block * kThreads + t];
  out[i] = sum;
}

// Sums of clusters, exchanged over the grid: both at once.
__global__ void sum_over_clusters(const int* in, int* partial, int* out, int cluster, int variant) {
  SharedCarver carver(dynamic_shared_memory());
  int* tile = carver.array<int>(kThreads, "tile");
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  tile[t] = in[i];
  cluster_barrier();
  int sum = 0;
  for (int rank = 0; rank < cluster; ++rank) sum += read_in_block(tile + t, rank);
  if (blockIdx.x % cluster == 0) partial[blockIdx.x / cluster * kThreads + t] = sum;
  if (variant == 1)
    cluster_barrier();
  else
    grid_barrier();
  int total = 0;
  for (unsigned i = 0; i < gridDim.x / cluster; ++i) total += partial[i * kThreads + t];
  out[i] = total;
}

__global__ void meet_often(int rounds) {
  for (int round = 0; round < rounds; ++round) cluster_barrier();
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* catalogue_rotate(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  const int cluster = n / kThreads / 2;  // two clusters, one after the other
  return try_together({cluster}, rotate, n / kThreads, kThreads, kTileBytes, in, out, cluster,
                      variant);
}

const char* catalogue_reverse_alone(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  return try_launch(reverse_alone, n / kThreads, kTileBytes, in, out, variant);
}

// 5: not launched as a kernel whose blocks cooperate.
const char* catalogue_sum_over_grid(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  std::vector<int> partial(n);
  emulator::watch(partial.data(), n * sizeof(int), "partial", true);
  return try_together({1, variant != 5}, sum_over_grid, n / kThreads, kThreads, 0, in,
                      partial.data(), out, variant);
}

// 5: not launched as a kernel whose blocks cooperate.
const char* catalogue_sum_over_parts(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  std::vector<int> partial(n);
  emulator::watch(partial.data(), n * sizeof(int), "partial", true);
  std::vector<char> counts(2 * cbam::cuda::kLineBytes, -1);
  emulator::watch(counts.data(), counts.size(), "counts", true);
  const int part = n / kThreads / 2;
  return try_together({1, variant != 5}, sum_over_parts, n / kThreads, kThreads, 0, in,
                      partial.data(), out, counts.data(), part, variant);
}

const char* catalogue_sum_over_clusters(int* in, int* out, int n, int variant) {
  const Arrays arrays(in, out, n);
  std::vector<int> partial(n);
  emulator::watch(partial.data(), n * sizeof(int), "partial", true);
  const int cluster = n / kThreads / 2;
  return try_together({cluster, true}, sum_over_clusters, n / kThreads, kThreads, kTileBytes, in,
                      partial.data(), out, cluster, variant);
}

const char* catalogue_meet_often(int blocks, int threads, int cluster, int cooperative,
                                 size_t shared_bytes, int rounds) {
  return try_together({cluster, cooperative != 0}, meet_often, blocks, threads, shared_bytes,
                      rounds);
}

void catalogue_allow_large_clusters(int allowed) {
  cudaFuncSetAttribute(meet_often, cudaFuncAttributeNonPortableClusterSizeAllowed, allowed);
}

int catalogue_blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  int blocks = -1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, meet_often, threads, shared_bytes);
  return blocks;
}

int catalogue_most_clusters(int threads, size_t shared_bytes, int cluster) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = -1;
  cudaOccupancyMaxActiveClusters(&clusters, meet_often, &config);
  return clusters;
}
}
#pragma GCC visibility pop
