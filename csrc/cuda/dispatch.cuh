// From values known when a call is made to the template parameters of a kernel.
#pragma once

#include <type_traits>

#include "../attention_math.h"
#include "../problem.h"
#include "kernels/kernels.h"

namespace cbam::cuda {

// Calls body(Type<T>()) for the storage type T of `dtype`.
template <class Body>
void with_storage(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32: return body(Type<float>());
    case DType::kFloat64: return body(Type<double>());
    case DType::kFloat16: return body(Type<Half>());
    case DType::kBFloat16: return body(Type<BFloat16>());
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

// Calls body with one of the three as a std::integral_constant.
template <class Body>
void with_access(Access access, Body body) {
  switch (access) {
    case Access::kScalar: return body(std::integral_constant<Access, Access::kScalar>());
    case Access::kVector: return body(std::integral_constant<Access, Access::kVector>());
    case Access::kPacked: return body(std::integral_constant<Access, Access::kPacked>());
  }
}

}  // namespace cbam::cuda
