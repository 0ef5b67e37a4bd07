// Elementary functions, one copy for the CPU and for CUDA: arithmetic on numbers that fits a vector lane or a thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define LVRPO_INLINE __host__ __device__ __forceinline__
#else
#define LVRPO_INLINE inline __attribute__((always_inline))
#endif

namespace lvrpo {

template <typename to_t, typename from_t>
LVRPO_INLINE to_t bits_as(from_t value) {
  static_assert(sizeof(to_t) == sizeof(from_t));
  to_t result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// e^x as whole * (1 + excess) with whole = 2^n, the power of 2 next to it. The excess keeps its digits near x = 0, where
// e^x - 1 would lose them. A NaN stays a NaN.
template <typename acc>
struct ExpParts {
  acc whole, excess;
};

// Where e^x is about to be subnormal and exp_bounded(x) becomes 0.
template <typename acc>
inline constexpr acc exp_lowest = std::is_same_v<acc, double> ? acc(-709.08956571282405) : acc(-88.0296919311);

LVRPO_INLINE ExpParts<float> exp_parts(float x) {
  // At this size a float has no bits for a fraction, so the sum is rounded to an integer; its low bits are the exponent
  // of 2^n.
  constexpr float round = 0x1.8p23f + 127.0f;
  const float n = x * 1.44269504088896341f + round;
  const float whole = bits_as<float>(bits_as<uint32_t>(n) << 23);
  // ln 2 in two parts, the first with so few digits that its product with n is exact.
  float r = x - (n - round) * 0.693359375f;
  r = r + (n - round) * 2.12194440055e-4f;
  // (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2].
  float p = 1.39262034e-3f;
  p = p * r + 8.36319488e-3f;
  p = p * r + 4.16665545e-2f;
  p = p * r + 1.66665769e-1f;
  p = p * r + 0.5f;
  return {whole, p * (r * r) + r};
}

LVRPO_INLINE ExpParts<double> exp_parts(double x) {
  constexpr double round = 0x1.8p52 + 1023.0;
  const double n = x * 1.4426950408889634074 + round;
  const double whole = bits_as<double>(bits_as<uint64_t>(n) << 52);
  double r = x - (n - round) * 0x1.62e42fefa3800p-1;
  r = r - (n - round) * 5.4979230187083711747e-14;
  double p = 2.510041108201490107e-8;
  p = p * r + 2.7620121717381935196e-7;
  p = p * r + 2.7557268406190795031e-6;
  p = p * r + 2.4801521225986432477e-5;
  p = p * r + 1.9841269863088254418e-4;
  p = p * r + 1.3888888917258758256e-3;
  p = p * r + 8.3333333333300548955e-3;
  p = p * r + 4.1666666666624037667e-2;
  p = p * r + 1.6666666666666667455e-1;
  p = p * r + 0.5;
  return {whole, p * (r * r) + r};
}

// exp(x) for exp_lowest <= x <= 88 (709 in fp64), to one unit in the last place; on a GPU in fp32 by the one instruction
// that there is for powers of 2, to two units and as many as x has rounding.
template <typename acc>
LVRPO_INLINE acc exp_bounded(acc x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<acc, float>) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504088896341f));
    return power;
  }
#endif
  const ExpParts<acc> e = exp_parts(x);
  return e.whole + e.whole * e.excess;
}

// The same for any lower x too, -inf included, and in one unit in the last place everywhere.
template <typename acc>
LVRPO_INLINE acc exp_fast(acc x) {
#ifdef __CUDA_ARCH__
  return exp(x);
#else
  return exp_bounded(x < exp_lowest<acc> ? exp_lowest<acc> : x);
#endif
}

// tanh(x) for every x, +-inf included, to three units in the last place, near 0 too.
template <typename acc>
LVRPO_INLINE acc tanh_fast(acc x) {
  const acc twice = x < acc(0) ? acc(-2) * x : acc(2) * x;
  const ExpParts<acc> e = exp_parts(twice > acc(64) ? acc(64) : twice);
  const acc expm1 = e.whole * e.excess + (e.whole - acc(1));
  const acc magnitude = expm1 / (expm1 + acc(2));
  return x < acc(0) ? -magnitude : magnitude;
}

}  // namespace lvrpo
