// Which accesses conflict: by memory that two threads touch, at least one of them writing, with
// nothing that orders them.
#include "races.h"

#include <algorithm>
#include <string>
#include <vector>

#include "access.h"
#include "clocks.h"

namespace emulator {

namespace {

// Pairs of instructions already reported in this launch.
std::vector<std::pair<uint32_t, uint32_t>> reported;

bool first_report(uint32_t code, uint32_t other_code) {
  const std::pair<uint32_t, uint32_t> pair(code, other_code);
  if (std::find(reported.begin(), reported.end(), pair) != reported.end()) return false;
  reported.push_back(pair);
  return true;
}

std::string describe(const Span& span, const Cell& cell, const Access& access) {
  const uintptr_t address =
      span.origin() + (static_cast<uintptr_t>(&cell - span.cells) << span.granule_shift);
  const Region* region = span.shared ? nullptr : region_of(span, access);
  const std::string& name = region ? region->count->name : span.name;
  const uintptr_t begin = region ? region->begin : span.begin;
  std::string text = "`" + name + "` + " + std::to_string(std::max(address, begin) - begin);
  if (span.shared && span.block != machine.block)
    text += " in block " + describe_index(span.block->index);
  return text;
}

std::string describe_actor(const Moment& moment) {
  const uint3 block = block_index(executed_block(position_of(moment.thread)));
  if (is_thread(moment.thread))
    return describe_thread(block, thread_index(number_of(moment.thread)));
  return "the copy that block " + describe_index(block) + " started";
}

void report_race(const char* kind, const Span& span, const Cell& cell, const Access& access,
                 const Moment& other) {
  if (!first_report(access.code, other.code)) return;
  report({std::string("race: ") + kind + " of " + describe(span, cell, access),
          code_address(access.code), "nothing orders it after " + describe_actor(other),
          code_address(other.code)});
}

void report_uninitialised(const Span& span, const Cell& cell, const Access& access) {
  if (!first_report(access.code, 0)) return;
  report({"uninitialised: read of " + describe(span, cell, access) + ", which no thread wrote",
          code_address(access.code)});
}

bool is_now(const Moment& moment, const Moment& now) {
  return moment.thread == now.thread && moment.epoch == now.epoch;
}

bool same_warp(const Moment& a, const Moment& b) {
  return position_of(a.thread) == position_of(b.thread) &&
         number_of(a.thread) / kWarpLanes == number_of(b.thread) / kWarpLanes;
}

// Keeps readers that no other one kept stands for, of different warps where there is a choice.
void remember_read(Moment (&reads)[2], uint32_t floor, const Moment& now) {
  for (Moment& read : reads) {
    if (read.thread <= floor || happened_before(read, now)) {
      read = now;
      return;
    }
  }
  if (same_warp(reads[0], reads[1])) reads[1] = now;
}

void check_read(Span& span, Cell& cell, const Access& access, const Moment& now) {
  if (is_now(cell.reads[0], now) || is_now(cell.reads[1], now)) return;
  if (cell.write.thread <= span.floor) {
    if (span.shared) report_uninitialised(span, cell, access);
  } else if (!happened_before(cell.write, now)) {
    report_race("read after write", span, cell, access, cell.write);
  }
  remember_read(cell.reads, span.floor, now);
}

void check_write(Span& span, Cell& cell, const Access& access, const Moment& now) {
  const bool written = cell.write.thread > span.floor;
  const bool both_atomic = now.atomic && cell.write.atomic;
  if (!written && now.atomic && span.shared) report_uninitialised(span, cell, access);
  if (written && !both_atomic && !happened_before(cell.write, now))
    report_race("write after write", span, cell, access, cell.write);
  for (Moment& read : cell.reads) {
    if (read.thread > span.floor && !happened_before(read, now))
      report_race("write after read", span, cell, access, read);
    read.thread = 0;
  }
  cell.write = now;
}

void check_proxy(const Span& span, const Cell& cell, const Access& access, const Moment& other) {
  const Moment now{current_serial(), current_epoch(), 0, 0};
  const bool of_thread = other.thread > span.floor && is_thread(other.thread);
  if (!of_thread || !happened_before(other, now) || handed_over(other)) return;
  if (!first_report(access.code, other.code)) return;
  report({"proxy: bulk copy into " + describe(span, cell, access), code_address(access.code),
          "no hand_over_to_bulk_copies stands behind the access of " + describe_actor(other),
          code_address(other.code)});
}

}  // namespace

void check_proxies(const Span& span, const Access& access) {
  const uintptr_t offset = access.address - span.origin();
  const Cell* cell = span.cells + (offset >> span.granule_shift);
  const Cell* const last = span.cells + ((offset + access.bytes - 1) >> span.granule_shift);
  for (; cell <= last; ++cell)
    for (const Moment& other : {cell->reads[0], cell->reads[1], cell->write})
      check_proxy(span, *cell, access, other);
}

void forget_reported_races() { reported.clear(); }

void check_exit(const Span& span) {
  const Moment now{current_serial(), current_epoch(), 0, 0};
  for (size_t i = 0; i < span.cell_count(); ++i)
    for (const Moment& read : span.cells[i].reads) {
      if (read.thread <= span.floor || happened_before(read, now)) continue;
      report({"race: the block exits after a read of `" + span.name + "`", nullptr,
              "nothing orders it after " + describe_actor(read), code_address(read.code)});
      return;
    }
}

void replace_moments(Span& span, const Access& access, const Moment& before, const Moment& moment) {
  const auto replace = [&](Moment& found) {
    if (!is_now(found, before)) return;
    found.thread = moment.thread;
    found.epoch = moment.epoch;
  };
  const uintptr_t offset = access.address - span.origin();
  Cell* cell = span.cells + (offset >> span.granule_shift);
  Cell* const last = span.cells + ((offset + access.bytes - 1) >> span.granule_shift);
  for (; cell <= last; ++cell) {
    if (access.kind == Access::kWrite) {
      replace(cell->write);
    } else {
      replace(cell->reads[0]);
      replace(cell->reads[1]);
    }
  }
}

void check_races(Span& span, const Access& access) {
  const size_t granule = size_t{1} << span.granule_shift;
  if ((access.address | access.bytes) & (granule - 1) &&
      span.granule_shift > __builtin_ctzll(access.address | access.bytes))
    refine_cells(&span, access.address, access.bytes);
  span.touched = true;

  const Moment now{current_serial(), current_epoch(), access.code,
                   access.kind == Access::kAtomic ? 1u : 0u};
  const uintptr_t offset = access.address - span.origin();
  Cell* cell = span.cells + (offset >> span.granule_shift);
  Cell* const last = span.cells + ((offset + access.bytes - 1) >> span.granule_shift);
  if (access.kind == Access::kRead) {
    for (; cell <= last; ++cell) check_read(span, *cell, access, now);
  } else {
    for (; cell <= last; ++cell) check_write(span, *cell, access, now);
  }
}

}  // namespace emulator
