// How functions in headers are declared, so that every CPU target and nvcc compile their own copy:
// one copy of an inline function that a linker picked might be compiled for another processor.
#pragma once

#if defined(__CUDACC__)
#define CBAM_INLINE __host__ __device__ __forceinline__
#define CBAM_INLINE_MEMBER __host__ __device__ __forceinline__
#else
#define CBAM_INLINE static inline __attribute__((always_inline))
#define CBAM_INLINE_MEMBER inline __attribute__((always_inline))
#endif
