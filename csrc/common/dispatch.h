// From a tensor's dtype to a C++ type: LVRPO_DISPATCH_FLOATING(dtype, scalar_t, [&] { ... scalar_t ... });
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "common/check.h"

namespace lvrpo {

// Sums and exponentials run in fp32 for every narrower type and in fp64 for fp64, which is what gradcheck needs.
template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
inline constexpr ScalarType acc_dtype = std::is_same_v<scalar_t, double> ? ScalarType::Double : ScalarType::Float;

}  // namespace lvrpo

#define LVRPO_DISPATCH_CASE(enum_type, cpp_type, scalar_t, ...) \
  case torch::headeronly::ScalarType::enum_type: {              \
    using scalar_t = cpp_type;                                  \
    __VA_ARGS__();                                              \
    break;                                                      \
  }

#define LVRPO_DISPATCH_FLOATING(dtype, scalar_t, ...)                                          \
  switch (dtype) {                                                                             \
    LVRPO_DISPATCH_CASE(Float, float, scalar_t, __VA_ARGS__)                                   \
    LVRPO_DISPATCH_CASE(Double, double, scalar_t, __VA_ARGS__)                                 \
    LVRPO_DISPATCH_CASE(BFloat16, torch::headeronly::BFloat16, scalar_t, __VA_ARGS__)          \
    LVRPO_DISPATCH_CASE(Half, torch::headeronly::Half, scalar_t, __VA_ARGS__)                  \
    default:                                                                                   \
      LVRPO_CHECK(false, "unsupported dtype ", torch::headeronly::toString(dtype));            \
  }

#define LVRPO_DISPATCH_ACC(dtype, scalar_t, ...)                                    \
  switch (dtype) {                                                                  \
    LVRPO_DISPATCH_CASE(Float, float, scalar_t, __VA_ARGS__)                        \
    LVRPO_DISPATCH_CASE(Double, double, scalar_t, __VA_ARGS__)                      \
    default:                                                                        \
      LVRPO_CHECK(false, "unsupported dtype ", torch::headeronly::toString(dtype)); \
  }
