// The softmax of a row of logits: what is summed over its columns, and the gradient of a logit. It sums powers of
// e = exp(d), d = (y - reference) / temperature, y being a logit after the softcap.
// Formulas: docs/ops/gather_logprobs.md.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common/math.h"

namespace lvrpo {

// A NaN stays a NaN.
template <typename acc>
LVRPO_INLINE acc at_least(acc bound, acc x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<acc, float>) {  // one instruction, where a comparison and a choice are two
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(bound), "f"(x));
    return larger;
  }
#endif
  return x < bound ? bound : x;
}

template <typename acc>
struct LogitScale {
  LogitScale(double temperature, double softcap)
      : inv_temperature(static_cast<acc>(1.0 / temperature)),
        softcap(static_cast<acc>(softcap)),
        inv_softcap(static_cast<acc>(softcap > 0.0 ? 1.0 / softcap : 0.0)) {}

  LVRPO_INLINE bool capped() const { return softcap > acc(0); }
  // y of a logit x.
  LVRPO_INLINE acc cap(acc x) const { return capped() ? softcap * tanh_fast(x * inv_softcap) : x; }
  // dy / dx at tanh = y / softcap.
  LVRPO_INLINE acc cap_slope(acc y) const {
    const acc t = y * inv_softcap;
    return capped() ? (acc(1) - t) * (acc(1) + t) : acc(1);
  }
  // d of a capped logit. Subtracting before scaling keeps the digits of logits with a large common offset.
  LVRPO_INLINE acc distance(acc y, acc reference) const { return at_least(lowest, (y - reference) * inv_temperature); }

  acc inv_temperature, softcap, inv_softcap;
  // Least d. A run-time value: by a constant GCC splits the loop into cases instead of taking a maximum.
  acc lowest = exp_lowest<acc>;
};

// What is summed: e; also e d, for the entropy; also e^2.
enum Summed { PLAIN_SUM, WITH_ENTROPY, WITH_SQUARES };

// Sums over columns of e = exp(d). The reference is a number near the largest y, -inf while no column was above -inf; a
// row that has no finite log-sum-exp ends with a sum that is 0 or NaN.
template <typename acc>
struct SoftmaxSums {
  acc reference = -std::numeric_limits<acc>::infinity();
  acc e = 0, e_d = 0, e_e = 0;

  LVRPO_INLINE bool empty() const { return reference == -std::numeric_limits<acc>::infinity(); }
  // Of the whole row, by the logarithm of `e`.
  LVRPO_INLINE acc lse(acc log_sum, acc inv_temperature) const { return reference * inv_temperature + log_sum; }
  LVRPO_INLINE acc entropy(acc log_sum) const { return log_sum - e_d / e; }
  LVRPO_INLINE acc sum_squares() const { return e_e / (e * e); }
};

// Of a token with the capped logit y. Keeps its digits under a large common offset of the logits, which z - lse does
// not.
template <typename acc>
LVRPO_INLINE acc token_logprob(acc y, acc reference, acc log_sum, acc inv_temperature) {
  return (y - reference) * inv_temperature - log_sum;
}

// sum e d = e^s sum e' (d' + s), where d' is relative to the old reference and s is the way to the new one.
template <typename acc>
LVRPO_INLINE void move_reference(SoftmaxSums<acc>& sums, acc reference, acc inv_temperature) {
  // Bounded, so that a factor of 0 never meets an infinite product: logits may be 1e38 apart.
  const acc shift = at_least(exp_lowest<acc>, (sums.reference - reference) * inv_temperature);
  const acc factor = exp_bounded(shift);
  sums.e_d = factor * (sums.e_d + shift * sums.e);
  sums.e *= factor;
  sums.e_e *= factor * factor;
  sums.reference = reference;
}

template <typename acc>
LVRPO_INLINE void add_sums(SoftmaxSums<acc>& into, SoftmaxSums<acc> more, acc inv_temperature) {
  if (into.empty() || more.empty()) {
    // At least one of them is all zeros or NaN, whatever its reference.
    into.reference = into.reference < more.reference ? more.reference : into.reference;
  } else if (into.reference < more.reference) {
    move_reference(into, more.reference, inv_temperature);
  } else if (into.reference > more.reference) {
    move_reference(more, into.reference, inv_temperature);
  }
  into.e += more.e;
  into.e_d += more.e_d;
  into.e_e += more.e_e;
}

// Whether an lse has fewer than 11 bits after the point left, which a probability would lose too.
template <typename acc>
LVRPO_INLINE bool lost_digits(acc lse) {
  const acc magnitude = lse < acc(0) ? -lse : lse;
  return magnitude <= std::numeric_limits<acc>::max() && magnitude * std::numeric_limits<acc>::epsilon() > acc(0x1p-11);
}

// What a row's gradient is made of, per column: dz = p (dentropy (zbar - z) - dlogprob), and zbar = lse - entropy.
template <typename acc>
struct RowGradient {
  acc lse, entropy, dlogprob, dentropy;
  acc shift = 0;  // lse is that of y - shift: not 0 where the lse of y is so large that it lost its digits

  // Whether it is 0 but for targets.
  LVRPO_INLINE bool is_zero() const { return dlogprob == acc(0) && dentropy == acc(0); }
  // d loss / d x of a column that holds `hits` of the upstream gradient as a target, by y - shift.
  LVRPO_INLINE acc operator()(acc y, acc hits, const LogitScale<acc>& scale) const {
    // Where p is 0 its logarithm stays finite.
    const acc log_p = at_least(scale.lowest, y * scale.inv_temperature - lse);
    const acc p = exp_bounded(log_p);
    return (hits - p * (dentropy * (log_p + entropy) + dlogprob)) * scale.inv_temperature;
  }
};

}  // namespace lvrpo
