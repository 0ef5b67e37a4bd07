// Policy loss, its metrics and its gradient in one pass over packed tokens. Formulas: docs/ops/grpo_loss.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/policy_loss.h"
#include "common/simd.h"

namespace lvrpo {
namespace {

using std::optional;

// Tokens of one step: their ratios and slopes stay in L1 between the loops that share them.
constexpr int64_t BLOCK_T = 512;
constexpr int64_t METRICS = 11;

template <typename acc>
struct Tokens {
  const acc *logp, *old, *advantage, *ref, *entropy, *weight;  // all but logp and advantage may be null
  bool advantage_per_token;
};

template <typename acc>
struct Loss {
  int64_t ratio, surrogate, kl;
  Policy<acc> policy;
  KLForm<acc> kl_form;
  acc beta, entropy_coef;

  bool of_sequence() const { return ratio >= RATIO_SEQ_MEAN; }
  // Whether a sequence's ratio is differentiated as the mean or sum that it is, not through the token's own log-prob.
  bool shares_slope() const { return (ratio == RATIO_SEQ_MEAN || ratio == RATIO_SEQ_SUM) && surrogate != GAMMA; }
};

// Bounds of a token's log-ratio inside the sum over its sequence.
struct Limits {
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();
};

template <typename acc>
Limits limits_of(const Loss<acc>& loss, acc advantage) {
  Limits limits;
  if (loss.surrogate == GAMMA) limits = {-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT};
  if (loss.surrogate == LOG_CLIP && advantage > acc(0)) limits.high = static_cast<double>(loss.policy.clip_high);
  if (loss.surrogate == LOG_CLIP && !(advantage > acc(0))) limits.low = -static_cast<double>(loss.policy.clip_low);
  return limits;
}

// Sums over the active tokens of one sequence.
struct Sums {
  double tokens = 0, log_ratio = 0;
  double policy = 0, kl_term = 0, kl = 0, entropy = 0;
  double ratio = 0, ratio_squared = 0;
  double low = 0, high = 0, cap = 0;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -std::numeric_limits<double>::infinity();
};

// What all tokens of a sequence share: its ratio as the metrics see it, and what it is weighed by.
template <typename acc>
struct OfSequence {
  acc ratio, weight;
};

template <typename acc>
OfSequence<acc> of_sequence(const Loss<acc>& loss, const Sums& sums, acc advantage) {
  if (!loss.of_sequence()) return {acc(1), acc(1)};
  const double n = loss.ratio == RATIO_SEQ_SUM ? 1.0 : std::max(sums.tokens, 1.0);
  double log_ratio = sums.log_ratio / n;
  if (loss.surrogate == GAMMA) log_ratio = clamp(log_ratio, std::log(GAMMA_FLOOR), LOG_RATIO_LIMIT);
  const acc ratio = exp_ratio(static_cast<acc>(log_ratio));
  if (loss.surrogate != GAMMA) return {ratio, ratio};
  const acc* own = advantage > acc(0) ? loss.policy.own_pos : loss.policy.own_neg;
  return {ratio, static_cast<acc>(gamma_weight(log_ratio, own[0], own[1]))};
}

// Tokens of a block, in L1.
template <typename acc>
struct Block {
  acc logp[BLOCK_T], log_ratio[BLOCK_T], ratio[BLOCK_T], weight[BLOCK_T], advantage[BLOCK_T], slope[BLOCK_T];
  bool active[BLOCK_T];
};

// KL of a block: its slope is added to `slope`; `terms` is what the loss sums, `values` what the metric does. The form
// that is the estimator alone has a loop of its own, because limits and factors take a quarter of the time of the other.
template <int64_t kind, bool plain, typename acc>
LVRPO_INLINE void kl_block(const Loss<acc>& loss, const acc* ref, Block<acc>& x, int64_t n, Sums& sums) {
  const KLForm<acc> form = loss.kl_form;
  const acc beta = loss.beta;
  const bool weighs = beta != acc(0);  // 0 times an overflow is NaN
  const bool times_ratio = !plain && form.factor != FACTOR_NONE;
  const bool through_ratio = !plain && form.factor == FACTOR_RATIO;
  double terms = 0, values = 0;
#pragma omp simd reduction(+ : terms, values)
  for (int64_t i = 0; i < n; ++i) {
    const bool on = x.active[i];
    const acc difference = ref[i] - x.logp[i], d = on ? difference : acc(0);
    acc value, derivative;
    if constexpr (plain) {
      estimate_kl<kind>(d, value, derivative);
    } else {
      formed_kl<kind>(form, d, value, derivative);
    }
    const acc rho = times_ratio ? exp_ratio(x.log_ratio[i]) : acc(1);
    const acc term = rho * value;
    terms += on ? static_cast<double>(term) : 0.0;
    values += on ? static_cast<double>(value) : 0.0;
    x.slope[i] += on && weighs ? beta * (rho * derivative + (through_ratio ? term : acc(0))) : acc(0);
  }
  sums.kl_term += terms;
  sums.kl += values;
}

// Calls, not a table of pointers: a function reached through a pointer is not compiled for the caller's vectors.
template <bool plain, typename acc>
LVRPO_INLINE void kl_any(const Loss<acc>& loss, const acc* ref, Block<acc>& x, int64_t n, Sums& sums) {
  if (loss.kl == K1) return kl_block<K1, plain>(loss, ref, x, n, sums);
  if (loss.kl == K2) return kl_block<K2, plain>(loss, ref, x, n, sums);
  if (loss.kl == K3) return kl_block<K3, plain>(loss, ref, x, n, sums);
  kl_block<KL_ABS, plain>(loss, ref, x, n, sums);
}

template <typename acc>
LVRPO_MULTIVERSION void count_sequence(const acc* logp, const acc* old, const acc* weight, int64_t n, Limits limits,
                                       Sums& sums) {
  double tokens = 0, log_ratio = 0;
  if (weight) {
#pragma omp simd reduction(+ : tokens)
    for (int64_t i = 0; i < n; ++i) tokens += weight[i] != acc(0) ? 1.0 : 0.0;
  }
  if (old && weight) {
#pragma omp simd reduction(+ : log_ratio)
    for (int64_t i = 0; i < n; ++i) {
      const double d = clamp(static_cast<double>(logp[i] - old[i]), limits.low, limits.high);
      log_ratio += weight[i] != acc(0) ? d : 0.0;
    }
  } else if (old) {
#pragma omp simd reduction(+ : log_ratio)
    for (int64_t i = 0; i < n; ++i)
      log_ratio += clamp(static_cast<double>(logp[i] - old[i]), limits.low, limits.high);
  }
  sums.tokens = weight ? tokens : static_cast<double>(n);
  sums.log_ratio = log_ratio;
}

// Surrogate of a block: its value into sums, its derivative into `slope`.
template <typename Kind, typename acc>
LVRPO_INLINE void surrogate_block(const Policy<acc> by, acc of_weight, Block<acc>& x, int64_t n, Sums& sums) {
  double policy = 0, low = 0, high = 0, cap = 0, total = 0, squares = 0;
  acc smallest = std::numeric_limits<acc>::infinity(), largest = -std::numeric_limits<acc>::infinity();
#pragma omp simd reduction(+ : policy, low, high, cap, total, squares) reduction(min : smallest) \
    reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const Token<acc> token{x.logp[i], x.log_ratio[i], x.ratio[i], of_weight, x.advantage[i]};
    const Term<acc> term = Kind::term(by, token);
    const bool on = x.active[i];
    const double seen = on ? static_cast<double>(token.ratio) : 0.0;
    policy += on ? static_cast<double>(term.value) : 0.0;
    x.slope[i] = on ? term.slope : acc(0);
    low += on && term.low ? 1.0 : 0.0;
    high += on && term.high ? 1.0 : 0.0;
    cap += on && term.cap ? 1.0 : 0.0;
    total += seen;
    squares += seen * seen;
    smallest = on && token.ratio < smallest ? token.ratio : smallest;
    largest = on && token.ratio > largest ? token.ratio : largest;
  }
  sums.policy += policy, sums.low += low, sums.high += high, sums.cap += cap;
  sums.ratio += total, sums.ratio_squared += squares;
  sums.ratio_min = std::min(sums.ratio_min, static_cast<double>(smallest));
  sums.ratio_max = std::max(sums.ratio_max, static_cast<double>(largest));
}

template <typename acc>
LVRPO_INLINE void surrogate_any(const Loss<acc>& loss, acc of_weight, Block<acc>& x, int64_t n, Sums& sums) {
  const Policy<acc> by = loss.policy;
  if (loss.ratio == RATIO_NONE) return surrogate_block<ScoreSurrogate>(by, of_weight, x, n, sums);
  if (loss.surrogate == CLIP) return surrogate_block<ClipSurrogate>(by, of_weight, x, n, sums);
  if (loss.surrogate == DETACHED) return surrogate_block<DetachedSurrogate>(by, of_weight, x, n, sums);
  if (loss.surrogate == SIGMOID) return surrogate_block<SigmoidSurrogate>(by, of_weight, x, n, sums);
  if (loss.surrogate == GAMMA) return surrogate_block<GammaSurrogate>(by, of_weight, x, n, sums);
  if (loss.surrogate == LOG_CLIP) return surrogate_block<LogClipSurrogate>(by, of_weight, x, n, sums);
  if (loss.surrogate == BINARY_KL) return surrogate_block<BinaryKLSurrogate>(by, of_weight, x, n, sums);
  surrogate_block<TotalVariationSurrogate>(by, of_weight, x, n, sums);
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
  // On policy the log-ratio is 0, or NaN where the log-prob is not finite, so that the caller hears of it.
  const acc* old = in.old ? in.old + first : now;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc l = now[i], d = l - old[i];
    const bool on = x.weight[i] != acc(0);
    x.active[i] = on;
    x.advantage[i] *= x.weight[i];
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
  const acc* weight = in.weight ? in.weight : in.logp;
  const bool weighted = in.weight != nullptr;
#pragma omp simd
  for (int64_t t = begin; t < end; ++t) {
    const acc d = in.logp[t] - old[t];
    const bool on = !weighted || weight[t] != acc(0);
    dlogp[t] += on && !(d < low || d > high) ? each : acc(0);
  }
}

// One sequence: its sums, and the derivative of the loss by every log-prob, `factor` being the sequence's share of it.
template <typename acc>
LVRPO_MULTIVERSION void sequence_terms(const Tokens<acc>& in, const Loss<acc>& loss, int64_t index, int64_t begin,
                                       int64_t end, acc factor, acc* dlogp, acc* dentropy, Sums& sums) {
  Block<acc> x;
  const bool shares_slope = loss.shares_slope();
  const bool own_ratio = !loss.of_sequence() || loss.surrogate == LOG_CLIP;
  const acc first_advantage = in.advantage_per_token || begin == end ? acc(0) : in.advantage[index];
  const OfSequence<acc> whole = of_sequence(loss, sums, first_advantage);
  double shared = 0;  // sum of the slopes by the log of the one ratio a sequence has
  for (int64_t first = begin; first < end; first += BLOCK_T) {
    const int64_t n = end - first < BLOCK_T ? end - first : BLOCK_T;
    load_block(in, index, first, n, x);
    if (own_ratio) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x.ratio[i] = exp_ratio(x.log_ratio[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) x.ratio[i] = whole.ratio;
    }
    surrogate_any(loss, whole.weight, x, n, sums);
    if (shares_slope) {
      for (int64_t i = 0; i < n; ++i) shared += static_cast<double>(x.slope[i]), x.slope[i] = acc(0);
    }
    if (in.ref && loss.kl_form.plain()) kl_any<true>(loss, in.ref + first, x, n, sums);
    if (in.ref && !loss.kl_form.plain()) kl_any<false>(loss, in.ref + first, x, n, sums);
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
    const double n = loss.ratio == RATIO_SEQ_MEAN ? sums.tokens : 1.0;
    add_shared_slope(in, begin, end, limits_of(loss, first_advantage), static_cast<acc>(shared / n) * factor, dlogp);
  }
}

Sums merge(const std::vector<Sums>& parts) {
  Sums all;
  for (const Sums& part : parts) {
    all.tokens += part.tokens;
    all.kl += part.kl, all.entropy += part.entropy;
    all.ratio += part.ratio, all.ratio_squared += part.ratio_squared;
    all.low += part.low, all.high += part.high, all.cap += part.cap;
    all.ratio_min = std::min(all.ratio_min, part.ratio_min);
    all.ratio_max = std::max(all.ratio_max, part.ratio_max);
  }
  return all;
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
  int64_t kind;
  double max_length;
  bool count_empty;
  double denominator;  // 0: the count of this call

  double outer(const std::vector<Sums>& sums) const {
    if (denominator > 0) return denominator;
    if (kind == TOKEN_SUM) return 1.0;
    double count = 0;
    for (const Sums& part : sums) count += kind == TOKEN_MEAN ? part.tokens : count_empty || part.tokens > 0 ? 1.0 : 0.0;
    return std::max(count, 1.0);
  }

  // What divides the sum over the tokens of a sequence with `tokens` active ones, besides `outer`.
  double inner(double tokens) const {
    if (kind == SEQ_MEAN_TOKEN_MEAN) return std::max(tokens, 1.0);
    return kind == SEQ_MEAN_TOKEN_SUM_NORM ? max_length : 1.0;
  }
};

template <typename acc>
void store(const Sums& all, double loss, double policy_loss, acc* loss_out, acc* metrics) {
  const bool none = all.tokens == 0;
  const double n = none ? 1.0 : all.tokens;
  const double ess = all.ratio * all.ratio / (all.ratio_squared * n);
  // In the order of the fields of LossMetrics.
  const double fields[METRICS] = {policy_loss,
                                  all.kl / n,
                                  all.entropy / n,
                                  all.low / n,
                                  all.high / n,
                                  all.cap / n,
                                  none ? 1.0 : all.ratio_min,
                                  none ? 1.0 : all.ratio_max,
                                  none ? 1.0 : all.ratio / n,
                                  none ? 1.0 : ess,
                                  all.tokens};
  *loss_out = static_cast<acc>(loss);
  for (int64_t i = 0; i < METRICS; ++i) metrics[i] = static_cast<acc>(fields[i]);
}

// Sequences are the unit of work and their sums are added in order: the bits do not depend on the thread count.
template <typename acc>
void run(const Tokens<acc>& in, const Loss<acc>& loss, const Aggregate& aggregate, double beta, double entropy_coef,
         const int64_t* start, int64_t sequences, acc* loss_out, acc* metrics, acc* dlogp, acc* dentropy) {
  const int64_t grain = std::max<int64_t>(1, 4096 * sequences / std::max<int64_t>(1, start[sequences]));
  std::vector<Sums> sums(sequences);
  const acc* old = loss.of_sequence() ? in.old : nullptr;  // nobody else asks for the sum of the log-ratios
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Limits limits = limits_of(loss, in.advantage_per_token ? acc(0) : in.advantage[b]);
      count_sequence<acc>(in.logp + start[b], old ? old + start[b] : nullptr, in.weight ? in.weight + start[b] : nullptr,
                          start[b + 1] - start[b], limits, sums[b]);
    }
  });
  std::vector<double> factor(sequences);
  const double outer = aggregate.outer(sums);
  for (int64_t b = 0; b < sequences; ++b) factor[b] = 1.0 / (outer * aggregate.inner(sums[b].tokens));
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      sequence_terms<acc>(in, loss, b, start[b], start[b + 1], static_cast<acc>(factor[b]), dlogp, dentropy, sums[b]);
  });
  double policy = 0, total = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    policy += factor[b] * sums[b].policy;
    const double kl_term = beta != 0 ? beta * sums[b].kl_term : 0;
    total += factor[b] * (sums[b].policy + kl_term - entropy_coef * sums[b].entropy);
  }
  store(merge(sums), total, policy, loss_out, metrics);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_loss_fwd(
    Tensor logprobs, optional<Tensor> old_logprobs, Tensor advantages, Tensor cu_seqlens, optional<Tensor> ref_logprobs,
    optional<Tensor> entropy, optional<Tensor> token_weights, int64_t ratio, int64_t surrogate, double clip_low,
    double clip_high, double ratio_cap, double own_pos_0, double own_pos_1, double own_neg_0, double own_neg_1,
    double beta, int64_t kl, int64_t kl_factor, int64_t kl_gradient, double kl_log_ratio_limit, double kl_limit,
    double entropy_coef, int64_t aggregation, double max_length, bool count_empty, double denominator) {
  LVRPO_CHECK(ratio >= RATIO_NONE && ratio <= RATIO_SEQ_SUM, "ratio is ", ratio);
  LVRPO_CHECK(surrogate >= CLIP && surrogate <= LOG_CLIP, "surrogate is ", surrogate);
  LVRPO_CHECK(kl >= K1 && kl <= KL_ABS, "kl is ", kl);
  LVRPO_CHECK(kl_factor >= FACTOR_NONE && kl_factor <= FACTOR_DETACHED_RATIO, "kl_factor is ", kl_factor);
  LVRPO_CHECK(kl_gradient >= GRADIENT_OWN && kl_gradient <= GRADIENT_K2, "kl_gradient is ", kl_gradient);
  LVRPO_CHECK(aggregation >= TOKEN_MEAN && aggregation <= TOKEN_SUM, "aggregation is ", aggregation);
  LVRPO_CHECK(logprobs.dim() == 1 && advantages.dim() == 1 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
              "logprobs, advantages and cu_seqlens must have one dimension");
  for (optional<Tensor>* tensor : {&old_logprobs, &ref_logprobs, &entropy, &token_weights})
    if (*tensor) *tensor = torch::stable::contiguous(**tensor);
  logprobs = torch::stable::contiguous(logprobs);
  advantages = torch::stable::contiguous(advantages);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  check_dtype(cu_seqlens, ScalarType::Long, "cu_seqlens");
  const ScalarType dtype = logprobs.scalar_type();
  check_dtype(advantages, dtype, "advantages");
  const int64_t tokens = logprobs.size(0), sequences = cu_seqlens.size(0) - 1;
  const bool per_token = advantages.size(0) != sequences;
  LVRPO_CHECK(!per_token || advantages.size(0) == tokens, "advantages must be [B] or [T]");
  LVRPO_CHECK(!per_token || (ratio != RATIO_SEQ_MEAN && ratio != RATIO_SEQ_SUM), "advantages must be [B]");
  const int64_t* start = cu_seqlens.const_data_ptr<int64_t>();
  LVRPO_CHECK(start[0] == 0 && start[sequences] == tokens, "cu_seqlens must run from 0 to ", tokens);
  for (int64_t b = 0; b < sequences; ++b) LVRPO_CHECK(start[b] <= start[b + 1], "cu_seqlens must not decrease");

  Tensor loss_out = torch::stable::new_empty(logprobs, {});
  Tensor metrics_out = torch::stable::new_empty(logprobs, {METRICS});
  Tensor dlogprobs = torch::stable::new_empty(logprobs, {tokens});
  Tensor dentropy = torch::stable::new_empty(logprobs, {entropy ? tokens : 0});
  LVRPO_DISPATCH_ACC(dtype, acc, [&] {
    const Tokens<acc> in{logprobs.const_data_ptr<acc>(),
                         data_of<acc>(old_logprobs, tokens, dtype, "old_logprobs"),
                         advantages.const_data_ptr<acc>(),
                         data_of<acc>(ref_logprobs, tokens, dtype, "ref_logprobs"),
                         data_of<acc>(entropy, tokens, dtype, "entropy"),
                         data_of<acc>(token_weights, tokens, dtype, "token_weights"),
                         per_token};
    const auto real = [](double x) { return static_cast<acc>(x); };
    const Policy<acc> policy{real(clip_low),  real(clip_high), real(1.0 - clip_low),
                             real(1.0 + clip_high), real(ratio_cap), {real(own_pos_0), real(own_pos_1)},
                             {real(own_neg_0), real(own_neg_1)}};
    const KLForm<acc> form{kl_factor, kl_gradient == GRADIENT_K2, real(kl_log_ratio_limit), real(kl_limit)};
    const Loss<acc> loss{ratio, surrogate, kl, policy, form, real(beta), real(entropy_coef)};
    run<acc>(in, loss, {aggregation, max_length, count_empty, denominator}, beta, entropy_coef, start, sequences,
             loss_out.mutable_data_ptr<acc>(), metrics_out.mutable_data_ptr<acc>(), dlogprobs.mutable_data_ptr<acc>(),
             dentropy.mutable_data_ptr<acc>());
  });
  return {loss_out, metrics_out, dlogprobs, dentropy};
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) { m.impl("grpo_loss_fwd", TORCH_BOX(&lvrpo::grpo_loss_fwd)); }
