// Per-token formulas of the policy losses, one copy for every kernel that forms such a loss.
#pragma once

#include <cstdint>
#include <limits>

#include "common/simd.h"

namespace lvrpo {

// In the order of the choices in lvrpo/ops/_policy_loss.py.
enum Ratio { RATIO_NONE = 0, RATIO_TOKEN = 1, RATIO_SEQ_MEAN = 2 };
enum KL { K1 = 0, K2 = 1, K3 = 2, KL_ABS = 3 };
enum Aggregation { TOKEN_MEAN = 0, SEQ_MEAN_TOKEN_MEAN = 1, SEQ_MEAN_TOKEN_SUM = 2, SEQ_MEAN_TOKEN_SUM_NORM = 3 };

// exp of a log-ratio of any size; overflows to infinity.
LVRPO_INLINE double exp_ratio(double x) { return std::exp(x); }
LVRPO_INLINE float exp_ratio(float x) {
  const float e = exp_fast(x > 88.0f ? 88.0f : x);
  return x > 88.0f ? std::numeric_limits<float>::infinity() : e;
}

// e^x - 1 - x without the cancellation that leaves nothing of x^2 / 2 in fp32.
LVRPO_INLINE double exp_excess(double x) { return std::expm1(x) - x; }
LVRPO_INLINE float exp_excess(float x) {
  float p = 1.0f / 40320.0f;
  p = p * x + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  const float far = exp_ratio(x) - 1.0f - x;
  return x > -0.5f && x < 0.5f ? p * x * x : far;
}

// The estimator's value and its derivative by the policy's log-prob, at d = ref - logp.
template <int64_t kind, typename acc>
LVRPO_INLINE void estimate_kl(acc d, acc& value, acc& slope) {
  if constexpr (kind == K1) {
    value = -d;
    slope = acc(1);
  } else if constexpr (kind == K2) {
    value = d * d / acc(2);
    slope = -d;
  } else if constexpr (kind == K3) {
    value = exp_excess(d);
    slope = -(value + d);
  } else {
    value = d < acc(0) ? -d : d;
    slope = d < acc(0) ? acc(1) : d > acc(0) ? acc(-1) : acc(0);
  }
}

}  // namespace lvrpo
