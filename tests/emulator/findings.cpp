#include "findings.h"

#include <dlfcn.h>

#include <cstdio>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace emulator {

namespace {

constexpr size_t kMostFindings = 20;

std::vector<Finding> findings;
size_t left_out = 0;

std::string describe(const dim3& extent) { return describe_index({extent.x, extent.y, extent.z}); }

std::string read_line(FILE* stream) {
  std::string line;
  for (int c; (c = fgetc(stream)) != EOF && c != '\n';) line += static_cast<char>(c);
  return line;
}

struct SourceLine {
  std::string function;  // the outermost, into which the others were inlined
  std::string place;     // the innermost that is no mere name for an operation
};

bool is_wrapper(const std::string& place) {
  return place.find("/emulator/include/") != std::string::npos ||
         place.find("/primitives/async_copy.cuh:") != std::string::npos ||
         place.find("/primitives/team.cuh:") != std::string::npos;
}

// Asks addr2line, which stands beside every assembler; without it gives file and offset.
SourceLine source_line(const void* code) {
  Dl_info object = {};
  if (!dladdr(code, &object) || !object.dli_fname) return {"?", "?"};
  const size_t offset = static_cast<const char*>(code) - static_cast<const char*>(object.dli_fbase);
  char position[32];
  snprintf(position, sizeof position, "0x%zx", offset);
  SourceLine found{"?", std::string(object.dli_fname) + "+" + position};
  const std::string command =
      "addr2line -C -f -i -e '" + std::string(object.dli_fname) + "' " + position + " 2>/dev/null";
  FILE* answer = popen(command.c_str(), "r");
  if (!answer) return found;
  bool found_place = false;
  for (;;) {
    const std::string function = read_line(answer), place = read_line(answer);
    if (place.empty()) break;
    found.function = function;
    if (found_place || place[0] == '?') continue;
    found.place = place.substr(0, place.find(" (discriminator"));
    found_place = !is_wrapper(place);
  }
  pclose(answer);
  return found;
}

// The function goes without saying where it is the kernel.
std::string with_source_line(const std::string& text, const void* code, const std::string& kernel) {
  if (!code) return text;
  // A return address is one past the instruction.
  const SourceLine line = source_line(static_cast<const char*>(code) - 1);
  return text + " at " + line.place + (line.function == kernel ? "" : " in " + line.function);
}

void add(Finding finding) {
  finding.text = describe_thread(blockIdx, threadIdx) + ": " + finding.text;
  findings.push_back(std::move(finding));
}

}  // namespace

std::string describe_index(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

std::string describe_thread(const uint3& block, const uint3& thread) {
  return "block " + describe_index(block) + " thread " + describe_index(thread);
}

std::string describe(Place place) {
  return std::string(place.file) + ":" + std::to_string(place.line);
}

void report(Finding finding) {
  if (findings.size() < kMostFindings)
    add(std::move(finding));
  else
    ++left_out;
}

void fail(Finding finding) {
  add(std::move(finding));  // however many there are: this one explains the end
  abandon_launch();
}

bool anything_found() { return !findings.empty(); }

void clear_findings() {
  findings.clear();
  left_out = 0;
}

std::string describe_findings(const Launch& launch) {
  const std::string kernel = source_line(launch.kernel).function;
  std::string text = "kernel " + kernel + ", grid " + describe(launch.grid) + ", block " +
                     describe(launch.block) + ", " + std::to_string(launch.shared_bytes) +
                     " bytes of shared memory";
  for (const Finding& finding : findings) {
    text += "\n  " + with_source_line(finding.text, finding.code, kernel);
    if (!finding.other_text.empty())
      text += "; " + with_source_line(finding.other_text, finding.other_code, kernel);
  }
  if (left_out) text += "\n  and " + std::to_string(left_out) + " more";
  return text;
}

}  // namespace emulator
