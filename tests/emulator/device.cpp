#include "device.h"

#include <algorithm>
#include <cstdint>
#include <unordered_map>

#include "emulator.h"
#include "ready.h"
#include "status.h"

namespace emulator {

namespace {

constexpr size_t kSharedWithoutOptIn = 48 * 1024;
constexpr size_t kMostShared = 227 * 1024;
constexpr unsigned kMostBlocksYZ = 65535;

// Of a multiprocessor.
constexpr size_t kSharedOfMultiprocessor = 228 * 1024;
constexpr size_t kReservedShared = 1024;  // of a block
constexpr int kThreadsOfMultiprocessor = 2048;
constexpr int kBlocksOfMultiprocessor = 32;

constexpr int kGroup = 16;  // multiprocessors, of which a cluster uses those of one group
constexpr int kMostGroups = 8;
constexpr unsigned kPortableCluster = 8;
constexpr unsigned kMostCluster = 16;

struct OptIn {
  size_t shared_bytes = 0;
  bool large_clusters = false;
};

std::unordered_map<const void*, OptIn> opt_ins;
int multiprocessors = 132;
bool cooperates = true;

uint64_t count(const dim3& extent) { return uint64_t{extent.x} * extent.y * extent.z; }

std::string text_of(const dim3& extent) {
  return "(" + std::to_string(extent.x) + "," + std::to_string(extent.y) + "," +
         std::to_string(extent.z) + ")";
}

int blocks_per_multiprocessor(uint64_t threads, size_t shared_bytes) {
  const uint64_t warps = (threads + kWarpLanes - 1) / kWarpLanes;
  const uint64_t by_threads =
      kThreadsOfMultiprocessor / (std::max<uint64_t>(warps, 1) * kWarpLanes);
  const uint64_t by_shared = kSharedOfMultiprocessor / (shared_bytes + kReservedShared);
  return static_cast<int>(std::min({by_threads, by_shared, uint64_t{kBlocksOfMultiprocessor}}));
}

int most_clusters(uint64_t threads, size_t shared_bytes, unsigned cluster) {
  const int blocks = blocks_per_multiprocessor(threads, shared_bytes);
  int clusters = 0;
  for (int group = 0; group < kMostGroups; ++group) {
    const int left = std::max(multiprocessors - group * kGroup, 0);
    clusters += std::min(left, kGroup) * blocks / static_cast<int>(cluster);
  }
  return clusters;
}

BrokenLimit extent_broken(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const cudaError_t status = cudaErrorInvalidConfiguration;
  if (count(block) < 1 || count(block) > kMostThreads || block.z > 64)
    return {status, std::to_string(count(block)) + " threads in a block, of 1 to 1024"};
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > kMostBlocksYZ ||
      grid.z > kMostBlocksYZ)
    return {status, "grid of " + text_of(grid) + " blocks, of 1 to (2147483647,65535,65535)"};
  return {};
}

BrokenLimit shared_memory_broken(const Launch& launch) {
  const std::string bytes = std::to_string(launch.shared_bytes) + " bytes of shared memory";
  const cudaError_t status = cudaErrorInvalidConfiguration;
  if (launch.shared_bytes > kMostShared)
    return {status, bytes + ", of at most " + std::to_string(kMostShared)};
  if (launch.shared_bytes > kSharedWithoutOptIn &&
      launch.shared_bytes > opt_ins[launch.kernel].shared_bytes)
    return {status,
            bytes + "; above 49152 a kernel needs cudaFuncAttributeMaxDynamicSharedMemorySize"};
  return {};
}

BrokenLimit cluster_broken(const Launch& launch) {
  const dim3& cluster = launch.cluster;
  const cudaError_t status = cudaErrorInvalidClusterSize;
  if (cluster.x < 1 || cluster.y != 1 || cluster.z != 1 || cluster.x > kMostCluster)
    return {status, "cluster of " + text_of(cluster) + " blocks, of 1 to (16,1,1)"};
  if (cluster.x > kPortableCluster && !opt_ins[launch.kernel].large_clusters)
    return {status, "cluster of " + text_of(cluster) +
                        " blocks; above 8 a kernel needs "
                        "cudaFuncAttributeNonPortableClusterSizeAllowed"};
  if (launch.grid.x % cluster.x)
    return {cudaErrorInvalidConfiguration,
            "grid of " + text_of(launch.grid) + " blocks in clusters of " + text_of(cluster)};
  return {};
}

BrokenLimit room_broken(const Launch& launch) {
  const unsigned cluster = launch.cluster.x;
  if (cluster == 1 || most_clusters(count(launch.block), launch.shared_bytes, cluster)) return {};
  return {cudaErrorInvalidClusterSize,
          "no cluster of " + std::to_string(cluster) + " such blocks fits the device"};
}

BrokenLimit cooperation_broken(const Launch& launch) {
  if (!launch.cooperative) return {};
  if (!cooperates) return {cudaErrorNotSupported, "the device has no cooperative launches"};
  const uint64_t most =
      static_cast<uint64_t>(blocks_per_multiprocessor(count(launch.block), launch.shared_bytes)) *
      static_cast<uint64_t>(multiprocessors);
  if (count(launch.grid) <= most) return {};
  return {cudaErrorCooperativeLaunchTooLarge,
          std::to_string(count(launch.grid)) +
              " blocks that cooperate, of which the device holds " + std::to_string(most)};
}

cudaError_t refused(const std::string& text) { return failure(cudaErrorInvalidValue, text); }

}  // namespace

BrokenLimit limit_broken(const Launch& launch) {
  if (!launch.known_attributes)
    return {cudaErrorInvalidValue, "an attribute that the emulator does not know"};
  for (const auto& broken :
       {extent_broken, shared_memory_broken, cluster_broken, room_broken, cooperation_broken})
    if (const BrokenLimit found = broken(launch); found.status != cudaSuccess) return found;
  return {};
}

Launch launch_of(const cudaLaunchConfig_t& config, const void* kernel) {
  Launch launch = {config.gridDim, config.blockDim, config.dynamicSmemBytes};
  launch.known_attributes = true;
  launch.kernel = kernel;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    switch (attribute.id) {
      case cudaLaunchAttributeCooperative:
        launch.cooperative = attribute.val.cooperative != 0;
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        launch.overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
        break;
      case cudaLaunchAttributeClusterDimension: {
        const auto& cluster = attribute.val.clusterDim;
        launch.cluster = dim3(cluster.x, cluster.y, cluster.z);
        break;
      }
      default: launch.known_attributes = false;
    }
  }
  return launch;
}

}  // namespace emulator

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  emulator::OptIn& opt_in = emulator::opt_ins[kernel];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || static_cast<size_t>(value) > emulator::kMostShared)
        return emulator::refused("cannot opt in to " + std::to_string(value) +
                                 " bytes of shared memory, of at most " +
                                 std::to_string(emulator::kMostShared));
      opt_in.shared_bytes = static_cast<size_t>(value);
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout: return cudaSuccess;  // there is no cache
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      opt_in.large_clusters = value != 0;
      return cudaSuccess;
  }
  return emulator::refused("an attribute of a kernel that the emulator does not know");
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device) return emulator::refused("a device that the emulator does not have");
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::multiprocessors; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = emulator::cooperates; return cudaSuccess;
  }
  return emulator::refused("an attribute of a device that the emulator does not know");
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared_bytes) {
  if (threads < 1) return emulator::refused("occupancy of blocks without threads");
  *blocks = emulator::blocks_per_multiprocessor(static_cast<uint64_t>(threads), shared_bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const emulator::Launch launch = emulator::launch_of(*config, kernel);
  const emulator::BrokenLimit broken = emulator::cluster_broken(launch);
  if (broken.status != cudaSuccess) return emulator::failure(broken.status, broken.text);
  *clusters =
      emulator::most_clusters(emulator::count(launch.block), launch.shared_bytes, launch.cluster.x);
  return cudaSuccess;
}

extern "C" int emulator_set_multiprocessors(int count) {
  if (count < 1) return -1;
  emulator::multiprocessors = count;
  return 0;
}

extern "C" void emulator_set_cooperative_launch(int possible) {
  emulator::cooperates = possible != 0;
}
