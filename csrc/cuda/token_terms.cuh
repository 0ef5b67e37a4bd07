// The terms of a lane's tokens: what they add to the sums of their slice, and the slopes of their log-probs.
// Formulas: docs/ops/grpo_loss.md.
#pragma once

#include <limits>
#include <utility>

#include "cuda/token_slices.cuh"

namespace lvrpo::grpo {

// Sums of a lane; counts are integers because those cost less.
template <typename acc>
struct LaneSums {
  double policy = 0, kl_term = 0, kl = 0, entropy = 0, kl_old = 0, ratio = 0, ratio_squared = 0;
  int asked = 0, tokens = 0, low = 0, high = 0, cap = 0;
  acc ratio_min = std::numeric_limits<acc>::infinity(), ratio_max = -std::numeric_limits<acc>::infinity();

  __device__ __forceinline__ Sums sums() const {
    Sums all;
    all.tokens = tokens, all.dropped = asked - tokens;
    all.policy = policy, all.kl_term = kl_term, all.kl = kl, all.entropy = entropy, all.kl_old = kl_old;
    all.ratio = ratio, all.ratio_squared = ratio_squared;
    all.low = low, all.high = high, all.cap = cap;
    all.ratio_min = ratio_min, all.ratio_max = ratio_max;
    return all;
  }
};

struct AddSums {
  __device__ __forceinline__ Sums operator()(Sums a, const Sums& b) const {
    a.tokens += b.tokens, a.dropped += b.dropped;
    a.policy += b.policy, a.kl_term += b.kl_term, a.kl += b.kl, a.entropy += b.entropy, a.kl_old += b.kl_old;
    a.ratio += b.ratio, a.ratio_squared += b.ratio_squared;
    a.low += b.low, a.high += b.high, a.cap += b.cap;
    a.ratio_min = b.ratio_min < a.ratio_min ? b.ratio_min : a.ratio_min;
    raise_to(a.ratio_max, b.ratio_max);
    return a;
  }
};

// What the tokens of a slice share.
template <typename acc>
struct Shared {
  OfSequence<acc> whole;
  acc advantage, factor;
  acc slope;       // by the log of the one ratio, a token's share of it, with the factor
  acc low, high;   // where a log-ratio has no part in that
  acc kl_log_ratio, kl_slope;  // the same of the factor of the KL terms, if they share one
};

// Tokens of a lane on their way from loads to gradients.
template <typename acc>
struct Tile {
  Loaded<acc> x;
  Few<acc> log_ratio, ratio, slope;
};

template <typename Of, typename acc>
__device__ __forceinline__ void add_policy(const Loss<acc>& loss, const Shared<acc>& of, Tile<acc>& tile,
                                           LaneSums<acc>& sums) {
  const bool of_sequence = loss.of_sequence();
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    const Token<acc> token{tile.x.logp[i], tile.log_ratio[i], tile.ratio[i], of.whole.weight, tile.x.advantage[i]};
    const bool on = tile.x.active[i];
    // Of a sequence the limit is that of its own ratio.
    const bool past = of_sequence ? of.whole.saturated : is_saturated(tile.log_ratio[i], loss.log_ratio_limit);
    const PolicyPart<acc> part = policy_part<Of>(loss.policy, token, tile.x.weight[i], on, past);
    const double seen = on ? static_cast<double>(part.ratio) : 0.0;
    sums.policy += static_cast<double>(part.value);
    tile.slope[i] = part.slope;
    sums.low += part.low, sums.high += part.high, sums.cap += part.cap;
    sums.ratio += seen, sums.ratio_squared += seen * seen;
    sums.ratio_min = on && part.ratio < sums.ratio_min ? part.ratio : sums.ratio_min;
    sums.ratio_max = on && part.ratio > sums.ratio_max ? part.ratio : sums.ratio_max;
  }
}

template <KL kind, bool plain, typename acc>
__device__ __forceinline__ void add_kl(const Loss<acc>& loss, acc of_sequence, Tile<acc>& tile, LaneSums<acc>& sums) {
  const bool shared = loss.kl_of_sequence();
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    const bool on = tile.x.active[i];
    const acc d = on ? tile.x.ref[i] - tile.x.logp[i] : acc(0);
    const KLPart<acc> part = kl_part<kind, plain>(loss.kl_form, d, shared ? of_sequence : tile.log_ratio[i]);
    sums.kl_term += on ? static_cast<double>(part.term) : 0.0;
    sums.kl += on ? static_cast<double>(part.seen) : 0.0;
    tile.slope[i] += on && loss.beta != acc(0) ? loss.beta * part.slope : acc(0);  // 0 times an overflow is NaN
  }
}

// Choices are the same for a whole launch: a branch for a few tokens at once costs less than loading a kernel for each.
template <typename acc, int64_t... kind>
__device__ __forceinline__ void add_any_policy(const Loss<acc>& loss, const Shared<acc>& of, Tile<acc>& tile,
                                               LaneSums<acc>& sums, std::integer_sequence<int64_t, kind...>) {
  if (loss.ratio == Ratio::none) return add_policy<ScoreTerm>(loss, of, tile, sums);
  ((loss.surrogate == Surrogate{kind} ? add_policy<SurrogateTerm<Surrogate{kind}>>(loss, of, tile, sums) : void()),
   ...);
}

template <bool plain, typename acc, int64_t... kind>
__device__ __forceinline__ void add_any_kl(const Loss<acc>& loss, acc of_sequence, Tile<acc>& tile,
                                           LaneSums<acc>& sums, std::integer_sequence<int64_t, kind...>) {
  ((loss.kl == KL{kind} ? add_kl<KL{kind}, plain>(loss, of_sequence, tile, sums) : void()), ...);
}

}  // namespace lvrpo::grpo
