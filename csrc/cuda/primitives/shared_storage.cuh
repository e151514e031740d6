// Shared memory: one dynamic block a launch, carved by a class that host and device share, so that
// the planner asks for exactly what the kernel takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

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

// As instructions on shared memory alone take it.
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
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

// Where the arrays of a block stand: laid out by the host and handed to the kernel, for kernels
// that have so many that their addresses would fill the registers.
struct SharedLayout {
  static constexpr int kMost = 32;
  int32_t offset[kMost];
};

// Lays out, as SharedCarver counts.
class LayoutCarver {
 public:
  explicit LayoutCarver(SharedLayout& layout) : layout_(layout), carver_(nullptr) {}

  template <class E>
  E* array(int64_t count, const char* name) {
    if (next_ == SharedLayout::kMost) throw std::logic_error("SharedLayout: too many arrays");
    layout_.offset[next_++] = static_cast<int32_t>(carver_.bytes());
    return carver_.array<E>(count, name);
  }
  size_t bytes() const { return carver_.bytes(); }

 private:
  SharedLayout& layout_;
  SharedCarver carver_;
  int next_ = 0;
};

// Hands out what was laid out, to the same calls.
class LaidOutCarver {
 public:
  CBAM_INLINE_MEMBER LaidOutCarver(unsigned char* base, const SharedLayout& layout)
      : base_(base), layout_(layout) {}

  template <class E>
  CBAM_INLINE_MEMBER E* array([[maybe_unused]] int64_t count, [[maybe_unused]] const char* name) {
    const int32_t offset = layout_.offset[next_++];
#if defined(CBAM_EMULATED)
    const size_t bytes = static_cast<size_t>(count) * sizeof(E);
    return static_cast<E*>(emulator::shared_array(static_cast<size_t>(offset), bytes, name));
#else
    return reinterpret_cast<E*>(base_ + offset);
#endif
  }

 private:
  [[maybe_unused]] unsigned char* base_;
  const SharedLayout& layout_;
  int next_ = 0;
};

}  // namespace cbam::cuda
