// Shared memory: one dynamic block a launch, carved by a class that host and device share, so that
// the planner asks for exactly what the kernel takes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../inline.h"

#if defined(CBAM_EMULATED)
#include "emulator_device.h"
#endif

namespace cbam::cuda {

#if defined(CBAM_EMULATED)
CBAM_INLINE unsigned char* dynamic_shared_memory() { return emulator::dynamic_shared_memory(); }
#elif defined(__CUDACC__)
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char cbam_shared_memory[];
  return cbam_shared_memory;
}
#endif

// Hands out 16-byte aligned arrays from `base`; with base null it only adds up what they need.
// Every thread of a block carves the same arrays in the same order.
class SharedCarver {
 public:
  CBAM_INLINE_MEMBER explicit SharedCarver(unsigned char* base) : base_(base) {}

  template <class E>
  CBAM_INLINE_MEMBER E* array(int64_t count, [[maybe_unused]] const char* name) {
    const size_t offset = used_, bytes = static_cast<size_t>(count) * sizeof(E);
    used_ = (offset + bytes + 15) / 16 * 16;
#if !defined(__CUDA_ARCH__)
    // Not on a device: after a test for null the compiler no longer knows that this is shared
    // memory.
    if (!base_) return nullptr;
#endif
#if defined(CBAM_EMULATED)
    // A slot of its own, poisoned, between red zones; an error where the launch asked for too
    // little.
    return static_cast<E*>(emulator::shared_array(offset, bytes, name));
#else
    return reinterpret_cast<E*>(base_ + offset);
#endif
  }
  CBAM_INLINE_MEMBER size_t bytes() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

}  // namespace cbam::cuda
