// Vector code without intrinsics. A function marked LVRPO_MULTIVERSION is compiled for AVX-512, AVX2 and the baseline,
// and the loader picks one when the library is opened; its loops are vectorised by the compiler, so everything they call
// must be LVRPO_INLINE. A lambda inside such a function is a function of its own and would stay at the baseline: give
// parallel_for a lambda that calls the multiversioned function, not the other way round.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LVRPO_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LVRPO_MULTIVERSION
#endif

#define LVRPO_INLINE inline __attribute__((always_inline))

namespace lvrpo {

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

}  // namespace lvrpo
