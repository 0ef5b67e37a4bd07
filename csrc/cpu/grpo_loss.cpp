// Policy loss, its metrics and its gradient in one pass over packed tokens. Formulas: docs/ops/grpo_loss.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/grpo_loss.h"
#include "common/grpo_loss_call.h"
#include "common/tensors.h"
#include "cpu/simd.h"

namespace lvrpo {
namespace {

using std::optional;

// Tokens of one step: their ratios and slopes stay in L1 between the loops that share them.
constexpr int64_t BLOCK_T = 512;

// Tokens of a block, in L1.
template <typename acc>
struct Block {
  acc logp[BLOCK_T], log_ratio[BLOCK_T], ratio[BLOCK_T], weight[BLOCK_T], advantage[BLOCK_T], slope[BLOCK_T];
  bool active[BLOCK_T];
};

// KL of a block: its slope is added to `slope`. The form that is the estimator alone has a loop of its own.
template <KL kind, bool plain, typename acc>
LVRPO_INLINE void kl_block(const Loss<acc>& loss, const acc* ref, acc of_sequence, Block<acc>& x, int64_t n,
                           Sums& sums) {
  const KLForm<acc> form = loss.kl_form;
  const acc beta = loss.beta;
  const bool shared = loss.kl_of_sequence();
  const bool weighs = beta != acc(0);  // 0 times an overflow is NaN
  double terms = 0, values = 0;
#pragma omp simd reduction(+ : terms, values)
  for (int64_t i = 0; i < n; ++i) {
    const bool on = x.active[i];
    const acc difference = ref[i] - x.logp[i], d = on ? difference : acc(0);
    const KLPart<acc> part = kl_part<kind, plain>(form, d, shared ? of_sequence : x.log_ratio[i]);
    terms += on ? static_cast<double>(part.term) : 0.0;
    values += on ? static_cast<double>(part.seen) : 0.0;
    x.slope[i] += on && weighs ? beta * part.slope : acc(0);
  }
  sums.kl_term += terms;
  sums.kl += values;
}

// Calls, not a table of pointers: a function reached through a pointer is not compiled for the caller's vectors.
template <bool plain, typename acc, int64_t... kind>
LVRPO_INLINE void kl_any(const Loss<acc>& loss, const acc* ref, acc of_sequence, Block<acc>& x, int64_t n, Sums& sums,
                         std::integer_sequence<int64_t, kind...>) {
  ((loss.kl == KL{kind} ? kl_block<KL{kind}, plain>(loss, ref, of_sequence, x, n, sums) : void()), ...);
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

// Which tokens of a sequence are `active`, how many, and what their log-ratios add up to.
template <typename acc>
LVRPO_MULTIVERSION void count_sequence(const Tokens<acc>& in, int64_t index, int64_t begin, int64_t end,
                                       bool sums_log_ratios, Limits limits, bool* active, Sums& sums) {
  const acc *logp = in.logp, *old = in.old ? in.old : logp, *ref = in.ref ? in.ref : logp;
  const acc *entropy = in.entropy ? in.entropy : logp, *weight = in.weight ? in.weight : logp;
  const acc* advantage = in.advantage_per_token ? in.advantage : logp;
  const bool weighted = in.weight != nullptr;
  const acc shared = in.advantage_per_token || begin == end ? acc(0) : in.advantage[index];
  if (in.mask) {
    for (int64_t t = begin; t < end; ++t) active[t] = in.mask[t];
  } else {
    for (int64_t t = begin; t < end; ++t) active[t] = true;
  }
  double tokens = 0, asked = 0, log_ratio = 0, free_log_ratio = 0;
#pragma omp simd reduction(+ : tokens, asked)
  for (int64_t t = begin; t < end; ++t) {
    const acc zero_advantage = (advantage[t] - advantage[t]) + (shared - shared);
    const bool asked_for = active[t];
    const bool on = asked_for && is_usable(logp[t], old[t], ref[t], entropy[t], weight[t], weighted, zero_advantage);
    active[t] = on;
    asked += asked_for ? 1.0 : 0.0;
    tokens += on ? 1.0 : 0.0;
  }
  if (sums_log_ratios && in.old) {
#pragma omp simd reduction(+ : log_ratio, free_log_ratio)
    for (int64_t t = begin; t < end; ++t) {
      const double d = static_cast<double>(logp[t] - old[t]);
      log_ratio += active[t] ? clamp(d, limits.low, limits.high) : 0.0;
      free_log_ratio += active[t] ? d : 0.0;
    }
  }
  sums.tokens = tokens;
  sums.dropped = asked - tokens;
  sums.log_ratio = log_ratio;
  sums.free_log_ratio = free_log_ratio;
}

// Surrogate of a block: its value into sums, its derivative into `slope`. `past` says that the one ratio of the sequence
// is past its limit, `limit` where that of a token is.
template <typename Of, typename acc>
LVRPO_INLINE void surrogate_block(const Policy<acc> by, acc of_weight, bool past, acc limit, Block<acc>& x, int64_t n,
                                  Sums& sums) {
  double policy = 0, low = 0, high = 0, cap = 0, total = 0, squares = 0;
  acc smallest = std::numeric_limits<acc>::infinity(), largest = -std::numeric_limits<acc>::infinity();
#pragma omp simd reduction(+ : policy, low, high, cap, total, squares) reduction(min : smallest) \
    reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const Token<acc> token{x.logp[i], x.log_ratio[i], x.ratio[i], of_weight, x.advantage[i]};
    const bool on = x.active[i], is_past = past || is_saturated(x.log_ratio[i], limit);
    const PolicyPart<acc> part = policy_part<Of>(by, token, x.weight[i], on, is_past);
    const acc ratio = part.ratio;
    const double seen = on ? static_cast<double>(ratio) : 0.0;
    policy += static_cast<double>(part.value);
    x.slope[i] = part.slope;
    low += part.low ? 1.0 : 0.0;
    high += part.high ? 1.0 : 0.0;
    cap += part.cap ? 1.0 : 0.0;
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
LVRPO_INLINE void load_block(const Tokens<acc>& in, const bool* active, int64_t index, int64_t first, int64_t n,
                             Block<acc>& x) {
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
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc l = now[i], d = l - old[i];
    const bool on = active[first + i];
    x.active[i] = on;
    x.logp[i] = on ? l : acc(0);
    x.log_ratio[i] = on ? d : acc(0);
  }
}

// Adds the slope of a sequence's mean or sum to every token in it that no limit holds.
template <typename acc>
LVRPO_INLINE void add_shared_slope(const Tokens<acc>& in, const bool* active, int64_t begin, int64_t end, Limits limits,
                                   acc each, acc* dlogp) {
  const acc low = static_cast<acc>(limits.low), high = static_cast<acc>(limits.high);
  const acc* old = in.old ? in.old : in.logp;
#pragma omp simd
  for (int64_t t = begin; t < end; ++t) {
    const acc d = in.logp[t] - old[t];
    dlogp[t] += active[t] && !(d < low || d > high) ? each : acc(0);
  }
}

// One sequence: its sums, and the derivative of the loss by every log-prob, `factor` being the sequence's share of it.
template <typename acc>
LVRPO_MULTIVERSION void sequence_terms(const Tokens<acc>& in, const Loss<acc>& loss, const bool* active, int64_t index,
                                       int64_t begin, int64_t end, acc factor, acc* dlogp, acc* dentropy, Sums& sums) {
  Block<acc> x;
  const bool shares_slope = loss.shares_slope(), own_ratio = loss.own_ratio();
  const acc limit = loss.log_ratio_limit;
  const acc first_advantage = in.advantage_per_token || begin == end ? acc(0) : in.advantage[index];
  const OfSequence<acc> whole = of_sequence(loss, sums.tokens, sums.log_ratio, first_advantage);
  const KLOfSequence<acc> kl = kl_of_sequence(loss, sums.tokens, sums.free_log_ratio);
  double shared = 0;  // sum of the slopes by the log of the one ratio a sequence has
  for (int64_t first = begin; first < end; first += BLOCK_T) {
    const int64_t n = end - first < BLOCK_T ? end - first : BLOCK_T;
    load_block(in, active, index, first, n, x);
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
    if (in.ref && loss.kl_form.plain()) kl_any<true>(loss, in.ref + first, kl.log_ratio, x, n, sums, all_of<KL>{});
    if (in.ref && !loss.kl_form.plain()) kl_any<false>(loss, in.ref + first, kl.log_ratio, x, n, sums, all_of<KL>{});
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
    add_shared_slope(in, active, begin, end, limits_of(loss, first_advantage), static_cast<acc>(shared / n) * factor,
                     dlogp);
  }
  if (kl.share != acc(0)) {
    const acc each = kl.share * loss.beta * static_cast<acc>(sums.kl_term);
    add_shared_slope(in, active, begin, end, Limits{}, each * factor, dlogp);
  }
  if (loss.one_ratio() && sums.tokens > 0) sums.count_once();
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
void run(const GrpoLossCall& call, acc* loss_out, Statistics* statistics, acc* dlogp, acc* dentropy, bool* active) {
  const Tokens<acc> in = call.inputs<acc>();
  const Loss<acc> loss = call.loss<acc>();
  const Aggregate aggregate = call.aggregate();
  const Numbers numbers = call.named();
  const int64_t* start = call.cu_seqlens.const_data_ptr<int64_t>();
  const int64_t sequences = call.sequences();
  const int64_t grain = std::max<int64_t>(1, 4096 * sequences / std::max<int64_t>(1, call.tokens()));
  std::vector<Sums> sums(sequences);
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Limits limits = limits_of(loss, in.advantage_per_token ? acc(0) : in.advantage[b]);
      count_sequence<acc>(in, b, start[b], start[b + 1], loss.sums_log_ratios(), limits, active, sums[b]);
    }
  });
  double tokens = 0, active_sequences = 0;
  for (const Sums& part : sums) tokens += part.tokens, active_sequences += part.tokens > 0;
  const double outer = aggregate.outer(tokens, static_cast<double>(sequences), active_sequences);
  std::vector<double> factor(sequences);
  for (int64_t b = 0; b < sequences; ++b) factor[b] = 1.0 / (outer * aggregate.inner(sums[b].tokens));
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const acc by = static_cast<acc>(factor[b]);
      sequence_terms<acc>(in, loss, active, b, start[b], start[b + 1], by, dlogp, dentropy, sums[b]);
    }
  });
  double total = 0;
  *statistics = no_statistics();
  for (int64_t b = 0; b < sequences; ++b) {
    add_sequence(*statistics, sums[b], loss.one_ratio());
    statistics->policy_loss += factor[b] * sums[b].policy;
    total += factor[b] * loss_of(sums[b], numbers.beta, numbers.entropy_coef);
  }
  *loss_out = static_cast<acc>(total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_loss_fwd(
    Tensor logprobs, optional<Tensor> old_logprobs, Tensor advantages, Tensor cu_seqlens, optional<Tensor> ref_logprobs,
    optional<Tensor> entropy, optional<Tensor> mask, optional<Tensor> policy_weights, Tensor numbers,
    bool advantage_per_token, bool count_empty, int64_t ratio, int64_t surrogate, int64_t kl, int64_t kl_factor,
    int64_t kl_gradient, int64_t aggregation) {
  GrpoLossCall call{logprobs,  old_logprobs,   advantages, cu_seqlens,          ref_logprobs, entropy,
                    mask,      policy_weights, numbers,    advantage_per_token, count_empty,  ratio,
                    surrogate, kl,             kl_factor,  kl_gradient,         aggregation};
  call.prepare();
  const int64_t tokens = call.tokens(), sequences = call.sequences();
  const int64_t* start = call.cu_seqlens.const_data_ptr<int64_t>();
  LVRPO_CHECK(start[0] == 0 && start[sequences] == tokens, "cu_seqlens must run from 0 to ", tokens);
  for (int64_t b = 0; b < sequences; ++b) LVRPO_CHECK(start[b] <= start[b + 1], "cu_seqlens must not decrease");

  Tensor loss = make_empty(logprobs, {});
  Tensor statistics = make_empty(logprobs, {COLUMNS_OF<Statistics>}, ScalarType::Double);
  Tensor dlogprobs = make_empty(logprobs, {tokens});
  Tensor dentropy = make_empty(logprobs, {entropy ? tokens : 0});
  const std::unique_ptr<bool[]> active = std::make_unique_for_overwrite<bool[]>(tokens);
  LVRPO_DISPATCH_ACC(logprobs.scalar_type(), acc, [&] {
    run<acc>(call, loss.mutable_data_ptr<acc>(),
             reinterpret_cast<Statistics*>(statistics.mutable_data_ptr<double>()), dlogprobs.mutable_data_ptr<acc>(),
             dentropy.mutable_data_ptr<acc>(), active.get());
  });
  return {loss, statistics, dlogprobs, dentropy};
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) { m.impl("grpo_loss_fwd", TORCH_BOX(&lvrpo::grpo_loss_fwd)); }
