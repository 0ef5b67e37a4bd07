// Vector code without intrinsics. A function marked LVRPO_MULTIVERSION is compiled for AVX-512, AVX2 and the baseline,
// and the loader picks one when the library is opened; its loops are vectorised by the compiler, so everything they call
// must be LVRPO_INLINE. A lambda inside such a function is a function of its own and would stay at the baseline: give
// parallel_for a lambda that calls the multiversioned function, not the other way round.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LVRPO_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LVRPO_MULTIVERSION
#endif

#define LVRPO_INLINE inline __attribute__((always_inline))

namespace lvrpo {

template <typename to_t, typename from_t>
LVRPO_INLINE to_t bits_as(from_t value) {
  static_assert(sizeof(to_t) == sizeof(from_t));
  to_t result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// exp(x) for x <= 88, 0 below -87.3 (where the result would be subnormal) and for -inf. Cody-Waite reduction and the
// Cephes polynomial: relative error below 2e-7 on the whole range. A NaN stays a NaN.
LVRPO_INLINE float exp_fast(float x) {
  const float clamped = x < -87.3f ? -87.3f : x;
  const float n = __builtin_rintf(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -87.3f ? 0.0f : p * scale;
}

LVRPO_INLINE double exp_fast(double x) { return std::exp(x); }

// 2^x as whole * (1 + excess), whole = 2^n with n the integer next to x: what exp2_fast and tanh_fast are made of. The
// excess keeps its digits near x = 0, where 2^x - 1 would lose them. A NaN stays a NaN.
template <typename acc>
struct Exp2Parts {
  acc whole, excess;
};

// Where exp2_fast reaches 0. Its argument must not be lower, but for rounding.
template <typename acc>
inline constexpr acc exp2_lowest = std::is_same_v<acc, double> ? acc(-1023) : acc(-127);

LVRPO_INLINE Exp2Parts<float> exp2_parts(float x) {
  // The sum has no bits for a fraction, so it rounds x to an integer, and its low bits hold the exponent of 2^n.
  constexpr float round = 0x1.8p23f + 127.0f;
  const float n = x + round;
  const float r = x - (n - round);
  // (2^r - 1) / r on [-0.5, 0.5], to 8e-9.
  float p = 1.5453163e-4f;
  p = p * r + 1.3390864e-3f;
  p = p * r + 9.6180826e-3f;
  p = p * r + 5.5503571e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314719e-1f;
  return {bits_as<float>(bits_as<uint32_t>(n) << 23), p * r};
}

LVRPO_INLINE Exp2Parts<double> exp2_parts(double x) {
  constexpr double round = 0x1.8p52 + 1023.0;
  const double n = x + round;
  const double r = x - (n - round);
  // To 2e-17.
  double p = 4.4549605981865183938e-10;
  p = p * r + 7.0725859492692236999e-9;
  p = p * r + 1.0178062445845773521e-7;
  p = p * r + 1.3215442587921689653e-6;
  p = p * r + 1.5252733829836118394e-5;
  p = p * r + 1.5403530441736050155e-4;
  p = p * r + 1.3333558146416935310e-3;
  p = p * r + 9.6181291076068885273e-3;
  p = p * r + 5.5504108664821594339e-2;
  p = p * r + 2.4022650695910098220e-1;
  p = p * r + 6.9314718055994530942e-1;
  return {bits_as<double>(bits_as<uint64_t>(n) << 52), p * r};
}

// 2^x for exp2_lowest <= x < 128 (1024 in fp64): relative error below 1.5 units in the last place, 0 once 2^x would be
// subnormal or nearly so.
template <typename acc>
LVRPO_INLINE acc exp2_fast(acc x) {
  const Exp2Parts<acc> e = exp2_parts(x);
  return e.whole + e.whole * e.excess;
}

// tanh(x) for every x, +-inf included: relative error below 4 units in the last place, near 0 too.
template <typename acc>
LVRPO_INLINE acc tanh_fast(acc x) {
  const acc twice = (x < acc(0) ? -x : x) * acc(2 * 1.4426950408889634);
  const Exp2Parts<acc> e = exp2_parts(twice > acc(64) ? acc(64) : twice);
  const acc expm1 = e.whole * e.excess + (e.whole - acc(1));
  const acc magnitude = expm1 / (expm1 + acc(2));
  return x < acc(0) ? -magnitude : magnitude;
}

}  // namespace lvrpo
