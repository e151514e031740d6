// What a test or the host side of a backend tells the emulator: the schedule, and which memory a
// kernel may touch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

enum class Order { kAscending, kDescending, kRandom };

// Who runs next, among blocks, warps and lanes. Every schedule is one that a GPU might take.
struct Schedule {
  Order order = Order::kAscending;
  uint64_t seed = 0;  // of kRandom
};

void set_schedule(const Schedule& schedule);

// Lets kernels read, and if `writable` write, these bytes of global memory. The race build reports
// every other access and counts the bytes read and written under `name`; the other builds look at
// nothing. Where regions overlap, the first that allows an access counts.
void watch(const void* begin, size_t bytes, const char* name, bool writable);
void unwatch_all();

}  // namespace emulator

#pragma GCC visibility push(default)
extern "C" {

// "ascending", "descending" or "random:SEED"; 0, or -1 for any other text. A process starts with
// the one in CBAM_CUDA_EMULATOR_SCHEDULE.
int emulator_set_schedule(const char* text);

// One line "name read written" for each watched name, in bytes, since the last reset.
const char* emulator_counts();
unsigned long long emulator_launches();
// How many of these bytes the last launch brought to a cache; and the bytes of all that launches
// since the last reset have asked for, whatever they asked for twice.
unsigned long long emulator_prefetched(const void* begin, size_t bytes);
unsigned long long emulator_prefetched_bytes();
void emulator_reset_counts();

// Of the emulated device, 132 to begin with: 16 of them form a group, of at most 8, that a cluster
// must fit in; how many blocks they hold limits cooperative launches. 0, or -1 for less than one.
int emulator_set_multiprocessors(int count);
// Whether it takes cooperative launches, as it does to begin with.
void emulator_set_cooperative_launch(int possible);

// "plain", "asan" or "race".
const char* emulator_kind();
}
#pragma GCC visibility pop
