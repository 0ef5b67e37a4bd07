// Policy loss, its metrics and its gradient in one pass over packed tokens. Formulas: docs/ops/grpo_loss.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/names.h"
#include "common/policy_terms.h"
#include "cpu/simd.h"

namespace lvrpo {
namespace {

using std::optional;

// Tokens of one step: their ratios and slopes stay in L1 between the loops that share them.
constexpr int64_t BLOCK_T = 512;

template <typename acc>
struct Tokens {
  const acc *logp, *old, *advantage, *ref, *entropy, *weight;  // all but logp and advantage may be null
  const bool* mask;                                            // may be null
  bool advantage_per_token;
  bool* active;  // written first: the mask, without tokens whose inputs are not finite
};

template <typename acc>
struct Loss {
  Ratio ratio;
  Surrogate surrogate;
  KL kl;
  Policy<acc> policy;
  KLForm<acc> kl_form;
  acc log_ratio_limit, beta, entropy_coef;

  bool whole_sequence() const { return ratio == Ratio::seq_mean || ratio == Ratio::seq_sum; }
  bool of_sequence() const { return whole_sequence() || ratio == Ratio::seq_mean_token; }
  // Whether the ratio of a sequence, and what holds it, is one number.
  bool one_ratio() const { return whole_sequence() && surrogate != Surrogate::log_clip; }
  // Whether a sequence's ratio is differentiated as the mean or sum that it is, not through the token's own log-prob.
  bool shares_slope() const { return whole_sequence() && surrogate != Surrogate::gamma; }
};

// Bounds of a token's log-ratio inside the sum over its sequence.
struct Limits {
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();
};

template <typename acc>
Limits limits_of(const Loss<acc>& loss, acc advantage) {
  Limits limits;
  if (loss.surrogate == Surrogate::gamma) limits = {-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT};
  if (loss.surrogate == Surrogate::log_clip && advantage > acc(0)) limits.high = static_cast<double>(loss.policy.clip_high);
  if (loss.surrogate == Surrogate::log_clip && !(advantage > acc(0))) limits.low = -static_cast<double>(loss.policy.clip_low);
  return limits;
}

// Sums over the active tokens of one sequence.
struct Sums {
  double tokens = 0, dropped = 0, log_ratio = 0;
  double policy = 0, kl_term = 0, kl = 0, entropy = 0, kl_old = 0;
  double ratio = 0, ratio_squared = 0;
  double low = 0, high = 0, cap = 0;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -std::numeric_limits<double>::infinity();
};

// What all tokens of a sequence share: its ratio, what it is weighed by, and whether its log is past the limit.
template <typename acc>
struct OfSequence {
  acc ratio, weight;
  bool saturated;
};

template <typename acc>
OfSequence<acc> of_sequence(const Loss<acc>& loss, const Sums& sums, acc advantage) {
  if (!loss.of_sequence()) return {acc(1), acc(1), false};
  const double n = loss.ratio == Ratio::seq_sum ? 1.0 : std::max(sums.tokens, 1.0);
  double log_ratio = sums.log_ratio / n;
  if (loss.surrogate == Surrogate::gamma) log_ratio = clamp(log_ratio, std::log(GAMMA_FLOOR), LOG_RATIO_LIMIT);
  const double limit = static_cast<double>(loss.log_ratio_limit);
  const acc ratio = exp_ratio(static_cast<acc>(saturate(log_ratio, limit)));
  if (loss.surrogate != Surrogate::gamma) return {ratio, ratio, is_saturated(log_ratio, limit)};
  const acc* shape = advantage > acc(0) ? loss.policy.shape_pos : loss.policy.shape_neg;
  return {ratio, static_cast<acc>(gamma_weight(saturate(log_ratio, limit), shape[0], shape[1])), false};
}

// Tokens of a block, in L1.
template <typename acc>
struct Block {
  acc logp[BLOCK_T], log_ratio[BLOCK_T], ratio[BLOCK_T], weight[BLOCK_T], advantage[BLOCK_T], slope[BLOCK_T];
  bool active[BLOCK_T];
};

// KL of a block: its slope is added to `slope`; `terms` is what the loss sums, `values` what the statistics do. The form
// that is the estimator alone has a loop of its own, because limits and factors take a quarter of the time of the other.
template <KL kind, bool plain, typename acc>
LVRPO_INLINE void kl_block(const Loss<acc>& loss, const acc* ref, Block<acc>& x, int64_t n, Sums& sums) {
  const KLForm<acc> form = loss.kl_form;
  const acc beta = loss.beta, most_seen = static_cast<acc>(KL_SEEN<kind>), rho_seen = static_cast<acc>(RATIO_LIMIT);
  const bool weighs = beta != acc(0);  // 0 times an overflow is NaN
  const bool times_ratio = !plain && form.factor != KLFactor::none;
  const bool through_ratio = !plain && form.factor == KLFactor::ratio;
  double terms = 0, values = 0;
#pragma omp simd reduction(+ : terms, values)
  for (int64_t i = 0; i < n; ++i) {
    const bool on = x.active[i];
    const acc difference = ref[i] - x.logp[i], d = on ? difference : acc(0);
    acc value, derivative;
    if constexpr (plain) {
      estimate_kl<kind>(d, form.ratio_limit, value, derivative);
    } else {
      formed_kl<kind>(form, d, value, derivative);
    }
    const acc rho = times_ratio ? exp_ratio(saturate(x.log_ratio[i], form.ratio_limit)) : acc(1);
    const bool moves = through_ratio && !is_saturated(x.log_ratio[i], form.ratio_limit);
    const acc term = rho * value;
    const acc seen = (rho > rho_seen ? rho_seen : rho) * (value > most_seen ? most_seen : value);
    terms += on ? static_cast<double>(term) : 0.0;
    values += on ? static_cast<double>(seen) : 0.0;
    x.slope[i] += on && weighs ? beta * (rho * derivative + (moves ? term : acc(0))) : acc(0);
  }
  sums.kl_term += terms;
  sums.kl += values;
}

// Calls, not a table of pointers: a function reached through a pointer is not compiled for the caller's vectors.
template <bool plain, typename acc, int64_t... kind>
LVRPO_INLINE void kl_any(const Loss<acc>& loss, const acc* ref, Block<acc>& x, int64_t n, Sums& sums,
                         std::integer_sequence<int64_t, kind...>) {
  ((loss.kl == KL{kind} ? kl_block<KL{kind}, plain>(loss, ref, x, n, sums) : void()), ...);
}

// k3 of the old policy against the new one; `ratio` is the tokens' own, if they have it.
template <typename acc>
LVRPO_INLINE void kl_old_block(const Block<acc>& x, bool own_ratio, acc log_ratio_limit, int64_t n, Sums& sums) {
  // Statistics have a limit whether or not the loss has one.
  const acc most = static_cast<acc>(LOG_RATIO_LIMIT), limit = log_ratio_limit < most ? log_ratio_limit : most;
  const bool reuse = own_ratio && log_ratio_limit <= most;
  double total = 0;
  if (reuse) {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) {
      const acc value = exp_excess(saturate(x.log_ratio[i], limit), x.ratio[i]);
      total += x.active[i] ? static_cast<double>(value) : 0.0;
    }
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) {
      const acc value = exp_excess(saturate(x.log_ratio[i], limit));
      total += x.active[i] ? static_cast<double>(value) : 0.0;
    }
  }
  sums.kl_old += total;
}

// Which tokens of a sequence are active, how many, and what their log-ratios add up to.
template <typename acc>
LVRPO_MULTIVERSION void count_sequence(const Tokens<acc>& in, int64_t index, int64_t begin, int64_t end,
                                       bool sums_log_ratios, Limits limits, Sums& sums) {
  // An absent input is stood in for by one that is there: a branch on it would end the vectors.
  const acc *logp = in.logp, *old = in.old ? in.old : logp, *ref = in.ref ? in.ref : logp;
  const acc *entropy = in.entropy ? in.entropy : logp, *weight = in.weight ? in.weight : logp;
  const acc* advantage = in.advantage_per_token ? in.advantage : logp;
  const bool weighted = in.weight != nullptr;
  const acc shared = in.advantage_per_token || begin == end ? acc(0) : in.advantage[index];
  bool* active = in.active;
  if (in.mask) {
    for (int64_t t = begin; t < end; ++t) active[t] = in.mask[t];
  } else {
    for (int64_t t = begin; t < end; ++t) active[t] = true;
  }
  double tokens = 0, asked = 0, log_ratio = 0;
#pragma omp simd reduction(+ : tokens, asked)
  for (int64_t t = begin; t < end; ++t) {
    // x - x is 0 for what is finite, else NaN.
    const acc zero = (logp[t] - logp[t]) + (old[t] - old[t]) + (ref[t] - ref[t]) + (entropy[t] - entropy[t]) +
                     (weight[t] - weight[t]);
    const acc zero_advantage = (advantage[t] - advantage[t]) + (shared - shared);
    const bool asked_for = active[t];
    // Nobody asks for the advantage that a policy weight of 0 leaves out.
    const bool has_advantage = zero_advantage == acc(0) || (weighted && weight[t] == acc(0));
    const bool on = asked_for && zero == acc(0) && has_advantage && (!weighted || weight[t] >= acc(0));
    active[t] = on;
    asked += asked_for ? 1.0 : 0.0;
    tokens += on ? 1.0 : 0.0;
  }
  if (sums_log_ratios && in.old) {
#pragma omp simd reduction(+ : log_ratio)
    for (int64_t t = begin; t < end; ++t) {
      const double d = clamp(static_cast<double>(logp[t] - old[t]), limits.low, limits.high);
      log_ratio += active[t] ? d : 0.0;
    }
  }
  sums.tokens = tokens;
  sums.dropped = asked - tokens;
  sums.log_ratio = log_ratio;
}

// Surrogate of a block: its value into sums, its derivative into `slope`. `past` says that the one ratio of the sequence
// is past its limit, `limit` where that of a token is.
template <typename Of, typename acc>
LVRPO_INLINE void surrogate_block(const Policy<acc> by, acc of_weight, bool past, acc limit, Block<acc>& x, int64_t n,
                                  Sums& sums) {
  const acc least_seen = static_cast<acc>(RATIO_FLOOR), most_seen = static_cast<acc>(RATIO_LIMIT);
  double policy = 0, low = 0, high = 0, cap = 0, total = 0, squares = 0;
  acc smallest = std::numeric_limits<acc>::infinity(), largest = -std::numeric_limits<acc>::infinity();
#pragma omp simd reduction(+ : policy, low, high, cap, total, squares) reduction(min : smallest) \
    reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const Token<acc> token{x.logp[i], x.log_ratio[i], x.ratio[i], of_weight, x.advantage[i]};
    const Term<acc> term = Of::term(by, token);
    const bool on = x.active[i], pulls = on && x.weight[i] != acc(0) && x.advantage[i] != acc(0);
    const bool flat = Of::THROUGH_RATIO && (past || is_saturated(x.log_ratio[i], limit));
    const acc ratio = clamp(token.ratio, least_seen, most_seen);
    const double seen = on ? static_cast<double>(ratio) : 0.0;
    policy += pulls ? static_cast<double>(x.weight[i] * term.value) : 0.0;
    x.slope[i] = pulls && !flat ? x.weight[i] * term.slope : acc(0);
    low += on && term.low ? 1.0 : 0.0;
    high += on && term.high ? 1.0 : 0.0;
    cap += on && term.cap ? 1.0 : 0.0;
    total += seen;
    squares += seen * seen;
    smallest = on && ratio < smallest ? ratio : smallest;
    largest = on && ratio > largest ? ratio : largest;
  }
  sums.policy += policy, sums.low += low, sums.high += high, sums.cap += cap;
  sums.ratio += total, sums.ratio_squared += squares;
  sums.ratio_min = std::min(sums.ratio_min, static_cast<double>(smallest));
  sums.ratio_max = std::max(sums.ratio_max, static_cast<double>(largest));
}

template <typename acc, int64_t... kind>
LVRPO_INLINE void surrogate_any(const Loss<acc>& loss, const OfSequence<acc>& whole, Block<acc>& x, int64_t n,
                                Sums& sums, std::integer_sequence<int64_t, kind...>) {
  const Policy<acc> by = loss.policy;
  const acc weight = whole.weight;
  const bool past = whole.saturated;
  // The limit of a token's own ratio, where that is what the advantage multiplies.
  const acc limit = loss.of_sequence() ? std::numeric_limits<acc>::infinity() : loss.log_ratio_limit;
  if (loss.ratio == Ratio::none) return surrogate_block<ScoreTerm>(by, weight, past, limit, x, n, sums);
  ((loss.surrogate == Surrogate{kind}
        ? surrogate_block<SurrogateTerm<Surrogate{kind}>>(by, weight, past, limit, x, n, sums)
        : void()),
   ...);
}

// Every load is unconditional and selected afterwards: a branch on a random mask costs more than all the arithmetic.
template <typename acc>
LVRPO_INLINE void load_block(const Tokens<acc>& in, int64_t index, int64_t first, int64_t n, Block<acc>& x) {
  if (in.weight) {
    for (int64_t i = 0; i < n; ++i) x.weight[i] = in.weight[first + i];
  } else {
    for (int64_t i = 0; i < n; ++i) x.weight[i] = acc(1);
  }
  if (in.advantage_per_token) {
    for (int64_t i = 0; i < n; ++i) x.advantage[i] = in.advantage[first + i];
  } else {
    for (int64_t i = 0; i < n; ++i) x.advantage[i] = in.advantage[index];
  }
  const acc* now = in.logp + first;
  const acc* old = in.old ? in.old + first : now;
  const bool* active = in.active + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc l = now[i], d = l - old[i];
    const bool on = active[i];
    x.active[i] = on;
    x.logp[i] = on ? l : acc(0);
    x.log_ratio[i] = on ? d : acc(0);
  }
}

// Adds the slope of a sequence's mean or sum to every token in it that no limit holds.
template <typename acc>
LVRPO_INLINE void add_shared_slope(const Tokens<acc>& in, int64_t begin, int64_t end, Limits limits, acc each,
                                   acc* dlogp) {
  const acc low = static_cast<acc>(limits.low), high = static_cast<acc>(limits.high);
  const acc* old = in.old ? in.old : in.logp;
  const bool* active = in.active;
#pragma omp simd
  for (int64_t t = begin; t < end; ++t) {
    const acc d = in.logp[t] - old[t];
    dlogp[t] += active[t] && !(d < low || d > high) ? each : acc(0);
  }
}

// One sequence: its sums, and the derivative of the loss by every log-prob, `factor` being the sequence's share of it.
template <typename acc>
LVRPO_MULTIVERSION void sequence_terms(const Tokens<acc>& in, const Loss<acc>& loss, int64_t index, int64_t begin,
                                       int64_t end, acc factor, acc* dlogp, acc* dentropy, Sums& sums) {
  Block<acc> x;
  const bool shares_slope = loss.shares_slope();
  const bool own_ratio = !loss.of_sequence() || loss.surrogate == Surrogate::log_clip;
  const acc limit = loss.log_ratio_limit;
  const acc first_advantage = in.advantage_per_token || begin == end ? acc(0) : in.advantage[index];
  const OfSequence<acc> whole = of_sequence(loss, sums, first_advantage);
  double shared = 0;  // sum of the slopes by the log of the one ratio a sequence has
  for (int64_t first = begin; first < end; first += BLOCK_T) {
    const int64_t n = end - first < BLOCK_T ? end - first : BLOCK_T;
    load_block(in, index, first, n, x);
    if (own_ratio) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x.ratio[i] = exp_ratio(saturate(x.log_ratio[i], limit));
    } else {
      for (int64_t i = 0; i < n; ++i) x.ratio[i] = whole.ratio;
    }
    surrogate_any(loss, whole, x, n, sums, all_of<Surrogate>{});
    if (in.old) kl_old_block(x, own_ratio, limit, n, sums);
    if (shares_slope) {
      for (int64_t i = 0; i < n; ++i) shared += static_cast<double>(x.slope[i]), x.slope[i] = acc(0);
    }
    if (in.ref && loss.kl_form.plain()) kl_any<true>(loss, in.ref + first, x, n, sums, all_of<KL>{});
    if (in.ref && !loss.kl_form.plain()) kl_any<false>(loss, in.ref + first, x, n, sums, all_of<KL>{});
    if (in.entropy) {
      double entropy = 0;
#pragma omp simd reduction(+ : entropy)
      for (int64_t i = 0; i < n; ++i) {
        const double e = static_cast<double>(in.entropy[first + i]);
        entropy += x.active[i] ? e : 0.0;
        dentropy[first + i] = x.active[i] ? -loss.entropy_coef * factor : acc(0);
      }
      sums.entropy += entropy;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dlogp[first + i] = factor * x.slope[i];
  }
  if (shares_slope && sums.tokens > 0) {
    const double n = loss.ratio == Ratio::seq_mean ? sums.tokens : 1.0;
    add_shared_slope(in, begin, end, limits_of(loss, first_advantage), static_cast<acc>(shared / n) * factor, dlogp);
  }
  if (loss.one_ratio() && sums.tokens > 0) {  // which counts once, for all its tokens
    const double ratio = sums.ratio_max;
    sums.ratio = ratio, sums.ratio_squared = ratio * ratio;
    sums.low = sums.low > 0, sums.high = sums.high > 0, sums.cap = sums.cap > 0;
  }
}

template <typename acc>
const acc* data_of(const optional<Tensor>& tensor, int64_t tokens, ScalarType dtype, const char* name) {
  if (!tensor) return nullptr;
  check_dtype(*tensor, dtype, name);
  check_size(*tensor, 0, tokens, name);
  return tensor->const_data_ptr<acc>();
}

// How tokens become a scalar.
struct Aggregate {
  Aggregation kind;
  bool count_empty;
  double max_length;
  double denominator;  // negative: the count of this call

  // What multiplies the sum over all sequences; a denominator of 0 belongs to a call with nothing to divide.
  double outer(const std::vector<Sums>& sums) const {
    if (denominator >= 0) return denominator > 0 ? denominator : std::numeric_limits<double>::infinity();
    if (kind == Aggregation::token_sum) return 1.0;
    const bool of_tokens = kind == Aggregation::token_mean;
    double count = 0;
    for (const Sums& part : sums) count += of_tokens ? part.tokens : count_empty || part.tokens > 0 ? 1.0 : 0.0;
    return std::max(count, 1.0);
  }

  // What divides the sum over the tokens of a sequence with `tokens` active ones, besides `outer`.
  double inner(double tokens) const {
    switch (kind) {
      case Aggregation::seq_mean_token_mean:
        return std::max(tokens, 1.0);
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
LVRPO_TABLE(Statistics, double, policy_loss, kl, entropy, clip_fraction_low, clip_fraction_high, clip_fraction_cap, ratio,
            ratio_squared, ratios, kl_old, active_tokens, active_sequences, dropped_tokens, ratio_min, ratio_max,
            clip_fraction_low_min, clip_fraction_high_max, kl_old_max);

Statistics no_statistics() {
  Statistics all{};
  for (double* extreme : {&all.ratio_min, &all.ratio_max, &all.clip_fraction_low_min, &all.clip_fraction_high_max,
                          &all.kl_old_max})
    *extreme = -std::numeric_limits<double>::infinity();
  return all;
}

void raise_to(double& extreme, double x) { extreme = std::max(extreme, x); }

void add_sequence(Statistics& all, const Sums& of, bool one_ratio) {
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

const DeclareNames DECLARE("grpo_loss",
                           {{"ratio", names_of(Ratio{})},
                            {"surrogate", names_of(Surrogate{})},
                            {"kl", names_of(KL{})},
                            {"kl_factor", names_of(KLFactor{})},
                            {"kl_gradient", names_of(KLGradient{})},
                            {"aggregation", names_of(Aggregation{})}},
                           {{"numbers", Numbers::NAMES}, {"statistics", Statistics::NAMES}});

// Sequences are the unit of work and their sums are added in order: the bits do not depend on the thread count.
template <typename acc>
void run(const Tokens<acc>& in, const Loss<acc>& loss, const Aggregate& aggregate, double beta, double entropy_coef,
         const int64_t* start, int64_t sequences, acc* loss_out, Statistics* statistics, acc* dlogp, acc* dentropy) {
  const int64_t grain = std::max<int64_t>(1, 4096 * sequences / std::max<int64_t>(1, start[sequences]));
  std::vector<Sums> sums(sequences);
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Limits limits = limits_of(loss, in.advantage_per_token ? acc(0) : in.advantage[b]);
      count_sequence<acc>(in, b, start[b], start[b + 1], loss.of_sequence(), limits, sums[b]);
    }
  });
  std::vector<double> factor(sequences);
  const double outer = aggregate.outer(sums);
  for (int64_t b = 0; b < sequences; ++b) factor[b] = 1.0 / (outer * aggregate.inner(sums[b].tokens));
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      sequence_terms<acc>(in, loss, b, start[b], start[b + 1], static_cast<acc>(factor[b]), dlogp, dentropy, sums[b]);
  });
  double total = 0;
  *statistics = no_statistics();
  for (int64_t b = 0; b < sequences; ++b) {
    add_sequence(*statistics, sums[b], loss.one_ratio());
    statistics->policy_loss += factor[b] * sums[b].policy;
    const double kl_term = beta != 0 ? beta * sums[b].kl_term : 0;
    total += factor[b] * (sums[b].policy + kl_term - entropy_coef * sums[b].entropy);
  }
  *loss_out = static_cast<acc>(total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_loss_fwd(
    Tensor logprobs, optional<Tensor> old_logprobs, Tensor advantages, Tensor cu_seqlens, optional<Tensor> ref_logprobs,
    optional<Tensor> entropy, optional<Tensor> mask, optional<Tensor> policy_weights, Tensor numbers,
    bool advantage_per_token, bool count_empty, int64_t ratio, int64_t surrogate, int64_t kl, int64_t kl_factor,
    int64_t kl_gradient, int64_t aggregation) {
  const Ratio of_ratio = as_choice<Ratio>(ratio, "ratio");
  const Surrogate of_surrogate = as_choice<Surrogate>(surrogate, "surrogate");
  const KL of_kl = as_choice<KL>(kl, "kl");
  const KLFactor factor = as_choice<KLFactor>(kl_factor, "kl_factor");
  const bool gradient_of_k2 = as_choice<KLGradient>(kl_gradient, "kl_gradient") == KLGradient::k2;
  const Aggregation of_tokens = as_choice<Aggregation>(aggregation, "aggregation");
  LVRPO_CHECK(logprobs.dim() == 1 && advantages.dim() == 1 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
              "logprobs, advantages and cu_seqlens must have one dimension");
  for (optional<Tensor>* tensor : {&old_logprobs, &ref_logprobs, &entropy, &mask, &policy_weights})
    if (*tensor) *tensor = torch::stable::contiguous(**tensor);
  logprobs = torch::stable::contiguous(logprobs);
  advantages = torch::stable::contiguous(advantages);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  numbers = torch::stable::contiguous(numbers);
  check_dtype(cu_seqlens, ScalarType::Long, "cu_seqlens");
  check_dtype(numbers, ScalarType::Double, "numbers");
  check_size(numbers, 0, COLUMNS_OF<Numbers>, "numbers");
  const ScalarType dtype = logprobs.scalar_type();
  check_dtype(advantages, dtype, "advantages");
  const int64_t tokens = logprobs.size(0), sequences = cu_seqlens.size(0) - 1;
  check_size(advantages, 0, advantage_per_token ? tokens : sequences, "advantages");
  LVRPO_CHECK(!advantage_per_token || (of_ratio != Ratio::seq_mean && of_ratio != Ratio::seq_sum),
              "advantages must be [B]");
  const int64_t* start = cu_seqlens.const_data_ptr<int64_t>();
  LVRPO_CHECK(start[0] == 0 && start[sequences] == tokens, "cu_seqlens must run from 0 to ", tokens);
  for (int64_t b = 0; b < sequences; ++b) LVRPO_CHECK(start[b] <= start[b + 1], "cu_seqlens must not decrease");

  Tensor loss_out = torch::stable::new_empty(logprobs, {});
  Tensor statistics_out = torch::stable::new_empty(logprobs, {COLUMNS_OF<Statistics>}, ScalarType::Double);
  Tensor dlogprobs = torch::stable::new_empty(logprobs, {tokens});
  Tensor dentropy = torch::stable::new_empty(logprobs, {entropy ? tokens : 0});
  Tensor active = torch::stable::new_empty(logprobs, {tokens}, ScalarType::Bool);
  const Numbers by = *reinterpret_cast<const Numbers*>(numbers.const_data_ptr<double>());
  LVRPO_DISPATCH_ACC(dtype, acc, [&] {
    const Tokens<acc> in{logprobs.const_data_ptr<acc>(),
                         data_of<acc>(old_logprobs, tokens, dtype, "old_logprobs"),
                         advantages.const_data_ptr<acc>(),
                         data_of<acc>(ref_logprobs, tokens, dtype, "ref_logprobs"),
                         data_of<acc>(entropy, tokens, dtype, "entropy"),
                         data_of<acc>(policy_weights, tokens, dtype, "policy_weights"),
                         data_of<bool>(mask, tokens, ScalarType::Bool, "mask"),
                         advantage_per_token,
                         active.mutable_data_ptr<bool>()};
    const auto real = [](double x) { return static_cast<acc>(x); };
    const Policy<acc> policy{real(by.clip_low),
                             real(by.clip_high),
                             real(1.0 - by.clip_low),
                             real(1.0 + by.clip_high),
                             real(by.ratio_cap),
                             {real(by.shape_pos_0), real(by.shape_pos_1)},
                             {real(by.shape_neg_0), real(by.shape_neg_1)}};
    const acc limit = real(by.log_ratio_limit);
    const KLForm<acc> form{factor, gradient_of_k2, limit, real(by.kl_log_ratio_limit), real(by.kl_limit)};
    const Loss<acc> loss{of_ratio, of_surrogate, of_kl, policy, form, limit, real(by.beta), real(by.entropy_coef)};
    run<acc>(in, loss, {of_tokens, count_empty, by.max_length, by.denominator}, by.beta, by.entropy_coef, start,
             sequences, loss_out.mutable_data_ptr<acc>(),
             reinterpret_cast<Statistics*>(statistics_out.mutable_data_ptr<double>()), dlogprobs.mutable_data_ptr<acc>(),
             dentropy.mutable_data_ptr<acc>());
  });
  return {loss_out, statistics_out, dlogprobs, dentropy};
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) { m.impl("grpo_loss_fwd", TORCH_BOX(&lvrpo::grpo_loss_fwd)); }
