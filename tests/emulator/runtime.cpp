// The host's side: the CUDA runtime's functions, and the ones that tests call.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "device.h"
#include "emulator.h"
#include "findings.h"
#include "races.h"
#include "regions.h"
#include "scheduler.h"
#include "status.h"

namespace emulator {

namespace {

std::mutex one_launch;
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

}  // namespace

cudaError_t failure(cudaError_t status, std::string report) {
  last_report = std::move(report);
  return last_status = status;
}

void set_schedule(const Schedule& schedule) {
  environment_error().clear();
  machine.schedule = schedule;
}

cudaError_t run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (!environment_error().empty()) return failure(cudaErrorInvalidValue, environment_error());
  const BrokenLimit broken = limit_broken(launch);
  if (broken.status != cudaSuccess) return failure(broken.status, "cannot launch: " + broken.text);
  ++launches;
  prefetched.clear();
  clear_findings();
  run_blocks(launch);
  if (!anything_found()) return cudaSuccess;
  return failure(cudaErrorLaunchFailure, describe_findings(launch));
}

void fence() { races::fence(); }
void proxy_fence() { races::proxy_fence(); }

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
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulator::last_report.c_str();
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

unsigned long long emulator_prefetched(const void* begin, size_t bytes) {
  std::vector<emulator::Prefetched> pieces = emulator::prefetched;
  std::sort(pieces.begin(), pieces.end(),
            [](const auto& a, const auto& b) { return a.begin < b.begin; });
  auto next = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t end = next + bytes;
  unsigned long long found = 0;
  for (const emulator::Prefetched& piece : pieces) {
    const uintptr_t from = std::max(piece.begin, next);
    const uintptr_t to = std::min(piece.begin + piece.bytes, end);
    if (from >= to) continue;
    found += to - from;
    next = to;
  }
  return found;
}

unsigned long long emulator_prefetched_bytes() { return emulator::prefetched_bytes; }

void emulator_reset_counts() {
  emulator::reset_counts();
  emulator::launches = 0;
  emulator::prefetched_bytes = 0;
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
