// Between the dtypes of memory and the fp32 or fp64 of arithmetic. On the CPU by integer arithmetic throughout, because
// loops over torch's own conversions of the 16-bit types stay scalar; the results are those of torch, bit for bit.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "common/math.h"

namespace lvrpo {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

LVRPO_INLINE float load(const float* from) { return *from; }
LVRPO_INLINE double load(const double* from) { return *from; }
LVRPO_INLINE float load(const BFloat16* from) { return bits_as<float>(static_cast<uint32_t>(from->x) << 16); }

LVRPO_INLINE float load(const Half* from) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(from->x));
#else
  const uint32_t half = from->x, magnitude = (half & 0x7fffu) << 13;
  // fp32 biases its exponent by 112 more; infinity and NaN have the largest exponent of either.
  const uint32_t normal = magnitude + (magnitude < 0x0f800000u ? 0x38000000u : 0x70000000u);
  // A subnormal is units of 2^-24: put them behind a leading 1 worth 2^-14, and take that 1 off again.
  const float subnormal = bits_as<float>(magnitude + 0x38800000u) - 6.103515625e-05f;
  const uint32_t bits = magnitude < 0x00800000u ? bits_as<uint32_t>(subnormal) : normal;
  return bits_as<float>(bits | (half & 0x8000u) << 16);
#endif
}

LVRPO_INLINE void store(float* to, float value) { *to = value; }
LVRPO_INLINE void store(float* to, double value) { *to = static_cast<float>(value); }
LVRPO_INLINE void store(double* to, float value) { *to = value; }
LVRPO_INLINE void store(double* to, double value) { *to = value; }

LVRPO_INLINE void store(BFloat16* to, float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  // Round to nearest, ties to even; adding to a NaN could carry it into an infinity.
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->x = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

LVRPO_INLINE void store(Half* to, float value) {
#ifdef __CUDA_ARCH__
  to->x = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves a multiple of 2^-24, the unit of a subnormal, in the low bits: the addition does the rounding.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude < 0x47800000u ? half : 0x7c00u;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to->x = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
#endif
}

LVRPO_INLINE void store(BFloat16* to, double value) { store(to, static_cast<float>(value)); }
LVRPO_INLINE void store(Half* to, double value) { store(to, static_cast<float>(value)); }

}  // namespace lvrpo
