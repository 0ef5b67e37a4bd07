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
  int64_t ratio, kl;
  acc low, high, cap;
  acc beta, entropy_coef;
  bool kl_times_ratio;
};

// Sums over the active tokens of one sequence.
struct Sums {
  double tokens = 0, log_ratio = 0;
  double policy = 0, kl_term = 0, kl = 0, entropy = 0;
  double ratio = 0, ratio_squared = 0;
  double low = 0, high = 0, cap = 0;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -std::numeric_limits<double>::infinity();
};

// KL of a block: its slope is added to `slope`; `terms` is what the loss sums, `values` what the metric does.
template <int64_t kind, typename acc>
LVRPO_INLINE void kl_block(const Loss<acc>& loss, const acc* ref, const acc* logp, const acc* log_ratio,
                           const bool* active, int64_t n, acc* slope, Sums& sums) {
  const acc beta = loss.beta;
  const bool times_ratio = loss.kl_times_ratio, weighs = beta != acc(0);  // 0 times an overflow is NaN
  double terms = 0, values = 0;
#pragma omp simd reduction(+ : terms, values)
  for (int64_t i = 0; i < n; ++i) {
    acc value, derivative;
    const acc d = ref[i] - logp[i];
    estimate_kl<kind>(active[i] ? d : acc(0), value, derivative);
    const acc rho = times_ratio ? exp_ratio(log_ratio[i]) : acc(1);
    const acc term = rho * value;
    const acc through_ratio = times_ratio ? term : acc(0);
    terms += active[i] ? static_cast<double>(term) : 0.0;
    values += active[i] ? static_cast<double>(value) : 0.0;
    slope[i] += active[i] && weighs ? beta * (rho * derivative + through_ratio) : acc(0);
  }
  sums.kl_term += terms;
  sums.kl += values;
}

// Calls, not a table of pointers: a function reached through a pointer is not compiled for the caller's vectors.
template <typename acc>
LVRPO_INLINE void kl_any(const Loss<acc>& loss, const acc* ref, const acc* logp, const acc* log_ratio,
                         const bool* active, int64_t n, acc* slope, Sums& sums) {
  if (loss.kl == K1) return kl_block<K1>(loss, ref, logp, log_ratio, active, n, slope, sums);
  if (loss.kl == K2) return kl_block<K2>(loss, ref, logp, log_ratio, active, n, slope, sums);
  if (loss.kl == K3) return kl_block<K3>(loss, ref, logp, log_ratio, active, n, slope, sums);
  kl_block<KL_ABS>(loss, ref, logp, log_ratio, active, n, slope, sums);
}

template <typename acc>
LVRPO_MULTIVERSION void count_sequence(const acc* logp, const acc* old, const acc* weight, int64_t n, Sums& sums) {
  double tokens = 0, log_ratio = 0;
  if (weight) {
#pragma omp simd reduction(+ : tokens)
    for (int64_t i = 0; i < n; ++i) tokens += weight[i] != acc(0) ? 1.0 : 0.0;
  }
  if (old && weight) {
#pragma omp simd reduction(+ : log_ratio)
    for (int64_t i = 0; i < n; ++i) {
      const double d = static_cast<double>(logp[i] - old[i]);
      log_ratio += weight[i] != acc(0) ? d : 0.0;
    }
  } else if (old) {
#pragma omp simd reduction(+ : log_ratio)
    for (int64_t i = 0; i < n; ++i) log_ratio += static_cast<double>(logp[i] - old[i]);
  }
  sums.tokens = weight ? tokens : static_cast<double>(n);
  sums.log_ratio = log_ratio;
}

// Surrogate of a block: its value into sums, its derivative by the log-ratio into `slope` (by the log-prob for "none").
template <typename acc>
LVRPO_INLINE void surrogate_block(const Loss<acc>& loss, const acc* logp, const acc* ratio, const acc* weight,
                                  const acc* advantage, const bool* active, int64_t n, acc* slope, Sums& sums) {
  const bool reinforce = loss.ratio == RATIO_NONE;
  double policy = 0, low = 0, high = 0, cap = 0, total = 0, squares = 0;
  acc smallest = std::numeric_limits<acc>::infinity(), largest = -std::numeric_limits<acc>::infinity();
#pragma omp simd reduction(+ : policy, low, high, cap, total, squares) reduction(min : smallest) \
    reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const acc a = advantage[i], rho = ratio[i];
    const bool is_low = a < acc(0) && rho < loss.low;
    const bool is_high = a > acc(0) && rho > loss.high;
    const bool is_cap = a < acc(0) && rho > loss.cap;
    // max(-rho a, -clip(rho) a): only one side of the clip can bind, the one that the sign of a picks.
    const acc upper = a < acc(0) ? loss.cap : loss.high;
    const acc bounded = is_low ? loss.low : rho > upper ? upper : rho;
    const acc gain = -weight[i] * a;
    const acc value = gain * (reinforce ? logp[i] : bounded);
    const acc derivative = reinforce ? gain : is_low || is_high || is_cap ? acc(0) : gain * bounded;
    const bool on = active[i];
    const double seen = on ? static_cast<double>(rho) : 0.0;
    policy += on ? static_cast<double>(value) : 0.0;
    slope[i] = on ? derivative : acc(0);
    low += on && is_low ? 1.0 : 0.0;
    high += on && is_high ? 1.0 : 0.0;
    cap += on && is_cap ? 1.0 : 0.0;
    total += seen;
    squares += seen * seen;
    smallest = on && rho < smallest ? rho : smallest;
    largest = on && rho > largest ? rho : largest;
  }
  sums.policy += policy, sums.low += low, sums.high += high, sums.cap += cap;
  sums.ratio += total, sums.ratio_squared += squares;
  sums.ratio_min = std::min(sums.ratio_min, static_cast<double>(smallest));
  sums.ratio_max = std::max(sums.ratio_max, static_cast<double>(largest));
}

// Every load is unconditional and selected afterwards: a branch on a random mask costs more than all the arithmetic.
template <typename acc>
LVRPO_INLINE void load_block(const Tokens<acc>& in, int64_t index, int64_t first, int64_t n, acc* logp, acc* log_ratio,
                             acc* weight, acc* advantage, bool* active) {
  if (in.weight) {
    for (int64_t i = 0; i < n; ++i) weight[i] = in.weight[first + i];
  } else {
    for (int64_t i = 0; i < n; ++i) weight[i] = acc(1);
  }
  if (in.advantage_per_token) {
    for (int64_t i = 0; i < n; ++i) advantage[i] = in.advantage[first + i];
  } else {
    for (int64_t i = 0; i < n; ++i) advantage[i] = in.advantage[index];
  }
  const acc* now = in.logp + first;
  // On policy the log-ratio is 0, or NaN where the log-prob is not finite, so that the caller hears of it.
  const acc* old = in.old ? in.old + first : now;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc l = now[i], d = l - old[i];
    const bool on = weight[i] != acc(0);
    active[i] = on;
    logp[i] = on ? l : acc(0);
    log_ratio[i] = on ? d : acc(0);
  }
}

// One sequence: its sums, and the derivative of the loss by every log-prob, `factor` being the sequence's share of it.
template <typename acc>
LVRPO_MULTIVERSION void sequence_terms(const Tokens<acc>& in, const Loss<acc>& loss, int64_t index, int64_t begin,
                                       int64_t end, acc factor, acc* dlogp, acc* dentropy, Sums& sums) {
  acc logp[BLOCK_T], log_ratio[BLOCK_T], ratio[BLOCK_T], weight[BLOCK_T], advantage[BLOCK_T], slope[BLOCK_T];
  bool active[BLOCK_T];
  const bool per_sequence = loss.ratio == RATIO_SEQ_MEAN;
  const acc mean_ratio = exp_ratio(static_cast<acc>(sums.log_ratio / (sums.tokens > 0 ? sums.tokens : 1.0)));
  double through_ratio = 0;  // sum of the slopes by the log of the one ratio a sequence has
  for (int64_t first = begin; first < end; first += BLOCK_T) {
    const int64_t n = end - first < BLOCK_T ? end - first : BLOCK_T;
    load_block(in, index, first, n, logp, log_ratio, weight, advantage, active);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) ratio[i] = per_sequence ? mean_ratio : exp_ratio(log_ratio[i]);
    surrogate_block(loss, logp, ratio, weight, advantage, active, n, slope, sums);
    if (per_sequence) {
      for (int64_t i = 0; i < n; ++i) through_ratio += static_cast<double>(slope[i]), slope[i] = acc(0);
    }
    if (in.ref) kl_any(loss, in.ref + first, logp, log_ratio, active, n, slope, sums);
    if (in.entropy) {
      double entropy = 0;
#pragma omp simd reduction(+ : entropy)
      for (int64_t i = 0; i < n; ++i) {
        const double e = static_cast<double>(in.entropy[first + i]);
        entropy += active[i] ? e : 0.0;
        dentropy[first + i] = active[i] ? -loss.entropy_coef * factor : acc(0);
      }
      sums.entropy += entropy;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dlogp[first + i] = factor * slope[i];
  }
  if (per_sequence && sums.tokens > 0) {
    const acc each = static_cast<acc>(through_ratio / sums.tokens) * factor;
    if (in.weight) {
#pragma omp simd
      for (int64_t t = begin; t < end; ++t) dlogp[t] += in.weight[t] != acc(0) ? each : acc(0);
    } else {
      for (int64_t t = begin; t < end; ++t) dlogp[t] += each;
    }
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
  double max_length, denominator;  // denominator 0: the count of this call

  // What multiplies the sum over the tokens of a sequence with `tokens_here` active ones.
  double factor(double sequences, double tokens, double tokens_here) const {
    if (kind == TOKEN_MEAN) return 1.0 / (denominator > 0 ? denominator : std::max(tokens, 1.0));
    const double outer = denominator > 0 ? denominator : std::max(sequences, 1.0);
    if (kind == SEQ_MEAN_TOKEN_MEAN) return 1.0 / (outer * std::max(tokens_here, 1.0));
    return kind == SEQ_MEAN_TOKEN_SUM_NORM ? 1.0 / (outer * max_length) : 1.0 / outer;
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
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      count_sequence<acc>(in.logp + start[b], in.old ? in.old + start[b] : nullptr,
                          in.weight ? in.weight + start[b] : nullptr, start[b + 1] - start[b], sums[b]);
  });
  double active = 0;
  for (const Sums& part : sums) active += part.tokens;
  std::vector<double> factor(sequences);
  for (int64_t b = 0; b < sequences; ++b)
    factor[b] = aggregate.factor(static_cast<double>(sequences), active, sums[b].tokens);
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
    optional<Tensor> entropy, optional<Tensor> token_weights, int64_t ratio, double clip_low, double clip_high,
    double ratio_cap, double beta, int64_t kl, bool kl_times_ratio, double entropy_coef, int64_t aggregation,
    double max_length, double denominator) {
  LVRPO_CHECK(ratio >= RATIO_NONE && ratio <= RATIO_SEQ_MEAN, "ratio is ", ratio);
  LVRPO_CHECK(kl >= K1 && kl <= KL_ABS, "kl is ", kl);
  LVRPO_CHECK(aggregation >= TOKEN_MEAN && aggregation <= SEQ_MEAN_TOKEN_SUM_NORM, "aggregation is ", aggregation);
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
    const Loss<acc> loss{ratio,
                         kl,
                         static_cast<acc>(1.0 - clip_low),
                         static_cast<acc>(1.0 + clip_high),
                         static_cast<acc>(ratio_cap),
                         static_cast<acc>(beta),
                         static_cast<acc>(entropy_coef),
                         kl_times_ratio};
    run<acc>(in, loss, {aggregation, max_length, denominator}, beta, entropy_coef, start, sequences,
             loss_out.mutable_data_ptr<acc>(), metrics_out.mutable_data_ptr<acc>(), dlogprobs.mutable_data_ptr<acc>(),
             dentropy.mutable_data_ptr<acc>());
  });
  return {loss_out, metrics_out, dlogprobs, dentropy};
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) { m.impl("grpo_loss_fwd", TORCH_BOX(&lvrpo::grpo_loss_fwd)); }
