// The host's side: the CUDA runtime's functions, and the ones that tests call.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "emulator.h"
#include "findings.h"
#include "races.h"
#include "regions.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr size_t kSharedWithoutOptIn = 48 * 1024;
constexpr size_t kMostShared = 227 * 1024;
constexpr unsigned kMostBlocksYZ = 65535;

std::mutex one_launch;
std::unordered_map<const void*, size_t> shared_opt_in;
unsigned long long launches = 0;

// The launch that failed last, and why; CUDA keeps the status until it is asked for.
cudaError_t last_status = cudaSuccess;
std::string last_report;

bool parse_schedule(const char* text, Schedule* schedule) {
  if (!std::strcmp(text, "ascending")) {
    *schedule = {Order::kAscending, 0};
    return true;
  }
  if (!std::strcmp(text, "descending")) {
    *schedule = {Order::kDescending, 0};
    return true;
  }
  constexpr char kRandomPrefix[] = "random:";
  constexpr size_t kPrefixLength = sizeof kRandomPrefix - 1;
  if (std::strncmp(text, kRandomPrefix, kPrefixLength)) return false;
  char* end;
  const uint64_t seed = std::strtoull(text + kPrefixLength, &end, 10);
  if (!text[kPrefixLength] || *end) return false;
  *schedule = {Order::kRandom, seed};
  return true;
}

// What a launch must keep to on any device; empty where it does.
std::string limit_broken(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || block.z > 64)
    return std::to_string(threads) + " threads in a block, of 1 to 1024";
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > kMostBlocksYZ ||
      grid.z > kMostBlocksYZ)
    return "grid of (" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," +
           std::to_string(grid.z) + ") blocks, of 1 to (2147483647,65535,65535)";
  if (launch.shared_bytes > kMostShared)
    return std::to_string(launch.shared_bytes) + " bytes of shared memory, of at most " +
           std::to_string(kMostShared);
  if (launch.shared_bytes > kSharedWithoutOptIn &&
      launch.shared_bytes > shared_opt_in[launch.kernel])
    return std::to_string(launch.shared_bytes) +
           " bytes of shared memory; above 49152 a kernel needs "
           "cudaFuncAttributeMaxDynamicSharedMemorySize";
  return "";
}

// A wrong text in the environment fails the first launch.
std::string read_environment() {
  const char* text = std::getenv("CBAM_CUDA_EMULATOR_SCHEDULE");
  if (!text || parse_schedule(text, &machine.schedule)) return "";
  return std::string(
             "CBAM_CUDA_EMULATOR_SCHEDULE: expected ascending, descending or random:SEED, "
             "got ") +
         text;
}

std::string& environment_error() {
  static std::string error = read_environment();
  return error;
}

cudaError_t failure(cudaError_t status, std::string report) {
  last_report = std::move(report);
  return last_status = status;
}

}  // namespace

void set_schedule(const Schedule& schedule) {
  environment_error().clear();
  machine.schedule = schedule;
}

cudaError_t run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (!environment_error().empty()) return failure(cudaErrorInvalidValue, environment_error());
  const std::string broken = limit_broken(launch);
  if (!broken.empty()) return failure(cudaErrorInvalidConfiguration, "cannot launch: " + broken);
  ++launches;
  clear_findings();
  run_blocks(launch);
  if (!anything_found()) return cudaSuccess;
  return failure(cudaErrorLaunchFailure, describe_findings(launch));
}

void fence() { races::fence(); }

__attribute__((noinline)) uint64_t begin_atomic(const void* p, size_t bytes, Place place) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) misaligned_access(p, bytes, bytes, place);
  races::atomic(p, bytes, __builtin_return_address(0));
  uint64_t value = 0;
  std::memcpy(&value, p, bytes);
  return value;
}

void end_atomic(void* p, size_t bytes, uint64_t value) { std::memcpy(p, &value, bytes); }

void misaligned_access(const void* p, size_t bytes, size_t alignment, Place place) {
  char address[32];
  snprintf(address, sizeof address, "%p", p);
  fail({"misaligned access of " + std::to_string(bytes) + " bytes at address " + address +
        ", which is no multiple of " + std::to_string(alignment) + ", at " + describe(place)});
}

}  // namespace emulator

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_status, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulator::last_report.c_str();
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > emulator::kMostShared)
    return emulator::failure(cudaErrorInvalidValue, "cannot opt in to " + std::to_string(value) +
                                                        " bytes of shared memory, of at most " +
                                                        std::to_string(emulator::kMostShared));
  emulator::shared_opt_in[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

extern "C" {

int emulator_set_schedule(const char* text) {
  emulator::Schedule schedule;
  if (!emulator::parse_schedule(text, &schedule)) return -1;
  emulator::set_schedule(schedule);
  return 0;
}

const char* emulator_counts() {
  static std::string text;
  text = emulator::describe_counts();
  return text.c_str();
}

unsigned long long emulator_launches() { return emulator::launches; }

void emulator_reset_counts() {
  emulator::reset_counts();
  emulator::launches = 0;
}

const char* emulator_kind() {
#if defined(CBAM_EMULATOR_RACE)
  return "race";
#elif defined(__SANITIZE_ADDRESS__)
  return "asan";
#else
  return "plain";
#endif
}
}
