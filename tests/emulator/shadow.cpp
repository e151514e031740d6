#include "shadow.h"

#include <sys/mman.h>

#include <new>
#include <stdexcept>

namespace emulator {

namespace {

constexpr size_t kArenaBytes = size_t{16} << 30;  // of addresses: pages come when touched

Cell* arena() {
  static Cell* const cells = [] {
    void* mapping = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    return static_cast<Cell*>(mapping);
  }();
  return cells;
}

size_t used_cells = 0;

}  // namespace

void restart_shadow() { used_cells = 0; }

void forget_shadow() { madvise(arena(), kArenaBytes, MADV_DONTNEED); }

void allocate_cells(Span* span) {
  span->cells = arena() + used_cells;
  used_cells += span->cell_count();
  if (used_cells * sizeof(Cell) > kArenaBytes)
    throw std::length_error("emulator: no room to watch `" + span->name + "` for races");
}

void refine_cells(Span* span, uintptr_t address, size_t bytes) {
  const Span coarse = *span;
  const int shift = __builtin_ctzll(address | bytes);
  const int factor_shift = span->granule_shift - shift;
  span->granule_shift = shift;
  for (Region* region : span->regions) region->granule_shift = shift;
  allocate_cells(span);
  // Untouched cells are old wherever they come from.
  if (!coarse.touched) return;
  for (size_t i = 0; i < span->cell_count(); ++i) span->cells[i] = coarse.cells[i >> factor_shift];
}

}  // namespace emulator
