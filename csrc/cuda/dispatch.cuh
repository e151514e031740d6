// From values known when a call is made to the template parameters of a kernel.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "../attention_math.h"
#include "../problem.h"
#include "kernels/kernels.h"

namespace cbam::cuda {

// How many dtypes there are kernels for: fewer in tests that would otherwise wait for the compiler.
#if !defined(CBAM_DTYPES)
#define CBAM_DTYPES 4
#endif

// Calls body(Type<T>()) for the storage type T of `dtype`.
template <class Body>
void with_storage(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32: return body(Type<float>());
#if CBAM_DTYPES > 1
    case DType::kFloat16: return body(Type<Half>());
#endif
#if CBAM_DTYPES > 2
    case DType::kFloat64: return body(Type<double>());
    case DType::kBFloat16: return body(Type<BFloat16>());
#else
    default: throw std::invalid_argument("dtype: this build has no kernels for it");
#endif
  }
}

// Calls body(std::true_type()) or body(std::false_type()).
template <class Body>
void with_bool(bool value, Body body) {
  if (value)
    body(std::true_type());
  else
    body(std::false_type());
}

// Calls body(Type<W>(), std::integral_constant<int, ...>()) for the MLP's weights and the samples
// of a walk over them.
template <class Body>
void with_walk(DType dtype, int samples, Body body) {
  with_storage(dtype, [&](auto weight) {
    if (samples == kFewSamples)
      body(weight, std::integral_constant<int, kFewSamples>());
    else
      body(weight, std::integral_constant<int, kSamplesPerWalk>());
  });
}

template <Access kAccess>
using AccessConstant = std::integral_constant<Access, kAccess>;

// Calls body(Type<T>(), AccessConstant<...>(), std::true_type() or std::false_type()). The planner
// reads packed rows only where channels come first, and float64 only one element at a time: it is
// there for checks.
template <class Body>
void with_layout(DType dtype, Access access, bool channels_first, Body body) {
  with_storage(dtype, [&](auto storage) {
    with_bool(channels_first, [&](auto first) {
      if constexpr (!std::is_same_v<decltype(storage), Type<double>>) {
        if (access == Access::kVector)
          return body(storage, AccessConstant<Access::kVector>(), first);
        if constexpr (first)
          if (access == Access::kPacked)
            return body(storage, AccessConstant<Access::kPacked>(), first);
      }
      body(storage, AccessConstant<Access::kScalar>(), first);
    });
  });
}

}  // namespace cbam::cuda
