// What blocks of a cluster see of each other's shared memory.
#include <string>

#include "scheduler.h"

namespace emulator {

namespace {

std::string name_of(const SharedArray& array, const Block& block) {
  return std::string("in_block: `") + array.name + "` of block " + describe_index(block.index);
}

}  // namespace

const void* in_block(const void* shared, unsigned rank) {
  Block& own = *machine.block;
  const auto blocks = static_cast<unsigned>(own.cluster->blocks);
  if (rank >= blocks)
    fail({"in_block: rank " + std::to_string(rank) + " in a cluster of " + std::to_string(blocks)});
  const SharedArray* const mine = find_array(own, shared, 0);
  if (!mine) fail({"in_block: the address lies in no shared array of this block"});
  const Block& other = *machine.slots[static_cast<size_t>(own.cluster->first) + rank];
  if (!other.live) fail({name_of(*mine, other) + ", which has exited"});
  for (const SharedArray& theirs : other.shared)
    if (theirs.carved && theirs.offset == mine->offset && theirs.bytes == mine->bytes)
      return theirs.begin() + (static_cast<const char*>(shared) - mine->begin());
  fail({name_of(*mine, other) + ", which has not carved it yet"});
}

}  // namespace emulator
