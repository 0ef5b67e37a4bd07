// What grpo_loss computes of a token, of a sequence and of a call, one copy for the CPU and for CUDA. The formulas of the
// variants are in common/policy_terms.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/log_ratio.h"
#include "common/math.h"
#include "common/names.h"
#include "common/policy_terms.h"

namespace lvrpo {

template <typename acc>
struct Tokens {
  const acc *logp, *old, *advantage, *ref, *entropy, *weight;  // all but logp and advantage may be null
  const bool* mask;                                            // may be null
  bool advantage_per_token;
};

template <typename acc>
struct Loss {
  Ratio ratio;
  Surrogate surrogate;
  KL kl;
  Policy<acc> policy;
  KLForm<acc> kl_form;
  acc log_ratio_limit, beta, entropy_coef;

  LVRPO_INLINE bool whole_sequence() const { return ratio == Ratio::seq_mean || ratio == Ratio::seq_sum; }
  LVRPO_INLINE bool of_sequence() const { return whole_sequence() || ratio == Ratio::seq_mean_token; }
  // Whether the ratio of a sequence, and what holds it, is one number.
  LVRPO_INLINE bool one_ratio() const { return whole_sequence() && surrogate != Surrogate::log_clip; }
  // Whether a sequence's ratio is differentiated as the mean or sum that it is, not through the token's own log-prob.
  LVRPO_INLINE bool shares_slope() const {
    return whole_sequence() && surrogate != Surrogate::gamma && surrogate != Surrogate::detached;
  }
  // Whether the KL terms of a sequence share their factor; and whether its derivative, which has the sum of their
  // estimators in it, is one of the loss.
  LVRPO_INLINE bool kl_of_sequence() const { return kl_form.factor == KLFactor::sequence_ratio; }
  LVRPO_INLINE bool shares_kl() const { return kl_of_sequence() && beta != acc(0); }
  // Whether anything is made of the log-ratios of a whole sequence.
  LVRPO_INLINE bool sums_log_ratios() const { return of_sequence() || kl_of_sequence(); }
  // Whether a token has a ratio besides that of its sequence.
  LVRPO_INLINE bool own_ratio() const { return !of_sequence() || surrogate == Surrogate::log_clip; }
};

// ---- Of a token ----

// Whether a token that the mask lets in counts. `zero_advantage` is 0 if its advantage is finite, else NaN, as x - x is.
// An absent input is stood in for by logp: a branch on it would end the vectors of a CPU.
template <typename acc>
LVRPO_INLINE bool is_usable(acc logp, acc old, acc ref, acc entropy, acc weight, bool weighted, acc zero_advantage) {
  const acc zero = (logp - logp) + (old - old) + (ref - ref) + (entropy - entropy) + (weight - weight);
  // Nobody asks for the advantage that a policy weight of 0 leaves out.
  const bool has_advantage = zero_advantage == acc(0) || (weighted && weight == acc(0));
  return zero == acc(0) && has_advantage && (!weighted || weight >= acc(0));
}

// What the surrogate of a token adds to the sums of its sequence, and its derivative.
template <typename acc>
struct PolicyPart {
  acc value, slope, ratio;
  bool low, high, cap;
};

// `past` says that the log of the ratio is past its limit.
template <typename Of, typename acc>
LVRPO_INLINE PolicyPart<acc> policy_part(const Policy<acc>& by, const Token<acc>& token, acc weight, bool active,
                                         bool past) {
  const Term<acc> term = Of::term(by, token);
  const bool pulls = active && weight != acc(0) && token.advantage != acc(0), flat = Of::THROUGH_RATIO && past;
  return {pulls ? weight * term.value : acc(0),
          pulls && !flat ? weight * term.slope : acc(0),
          clamp(token.ratio, static_cast<acc>(RATIO_FLOOR), static_cast<acc>(RATIO_LIMIT)),
          active && term.low,
          active && term.high,
          active && term.cap};
}

// The KL estimator of a token with its factor: for the loss, for the statistics, and its derivative.
template <typename acc>
struct KLPart {
  acc term, seen, slope;
};

// d is ref - logp; `log_ratio` of the factor, whose derivative is not here where a sequence shares it. `plain` is
// form.plain(): limits and factors take a quarter of the time of the other.
template <KL kind, bool plain, typename acc>
LVRPO_INLINE KLPart<acc> kl_part(const KLForm<acc>& form, acc d, acc log_ratio) {
  const acc rho_seen = static_cast<acc>(RATIO_LIMIT), most_seen = static_cast<acc>(KL_SEEN<kind>);
  const bool times_ratio = !plain && form.factor != KLFactor::none;
  const bool through_ratio = !plain && form.factor == KLFactor::ratio;
  acc value, derivative;
  if constexpr (plain) {
    estimate_kl<kind>(d, form.ratio_limit, value, derivative);
  } else {
    formed_kl<kind>(form, d, value, derivative);
  }
  const acc rho = times_ratio ? exp_ratio(saturate(log_ratio, form.ratio_limit)) : acc(1);
  const bool moves = through_ratio && !is_saturated(log_ratio, form.ratio_limit);
  const acc term = rho * value;
  const acc seen = (rho > rho_seen ? rho_seen : rho) * (value > most_seen ? most_seen : value);
  return {term, seen, rho * derivative + (moves ? term : acc(0))};
}

// ---- Of a sequence ----

// Bounds of a token's log-ratio inside the sum over its sequence.
struct Limits {
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();
};

template <typename acc>
LVRPO_INLINE Limits limits_of(const Loss<acc>& loss, acc advantage) {
  Limits limits;
  const bool clips = loss.surrogate == Surrogate::log_clip, up = advantage > acc(0);
  if (loss.surrogate == Surrogate::gamma) limits = {-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT};
  if (clips && up) limits.high = static_cast<double>(loss.policy.clip_high);
  if (clips && !up) limits.low = -static_cast<double>(loss.policy.clip_low);
  return limits;
}

// Sums over the active tokens of one sequence; `log_ratio` of log-ratios between their limits, `free_log_ratio` of them
// as they are.
struct Sums {
  double tokens = 0, dropped = 0, log_ratio = 0, free_log_ratio = 0;
  double policy = 0, kl_term = 0, kl = 0, entropy = 0, kl_old = 0;
  double ratio = 0, ratio_squared = 0;
  double low = 0, high = 0, cap = 0;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -std::numeric_limits<double>::infinity();

  // The one ratio that a sequence may have counts once, for all its tokens.
  LVRPO_INLINE void count_once() {
    ratio = ratio_max, ratio_squared = ratio_max * ratio_max;
    low = low > 0, high = high > 0, cap = cap > 0;
  }
};

// What all tokens of a sequence share: its ratio, what it is weighed by, and whether its log is past the limit.
template <typename acc>
struct OfSequence {
  acc ratio, weight;
  bool saturated;
};

template <typename acc>
LVRPO_INLINE OfSequence<acc> of_sequence(const Loss<acc>& loss, double tokens, double log_ratios, acc advantage) {
  if (!loss.of_sequence()) return {acc(1), acc(1), false};
  const double n = loss.ratio == Ratio::seq_sum || tokens < 1.0 ? 1.0 : tokens;
  double log_ratio = log_ratios / n;
  if (loss.surrogate == Surrogate::gamma) log_ratio = clamp(log_ratio, std::log(GAMMA_FLOOR), LOG_RATIO_LIMIT);
  const double limit = static_cast<double>(loss.log_ratio_limit);
  const acc ratio = exp_ratio(static_cast<acc>(saturate(log_ratio, limit)));
  if (loss.surrogate != Surrogate::gamma) return {ratio, ratio, is_saturated(log_ratio, limit)};
  const bool up = advantage > acc(0);
  const acc k = up ? loss.policy.shape_pos[0] : loss.policy.shape_neg[0];
  const acc rate = up ? loss.policy.shape_pos[1] : loss.policy.shape_neg[1];
  return {ratio, static_cast<acc>(gamma_weight(saturate(log_ratio, limit), k, rate)), false};
}

// What the KL terms of a sequence share: the log of their factor, and the part of their sum that a token has as slope
// through it, which is 0 past the limit.
template <typename acc>
struct KLOfSequence {
  acc log_ratio, share;
};

template <typename acc>
LVRPO_INLINE KLOfSequence<acc> kl_of_sequence(const Loss<acc>& loss, double tokens, double free_log_ratios) {
  const double n = tokens < 1.0 ? 1.0 : tokens;
  const acc log_ratio = static_cast<acc>(free_log_ratios / n);
  const bool moves = loss.shares_kl() && !is_saturated(log_ratio, loss.log_ratio_limit);
  return {log_ratio, moves ? static_cast<acc>(1.0 / n) : acc(0)};
}

// ---- Of a call ----

// How tokens become a scalar.
struct Aggregate {
  Aggregation kind;
  bool count_empty;
  double max_length;
  double denominator;  // negative: the count of this call

  // Whether `outer` asks for what is active.
  LVRPO_INLINE bool counts_active() const {
    return denominator < 0 && kind != Aggregation::token_sum && (kind == Aggregation::token_mean || !count_empty);
  }

  // What multiplies the sum over all sequences, of which some have active tokens; a denominator of 0 belongs to a call
  // with nothing to divide.
  LVRPO_INLINE double outer(double tokens, double sequences, double active_sequences) const {
    if (denominator >= 0) return denominator > 0 ? denominator : std::numeric_limits<double>::infinity();
    if (kind == Aggregation::token_sum) return 1.0;
    const double count = kind == Aggregation::token_mean ? tokens : count_empty ? sequences : active_sequences;
    return count > 1.0 ? count : 1.0;
  }

  // What divides the sum over the tokens of a sequence with `tokens` active ones, besides `outer`.
  LVRPO_INLINE double inner(double tokens) const {
    switch (kind) {
      case Aggregation::seq_mean_token_mean:
        return tokens > 1.0 ? tokens : 1.0;
      case Aggregation::seq_mean_token_sum_norm:
        return max_length;
      case Aggregation::token_mean:
      case Aggregation::token_sum:
      case Aggregation::seq_mean_token_sum:
        break;
    }
    return 1.0;
  }
};

// Sums and then extremes of LossMetrics, minima with their sign turned; a `_` that a name begins with is left out.
LVRPO_TABLE(Statistics, double, policy_loss, kl, entropy, clip_fraction_low, clip_fraction_high, clip_fraction_cap,
            ratio, ratio_squared, ratios, kl_old, active_tokens, active_sequences, dropped_tokens, ratio_min, ratio_max,
            clip_fraction_low_min, clip_fraction_high_max, kl_old_max);

LVRPO_INLINE Statistics no_statistics() {
  Statistics all{};
  all.ratio_min = all.ratio_max = all.clip_fraction_low_min = all.clip_fraction_high_max = all.kl_old_max =
      -std::numeric_limits<double>::infinity();
  return all;
}

LVRPO_INLINE void raise_to(double& extreme, double x) { extreme = extreme < x ? x : extreme; }

// All but policy_loss.
LVRPO_INLINE void add_sequence(Statistics& all, const Sums& of, bool one_ratio) {
  all.dropped_tokens += of.dropped;
  if (of.tokens == 0) return;
  const double n = one_ratio ? 1.0 : of.tokens;
  all.kl += of.kl, all.entropy += of.entropy, all.kl_old += of.kl_old;
  all.clip_fraction_low += of.low, all.clip_fraction_high += of.high, all.clip_fraction_cap += of.cap;
  all.ratio += of.ratio, all.ratio_squared += of.ratio_squared, all.ratios += n;
  all.active_tokens += of.tokens, all.active_sequences += 1;
  raise_to(all.ratio_min, -of.ratio_min);
  raise_to(all.ratio_max, of.ratio_max);
  raise_to(all.clip_fraction_low_min, -of.low / n);
  raise_to(all.clip_fraction_high_max, of.high / n);
  raise_to(all.kl_old_max, of.kl_old / of.tokens);
}

// What a sequence adds to the loss, but for the factor of its sum.
LVRPO_INLINE double loss_of(const Sums& of, double beta, double entropy_coef) {
  // A reference given for the metric alone may overflow, and 0 times infinity is NaN.
  const double kl_term = beta != 0 ? beta * of.kl_term : 0;
  return of.policy + kl_term - entropy_coef * of.entropy;
}

}  // namespace lvrpo
