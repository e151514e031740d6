// What was found wrong in a launch, and the report that the host gets.
#pragma once

#include <string>

#include "include/emulator_device.h"
#include "include/emulator_host.h"

namespace emulator {

struct Finding {
  std::string text;
  const void* code = nullptr;   // what follows the instruction that did it, where known
  std::string other_text = {};  // who else took part
  const void* other_code = nullptr;
};

// Adds a finding of the running thread; the launch goes on.
void report(Finding finding);

// Adds a finding and ends the launch: going on would crash or hang.
[[noreturn]] void fail(Finding finding);

bool anything_found();
// Forgets the findings of the launch before.
void clear_findings();
std::string describe_findings(const Launch& launch);

std::string describe(Place place);
std::string describe_index(const uint3& index);
std::string describe_thread(const uint3& block, const uint3& thread);

}  // namespace emulator
