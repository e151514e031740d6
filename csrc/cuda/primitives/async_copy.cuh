// Copies from global to shared memory that go on while threads do something else: bulk copies from
// compute capability 9.0 on, copies of 16 bytes by each thread from 8.0 on. Both end in an mbarrier
// in shared memory, whose phases alternate: wait(b, n % 2) returns once phase n has ended.
#pragma once

#include <cstdint>

#include "shared_storage.cuh"

#if defined(CBAM_EMULATED)
#include <cuda_runtime.h>

#include "emulator_device.h"
#endif

namespace cbam::cuda {

using CopyBarrier = uint64_t;

#if defined(CBAM_EMULATED)

using emulator::Place;

__device__ __forceinline__ void init(CopyBarrier* b, int arrivals, Place place = Place::here()) {
  emulator::mbarrier_init(b, static_cast<unsigned>(arrivals), place);
}
__device__ __forceinline__ void publish_inits() { emulator::mbarrier_publish_inits(); }
__device__ __forceinline__ void arrive_expecting(CopyBarrier* b, int bytes,
                                                 Place place = Place::here()) {
  emulator::mbarrier_arrive_expect(b, static_cast<unsigned>(bytes), place);
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, CopyBarrier* b,
                                          Place place = Place::here()) {
  emulator::bulk_copy(to, from, static_cast<unsigned>(bytes), b, place);
}
__device__ __forceinline__ void hand_over_to_bulk_copies() { emulator::proxy_fence(); }
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from,
                                              Place place = Place::here()) {
  emulator::async_copy(to, from, 16, place);
}
__device__ __forceinline__ void arrive_after_copies(CopyBarrier* b, Place place = Place::here()) {
  emulator::mbarrier_arrive_after_copies(b, place);
}
__device__ __forceinline__ void wait(CopyBarrier* b, int parity, Place place = Place::here()) {
  emulator::mbarrier_wait(b, static_cast<unsigned>(parity), place);
}

#elif defined(__CUDACC__)

// A phase ends when so many threads have arrived and all bytes that they expect are there.
__device__ __forceinline__ void init([[maybe_unused]] CopyBarrier* b,
                                     [[maybe_unused]] int arrivals) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
               : "memory");
#endif
}

// By the thread that initialised them, before the barrier after which others use them.
__device__ __forceinline__ void publish_inits() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive_expecting([[maybe_unused]] CopyBarrier* b,
                                                 [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
#endif
}

// Addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_copy([[maybe_unused]] void* to,
                                          [[maybe_unused]] const void* from,
                                          [[maybe_unused]] int bytes,
                                          [[maybe_unused]] CopyBarrier* b) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(b))
      : "memory");
#endif
}

// By all threads that used shared memory, before the barrier behind which a bulk copy writes it:
// barriers order what goes through the same proxy, and a bulk copy goes through another one.
__device__ __forceinline__ void hand_over_to_bulk_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Past the first-level cache: nothing reads it again.
__device__ __forceinline__ void copy_16_bytes([[maybe_unused]] void* to,
                                              [[maybe_unused]] const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#endif
}

// This thread's arrival, once all its copies so far have ended.
__device__ __forceinline__ void arrive_after_copies([[maybe_unused]] CopyBarrier* b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b))
               : "memory");
#endif
}

__device__ __forceinline__ void wait([[maybe_unused]] CopyBarrier* b, [[maybe_unused]] int parity) {
#if __CUDA_ARCH__ >= 800
  unsigned ended = 0;
  while (!ended)
    asm volatile(
        "{\n"
        " .reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
        " mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
        " mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
        " selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
#endif
}

#endif

}  // namespace cbam::cuda
