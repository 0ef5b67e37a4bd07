// Per-token formulas of the policy losses, one copy for every kernel that forms such a loss. A new variant is one more
// name of a Surrogate and a SurrogateTerm of that name.
#pragma once

#include <cstdint>
#include <limits>

#include "common/log_ratio.h"
#include "common/names.h"
#include "common/math.h"

namespace lvrpo {

// What they mean is said in lvrpo/params/policy_loss.py.
LVRPO_CHOICES(Ratio, none, token, seq_mean, seq_mean_token, seq_sum)
LVRPO_CHOICES(Surrogate, clip, detached, sigmoid, gamma, total_variation, binary_kl, log_clip)
LVRPO_CHOICES(KL, k1, k2, k3, abs)
LVRPO_CHOICES(KLFactor, none, ratio, detached_ratio, sequence_ratio)
LVRPO_CHOICES(KLGradient, own, k2)
LVRPO_CHOICES(Aggregation, token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm, token_sum)

// The numbers of LossParams; denominator < 0: the op's own count.
LVRPO_TABLE(Numbers, double, clip_low, clip_high, ratio_cap, log_ratio_limit, shape_pos_0, shape_pos_1, shape_neg_0,
            shape_neg_1, beta, kl_log_ratio_limit, kl_limit, entropy_coef, max_length, denominator);

// Where statistics stop log-ratios, and so do the losses that are published so; VESPO's smallest ratio of a sequence.
inline constexpr double LOG_RATIO_LIMIT = 20.0, RATIO_LIMIT = 485165195.40979, RATIO_FLOOR = 1.0 / RATIO_LIMIT;
inline constexpr double GAMMA_FLOOR = 1e-8;

template <typename acc>
LVRPO_INLINE acc clamp(acc x, acc low, acc high) {  // a NaN stays a NaN
  return x < low ? low : x > high ? high : x;
}

// exp of a log-ratio of any size; overflows to infinity.
LVRPO_INLINE double exp_ratio(double x) { return std::exp(x); }
LVRPO_INLINE float exp_ratio(float x) {
  const float e = exp_fast(x > 88.0f ? 88.0f : x);
  return x > 88.0f ? std::numeric_limits<float>::infinity() : e;
}

// e^x - 1 - x without the cancellation that leaves nothing of x^2 / 2 in fp32; `e` is e^x.
LVRPO_INLINE double exp_excess(double x, double) { return std::expm1(x) - x; }
LVRPO_INLINE float exp_excess(float x, float e) {
  float p = 1.0f / 40320.0f;
  p = p * x + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  const float far = e - 1.0f - x;
  return x > -0.5f && x < 0.5f ? p * x * x : far;
}
template <typename acc>
LVRPO_INLINE acc exp_excess(acc x) {
  return exp_excess(x, exp_ratio(x));
}

// log of a normal positive number: the Cephes polynomial on [sqrt(1/2), sqrt(2)).
LVRPO_INLINE double log_fast(double x) { return std::log(x); }
LVRPO_INLINE float log_fast(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const int32_t up = bits - 0x3f3504f3;  // sqrt(1/2)
  const float exponent = static_cast<float>(up >> 23);
  bits = (up & 0x007fffff) + 0x3f3504f3;
  float m;
  std::memcpy(&m, &bits, sizeof(m));
  m -= 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m;
  return exponent * 0.693359375f + (m + (p * m * square - 0.5f * square - exponent * 2.12194440e-4f));
}

// The loss of one token; what LossParams says, with the choices that do not change inside a loop left out.
template <typename acc>
struct Policy {
  acc clip_low, clip_high;  // as given
  acc low, high, cap;       // bounds of the ratio
  acc shape_pos[2], shape_neg[2];
};

template <typename acc>
struct Token {
  acc logp, log_ratio;
  acc ratio;      // at the level that LossParams.ratio names
  acc of_weight;  // what a whole sequence is weighed by: see Gamma and LogClip
  acc advantage;
};

// `slope` is d value / d log of the ratio at its level, or d value / d logp where the log-prob itself
// is what the advantage multiplies: THROUGH_RATIO says which, for a ratio past its limit has no derivative. low, high,
// cap: which bound holds the token.
template <typename acc>
struct Term {
  acc value, slope;
  bool low, high, cap;
};

template <Surrogate kind>
struct SurrogateTerm;

template <>
struct SurrogateTerm<Surrogate::clip> {
  static constexpr bool THROUGH_RATIO = true;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>& by, const Token<acc>& x) {
    const acc a = x.advantage, rho = x.ratio;
    const bool is_low = a < acc(0) && rho < by.low;
    const bool is_high = a > acc(0) && rho > by.high;
    const bool is_cap = a < acc(0) && rho > by.cap;
    // max(-rho a, -clip(rho) a): only one side of the clip can bind, the one that the sign of a picks.
    const acc upper = a < acc(0) ? by.cap : by.high;
    const acc bounded = is_low ? by.low : rho > upper ? upper : rho;
    const acc value = -a * bounded;
    return {value, is_low || is_high || is_cap ? acc(0) : value, is_low, is_high, is_cap};
  }
};

// Ratio "none": the log-prob in place of the ratio, which nothing holds.
struct ScoreTerm {
  static constexpr bool THROUGH_RATIO = false;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>&, const Token<acc>& x) {
    return {-x.advantage * x.logp, -x.advantage, false, false, false};
  }
};

template <>
struct SurrogateTerm<Surrogate::detached> {
  static constexpr bool THROUGH_RATIO = false;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>& by, const Token<acc>& x) {
    const acc slope = -x.advantage * clamp(x.ratio, by.low, by.high);
    return {slope * x.logp, slope, x.ratio < by.low, x.ratio > by.high, false};
  }
};

template <>
struct SurrogateTerm<Surrogate::sigmoid> {
  static constexpr bool THROUGH_RATIO = true;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>& by, const Token<acc>& x) {
    const acc tau = x.advantage > acc(0) ? by.shape_pos[0] : by.shape_neg[0];
    // Past the limit the gate is open and flat; infinity would make 0 times infinity of its slope.
    const acc rho = x.ratio > acc(RATIO_LIMIT) ? acc(RATIO_LIMIT) : x.ratio;
    const acc at = tau * (rho - acc(1));
    // sigma and sigma (1 - sigma) from e^-|x|, which neither overflows nor cancels.
    const acc e = exp_ratio(at < acc(0) ? at : -at), inverse = acc(1) / (acc(1) + e);
    const acc gate = at < acc(0) ? e * inverse : inverse;
    return {acc(-4) / tau * gate * x.advantage, acc(-4) * e * inverse * inverse * rho * x.advantage, false, false, false};
  }
};

// of_weight is gamma_weight of the sequence.
template <>
struct SurrogateTerm<Surrogate::gamma> {
  static constexpr bool THROUGH_RATIO = false;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>&, const Token<acc>& x) {
    const acc slope = -x.advantage * x.of_weight;
    return {slope * x.logp, slope, false, false, false};
  }
};

// of_weight is the sequence's ratio after the clip; `slope` is by its log.
template <>
struct SurrogateTerm<Surrogate::log_clip> {
  static constexpr bool THROUGH_RATIO = true;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>& by, const Token<acc>& x) {
    const acc value = -x.advantage * x.of_weight, d = x.log_ratio;
    return {value, value, x.advantage < acc(0) && d < -by.clip_low, x.advantage > acc(0) && d > by.clip_high, false};
  }
};

template <typename acc>
LVRPO_INLINE Term<acc> trust_region_term(const Policy<acc>& by, const Token<acc>& x, bool inside) {
  const acc weight = inside ? (x.ratio > by.cap ? by.cap : x.ratio) : acc(0);
  const acc slope = -x.advantage * weight;
  return {slope * x.logp, slope, x.advantage < acc(0) && !inside, x.advantage > acc(0) && !inside,
          inside && x.ratio > by.cap};
}

template <>
struct SurrogateTerm<Surrogate::total_variation> {
  static constexpr bool THROUGH_RATIO = false;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>& by, const Token<acc>& x) {
    const acc change = exp_ratio(x.logp) - exp_ratio(x.logp - x.log_ratio);
    const bool inside = x.advantage > acc(0) ? change <= by.clip_high : change >= -by.clip_low;
    return trust_region_term(by, x, inside);
  }
};

template <>
struct SurrogateTerm<Surrogate::binary_kl> {
  static constexpr bool THROUGH_RATIO = false;
  template <typename acc>
  static LVRPO_INLINE Term<acc> term(const Policy<acc>& by, const Token<acc>& x) {
    const acc old = x.logp - x.log_ratio;
    const acc change = exp_ratio(x.logp) - exp_ratio(old);
    // 1 - p without cancellation; 1e-8 as in the published code, for a token of probability 1.
    const acc rest = -(exp_excess(x.logp) + x.logp), rest_old = -(exp_excess(old) + old);
    const acc quotient = ((rest_old > acc(0) ? rest_old : acc(0)) + acc(1e-8)) / ((rest > acc(0) ? rest : acc(0)) + acc(1e-8));
    const acc divergence = -exp_ratio(old) * x.log_ratio + rest_old * log_fast(quotient);
    const bool up = x.advantage > acc(0);
    const bool near = divergence <= (up ? by.clip_high : by.clip_low);
    return trust_region_term(by, x, near || (up ? change <= acc(0) : change >= acc(0)));
  }
};

// VESPO's e^l w^k e^(-l w), which is 1 at w = 1.
LVRPO_INLINE double gamma_weight(double log_w, double k, double rate) {
  return std::exp(rate + k * log_w - rate * std::exp(log_w));
}

// How the estimator of the KL divergence is evaluated; an absent limit is infinity.
template <typename acc>
struct KLForm {
  KLFactor factor;
  bool gradient_of_k2;
  acc ratio_limit;  // of exponentials
  acc log_ratio_limit, limit;

  // The estimator as it is.
  LVRPO_INLINE bool plain() const {
    const acc none = std::numeric_limits<acc>::infinity();
    return factor == KLFactor::none && !gradient_of_k2 && log_ratio_limit == none && limit == none;
  }
};

// The estimator's value and its derivative by the policy's log-prob, at d = ref - logp. The exponential of k3 has a limit
// above alone: a log-ratio far below 0 is no danger to it.
template <KL kind, typename acc>
LVRPO_INLINE void estimate_kl(acc d, acc ratio_limit, acc& value, acc& slope) {
  if constexpr (kind == KL::k1) {
    value = -d;
    slope = acc(1);
  } else if constexpr (kind == KL::k2) {
    value = d * d / acc(2);
    slope = -d;
  } else if constexpr (kind == KL::k3) {
    const bool flat = d > ratio_limit;
    const acc x = flat ? ratio_limit : d;
    value = exp_excess(x);
    slope = flat ? acc(0) : -(value + x);
  } else {
    static_assert(kind == KL::abs, "this KL has no estimate");
    value = d < acc(0) ? -d : d;
    slope = d < acc(0) ? acc(1) : d > acc(0) ? acc(-1) : acc(0);
  }
}

// The same with the clamps of `form`, whose slope is 0 where they bind, and its choice of gradient.
template <KL kind, typename acc>
LVRPO_INLINE void formed_kl(const KLForm<acc>& form, acc d, acc& value, acc& slope) {
  const acc far = form.log_ratio_limit, most = form.limit;
  estimate_kl<kind>(clamp(d, -far, far), form.ratio_limit, value, slope);
  const bool flat = d > far || d < -far || value > most || value < -most;
  value = clamp(value, -most, most);
  slope = form.gradient_of_k2 ? -d : flat ? acc(0) : slope;
}

// The largest value that statistics have: that of k3 where they stop log-ratios.
template <KL kind>
inline constexpr double KL_SEEN = kind == KL::k3 ? RATIO_LIMIT - 1.0 - LOG_RATIO_LIMIT
                                             : std::numeric_limits<double>::infinity();

}  // namespace lvrpo
