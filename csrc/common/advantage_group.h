// The advantages of one group: its statistics, baseline and scale. Formulas: docs/ops/normalize_advantages.md.
//
// Several threads may share a group. `Samples` is what one of them sees of it: `size` samples with their `rewards` each,
// of which this thread takes first(), first() + step(), ...; value(b, k), 0 where a reward does not apply, counted(b, k),
// 1 or 0, scored(b), whether any applies, length(b); part(b, k) and total(b) to write, of its own samples only;
// over_group(x, join), which joins what the threads have, the same in all of them; and show(to, x), which writes what all
// have the same. All threads of a group make the same calls of over_group and show.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/math.h"
#include "common/names.h"

// Before a loop over samples or rewards, of which a thread of a GPU has few: nvcc unrolls every one by four, and a kernel
// that has them all would not fit in its registers.
#ifdef __CUDA_ARCH__
#define LVRPO_ROLLED _Pragma("unroll 1")
#else
#define LVRPO_ROLLED
#endif

namespace lvrpo {

// What is left of a group after subtracting its mean is rounding below this share of its largest reward.
inline constexpr double ROUNDING = 0x1p-40;

// What they mean is said in lvrpo/params/advantages.py.
LVRPO_CHOICES(Combine, decoupled, sum)
LVRPO_CHOICES(Baseline, mean, leave_one_out, length, second_best, none)
LVRPO_CHOICES(Scale, group, leave_one_out, batch, nonzero, none)
LVRPO_CHOICES(Whiten, none, sequence, token)
LVRPO_TABLE(EstimatorNumbers, double, ddof, eps, std_floor, clip);
// The rows of AdvantageStats.
LVRPO_CHOICES(Stat, share, constant_groups, mean, std, applicable)

struct Estimator {
  bool decoupled;
  Baseline baseline;
  Scale scale;
  Whiten whiten;
  double ddof, eps, std_floor, clip;

  LVRPO_INLINE double freedom(double n) const { return std::max(n - ddof, 1.0); }
  LVRPO_INLINE double std(double squares, double n) const { return std::sqrt(squares / freedom(n)); }
  LVRPO_INLINE double divisor(double std) const {
    const double sum = std::max(std + eps, std_floor);
    return sum > 0 ? sum : 1.0;
  }
  LVRPO_INLINE bool scales_by_batch() const {
    switch (scale) {
      case Scale::batch:
      case Scale::nonzero:
        return true;
      case Scale::group:
      case Scale::leave_one_out:
      case Scale::none:
        break;
    }
    return false;
  }
  LVRPO_INLINE bool sums_to_zero() const {
    return (baseline == Baseline::mean || baseline == Baseline::leave_one_out) && scale != Scale::leave_one_out &&
           whiten != Whiten::token;
  }
  bool counts_tokens() const { return baseline == Baseline::length || whiten == Whiten::token; }
};

// What the op's arguments say of the estimator.
inline Estimator as_estimator(const EstimatorNumbers& by, int64_t combine, int64_t baseline, int64_t scale,
                              int64_t whiten) {
  const Estimator estimator{as_choice<Combine>(combine, "combine") == Combine::decoupled,
                            as_choice<Baseline>(baseline, "baseline"),
                            as_choice<Scale>(scale, "scale"),
                            as_choice<Whiten>(whiten, "whiten"),
                            by.ddof,
                            by.eps,
                            by.std_floor,
                            by.clip};
  LVRPO_CHECK(estimator.clip > 0, "clip is ", estimator.clip, ", expected > 0");
  return estimator;
}

// How many samples a reward applies to, and its sum over them.
struct CountAndSum {
  double count = 0, sum = 0;
  LVRPO_INLINE void add(double more, double value) { count += more, sum += value; }
};

// Of deviations from a mean, which are of `count` samples.
struct Spread {
  double squares = 0, largest = 0, magnitude = 0, count = 0;
  LVRPO_INLINE void add(double deviation, double size) {
    squares += deviation * deviation;
    largest = std::max(largest, std::abs(deviation));
    magnitude = std::max(magnitude, size);
  }
  LVRPO_INLINE bool varies() const { return largest > ROUNDING * magnitude; }
};

// A contiguous range of samples, and what is divided by one spread in it: all of it or nothing.
struct Column : Spread {
  double mean = 0;
  double mean_of_others = 0;  // without the farthest sample, see below
};

// The best sample by its sum, and the runner-up's sum.
struct Best {
  static constexpr double NOBODY = -std::numeric_limits<double>::infinity();
  int64_t sample = -1;
  double total = 0, second = NOBODY;
};

// Squares, about their own mean, of the others of the sample that is farthest from the group's mean.
struct Farthest {
  int64_t sample = -1;
  double squares_of_others = 0;  // 0 where these agree
};

struct Deviation {
  int64_t sample = -1;
  double size = 0;
};

// What two threads have; of two that are equal the earlier sample is taken.
struct Join {
  LVRPO_INLINE CountAndSum operator()(const CountAndSum& a, const CountAndSum& b) const {
    return {a.count + b.count, a.sum + b.sum};
  }
  LVRPO_INLINE Spread operator()(const Spread& a, const Spread& b) const {
    return {a.squares + b.squares, std::max(a.largest, b.largest), std::max(a.magnitude, b.magnitude),
            a.count + b.count};
  }
  LVRPO_INLINE Best operator()(const Best& a, const Best& b) const {
    if (a.sample < 0 || b.sample < 0) return a.sample < 0 ? b : a;
    const bool later = b.total > a.total || (b.total == a.total && b.sample < a.sample);
    const Best &best = later ? b : a, &other = later ? a : b;
    return {best.sample, best.total, std::max(best.second, other.total)};
  }
  LVRPO_INLINE Deviation operator()(const Deviation& a, const Deviation& b) const {
    if (a.sample < 0 || b.sample < 0) return a.sample < 0 ? b : a;
    return b.size > a.size || (b.size == a.size && b.sample < a.sample) ? b : a;
  }
};

template <typename Samples>
LVRPO_INLINE CountAndSum count_and_sum(const Samples& g, int64_t k) {
  CountAndSum all;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) all.add(g.counted(b, k), g.value(b, k));
  return g.over_group(all, Join{});
}

// part = deviation from the group's mean, 0 where the reward does not vary.
template <typename Samples>
LVRPO_INLINE Column centre(const Samples& g, int64_t k) {
  const CountAndSum all = count_and_sum(g, k);
  const double mean = all.sum / std::max(all.count, 1.0);
  Spread spread;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) {
    const double deviation = g.counted(b, k) * (g.value(b, k) - mean);
    g.part(b, k) = deviation;
    spread.add(deviation, std::abs(g.value(b, k)));
  }
  spread = g.over_group(spread, Join{});
  spread.count = all.count;
  if (!spread.varies())
    LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) g.part(b, k) = 0;
  return {spread, mean};
}

template <typename Samples>
LVRPO_INLINE Column centre_sum(const Samples& g, const double* weights) {
  Spread spread;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) {
    double total = 0, magnitude = 0;
    spread.count += g.scored(b);
    LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) {
      total += weights[k] * g.part(b, k);
      magnitude += std::abs(weights[k]) * std::abs(g.value(b, k));
    }
    g.total(b) = total;
    spread.add(total, magnitude);
  }
  return {g.over_group(spread, Join{})};
}

// From the deviation from the mean to the one from the estimator's baseline.
template <typename Samples>
LVRPO_INLINE void subtract_baseline(const Samples& g, const Estimator& estimator, int64_t k) {
  switch (estimator.baseline) {
    case Baseline::none:
      LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) g.part(b, k) = g.value(b, k);
      return;
    case Baseline::mean:
    case Baseline::leave_one_out:  // a factor of the same deviation: see scale_part
    case Baseline::second_best:    // keep_lead has done it
      return;
    case Baseline::length:
      break;
  }
  CountAndSum tokens;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) {
    const double length = g.length(b) * g.counted(b, k);
    tokens.add(length, length * g.part(b, k));
  }
  tokens = g.over_group(tokens, Join{});
  const double shift = tokens.sum / std::max(tokens.count, 1.0);
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) g.part(b, k) -= g.counted(b, k) * shift;
}

// Only the best sample keeps its part, and of that what the runner-up does not have as well.
template <typename Samples>
LVRPO_INLINE void keep_lead(const Samples& g, const Column& column) {
  Best best;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step())
    if (g.scored(b)) best = Join{}(best, Best{b, g.total(b)});
  best = g.over_group(best, Join{});
  // Where nobody is scored every part is 0.
  const double lead = best.second == Best::NOBODY ? 0.0 : best.total - best.second;
  const double kept = lead > ROUNDING * column.magnitude && best.total > 0 ? lead / best.total : 0.0;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step())
    LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) g.part(b, k) *= b == best.sample ? kept : 0.0;
}

// For the column made of rewards [first, last); totals are its deviations. `columns` begin with that of `first`.
template <typename Samples>
LVRPO_INLINE Farthest farthest(const Samples& g, const Estimator& estimator, const double* weights, Column* columns,
                               int64_t first, int64_t last) {
  Deviation far;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step())
    far = Join{}(far, Deviation{b, std::abs(g.total(b))});
  far = g.over_group(far, Join{});
  const auto takes_part = [&](int64_t b) {
    return b != far.sample && (estimator.decoupled ? g.counted(b, first) > 0 : g.scored(b));
  };
  const auto filled = [&](int64_t b, int64_t k) {
    return g.counted(b, k) > 0 ? g.value(b, k) : columns[k - first].mean;
  };
  LVRPO_ROLLED for (int64_t k = first; k < last; ++k) {
    CountAndSum others;
    LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step())
      if (takes_part(b)) others.add(1, filled(b, k));
    others = g.over_group(others, Join{});
    g.show(columns[k - first].mean_of_others, others.sum / std::max(others.count, 1.0));
  }
  Spread spread;
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) {
    if (!takes_part(b)) continue;
    double apart = 0, size = 0;
    LVRPO_ROLLED for (int64_t k = first; k < last; ++k) {
      const double weight = estimator.decoupled ? 1.0 : weights[k];
      const Column& column = columns[k - first];
      if (column.varies()) apart += weight * (filled(b, k) - column.mean_of_others);
      size += std::abs(weight) * std::abs(g.value(b, k));
    }
    spread.add(apart, size);
  }
  spread = g.over_group(spread, Join{});
  return {far.sample, spread.varies() ? spread.squares : 0.0};
}

// Divides by the spread of the other samples; where they agree there is none, and the deviation stays. A sample that
// is not the farthest owns at most 3/4 of the squares, and what it leaves of them has all digits; the farthest may own
// all but rounding.
LVRPO_INLINE double others_divisor(const Estimator& estimator, const Column& column, const Farthest& far, int64_t b,
                                   double own) {
  if (column.count <= 2) return 1.0;
  const double left =
      b == far.sample ? far.squares_of_others : column.squares - own * own * column.count / (column.count - 1.0);
  return left > 0 ? estimator.divisor(estimator.std(left, column.count - 1.0)) : 1.0;
}

template <typename Samples>
LVRPO_INLINE void scale_part(const Samples& g, const Estimator& estimator, int64_t k, double weight, double count,
                             const Column& column, const Farthest& far, double spread) {
  double factor = column.varies() || estimator.baseline == Baseline::none ? weight : 0.0;
  if (estimator.baseline == Baseline::leave_one_out) factor *= count / std::max(count - 1.0, 1.0);
  if (estimator.scale == Scale::leave_one_out) {
    LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step())
      g.part(b, k) *= factor / others_divisor(estimator, column, far, b, g.total(b));
    return;
  }
  const double std = estimator.scale == Scale::group ? estimator.std(column.squares, column.count) : spread;
  if (factor != 0 && estimator.scale != Scale::none) factor /= estimator.divisor(std);
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) g.part(b, k) *= factor;
}

// Fills the parts, and totals for its own use. seen(k, column) hears of every reward's column. `columns` [K] is memory
// of the group; `spread` [K], or of the sum [1], is the batch's.
template <typename Samples, typename Seen>
LVRPO_INLINE void group_parts(const Samples& g, const Estimator& estimator, const double* weights, const double* spread,
                              Column* columns, const Seen& seen) {
  const bool of_others = estimator.scale == Scale::leave_one_out;
  if (estimator.decoupled) {
    LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) {
      const Column column = centre(g, k);
      seen(k, column);
      Farthest far;
      if (of_others) {  // the divisor needs the deviation from the mean, which the baseline overwrites
        LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) g.total(b) = g.part(b, k);
        g.show(columns[0], column);
        far = farthest(g, estimator, weights, columns, k, k + 1);
      }
      subtract_baseline(g, estimator, k);
      scale_part(g, estimator, k, weights[k], column.count, column, far, spread[k]);
    }
    return;
  }
  LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) {
    const Column column = centre(g, k);
    seen(k, column);
    g.show(columns[k], column);
  }
  const Column sum = centre_sum(g, weights);
  const Farthest far = of_others ? farthest(g, estimator, weights, columns, 0, g.rewards) : Farthest{};
  if (estimator.baseline == Baseline::second_best) keep_lead(g, sum);
  LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) {
    subtract_baseline(g, estimator, k);
    scale_part(g, estimator, k, weights[k], columns[k].count, sum, far, spread[0]);
  }
}

// total = the weighted sum of a sample's rewards; one that is missing counts as its group's mean, or as the batch's,
// batch_mean(k), where the whole group misses it.
template <typename Samples, typename Mean>
LVRPO_INLINE void sum_filled(const Samples& g, const double* weights, const Mean& batch_mean) {
  LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step()) g.total(b) = 0;
  LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) {
    const CountAndSum all = count_and_sum(g, k);
    const double missing = all.count > 0 ? all.sum / all.count : batch_mean(k);
    LVRPO_ROLLED for (int64_t b = g.first(); b < g.size; b += g.step())
      g.total(b) += weights[k] * (g.counted(b, k) > 0 ? g.value(b, k) : missing);
  }
}

// Whether the weighted sum of a sample's rewards is not 0, or rounding.
template <typename Samples>
LVRPO_INLINE bool has_sum(const Samples& g, const double* weights, int64_t b) {
  double sum = 0, size = 0;
  LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) {
    sum += weights[k] * g.value(b, k);
    size += std::abs(weights[k]) * std::abs(g.value(b, k));
  }
  return std::abs(sum) > ROUNDING * size;
}

// What the parts of the whole batch are shifted and divided by.
struct Whitening {
  const double* mean;  // [K]
  double divisor = 1;
  bool zero = false;  // the batch's advantages agree up to rounding
};

// Whitens and clips the parts of a sample; returns its advantage.
template <typename Samples>
LVRPO_INLINE double whiten_and_clip(const Samples& g, const Whitening& by, double clip, int64_t b) {
  double value = 0;
  const bool zero = by.zero || !g.scored(b);
  LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) {
    const double part = zero ? 0.0 : (g.part(b, k) - by.mean[k]) / by.divisor;
    g.part(b, k) = part;
    value += part;
  }
  const double clipped = std::clamp(value, -clip, clip);
  const double shrink = clipped == value ? 1.0 : clipped / value;
  LVRPO_ROLLED for (int64_t k = 0; k < g.rewards; ++k) g.part(b, k) *= shrink;
  return clipped;
}

}  // namespace lvrpo
