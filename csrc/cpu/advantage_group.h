// The advantages of one group: its statistics, baseline and scale. Formulas: docs/ops/normalize_advantages.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/names.h"

namespace lvrpo {

// What is left of a group after subtracting its mean is rounding below this share of its largest reward.
inline constexpr double ROUNDING = 0x1p-40;

// What they mean is said in lvrpo/params/advantages.py.
LVRPO_CHOICES(Combine, decoupled, sum)
LVRPO_CHOICES(Baseline, mean, leave_one_out, length, second_best, none)
LVRPO_CHOICES(Scale, group, leave_one_out, batch, nonzero, none)
LVRPO_CHOICES(Whiten, none, sequence, token)
LVRPO_TABLE(EstimatorNumbers, double, ddof, eps, std_floor, clip);

struct Estimator {
  bool decoupled;
  Baseline baseline;
  Scale scale;
  Whiten whiten;
  double ddof, eps, std_floor, clip;

  double freedom(double n) const { return std::max(n - ddof, 1.0); }
  double std(double squares, double n) const { return std::sqrt(squares / freedom(n)); }
  double divisor(double std) const {
    const double sum = std::max(std + eps, std_floor);
    return sum > 0 ? sum : 1.0;
  }
  bool scales_by_batch() const {
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
  bool sums_to_zero() const {
    return (baseline == Baseline::mean || baseline == Baseline::leave_one_out) && scale != Scale::leave_one_out &&
           whiten != Whiten::token;
  }
};

// A contiguous range of samples, and what is divided by one spread in it: all of it or nothing.
struct Column {
  double squares = 0, largest = 0, magnitude = 0, count = 0, mean = 0;
  double mean_of_others = 0;  // without the farthest sample, see below
  void add(double deviation, double size) {
    squares += deviation * deviation;
    largest = std::max(largest, std::abs(deviation));
    magnitude = std::max(magnitude, size);
  }
  bool varies() const { return largest > ROUNDING * magnitude; }
};

// The rows of one group inside a chunk, and what every sample of it contributes.
struct Group {
  const Estimator& estimator;
  int64_t rewards;
  const double* weights;
  int64_t size;
  const double *value, *counted;
  const bool* scored;  // [size], whether any reward applies
  const int64_t* lengths;
  double* part;  // [size, K]
};

// part = deviation from the group's mean, 0 where the reward does not vary. Counts the group for the reward if it
// applies to somebody (seen) and does not vary (constant).
inline Column centre(const Group& g, int64_t k, double& constant, double& seen) {
  const int64_t stride = g.rewards;
  Column column;
  double sum = 0;
  for (int64_t b = 0; b < g.size; ++b) column.count += g.counted[b * stride + k], sum += g.value[b * stride + k];
  column.mean = sum / std::max(column.count, 1.0);
  for (int64_t b = 0; b < g.size; ++b) {
    g.part[b * stride + k] = g.counted[b * stride + k] * (g.value[b * stride + k] - column.mean);
    column.add(g.part[b * stride + k], std::abs(g.value[b * stride + k]));
  }
  seen += column.count > 0;
  constant += column.count > 0 && !column.varies();
  if (!column.varies())
    for (int64_t b = 0; b < g.size; ++b) g.part[b * stride + k] = 0;
  return column;
}

inline Column centre_sum(const Group& g, double* total) {
  Column column;
  for (int64_t b = 0; b < g.size; ++b) {
    double magnitude = 0;
    column.count += g.scored[b];
    total[b] = 0;
    for (int64_t k = 0; k < g.rewards; ++k) {
      total[b] += g.weights[k] * g.part[b * g.rewards + k];
      magnitude += std::abs(g.weights[k]) * std::abs(g.value[b * g.rewards + k]);
    }
    column.add(total[b], magnitude);
  }
  return column;
}

// From the deviation from the mean to the one from the estimator's baseline.
inline void subtract_baseline(const Group& g, int64_t k) {
  const int64_t stride = g.rewards;
  switch (g.estimator.baseline) {
    case Baseline::none:
      for (int64_t b = 0; b < g.size; ++b) g.part[b * stride + k] = g.value[b * stride + k];
      return;
    case Baseline::mean:
    case Baseline::leave_one_out:  // a factor of the same deviation: see scale_part
    case Baseline::second_best:    // keep_lead has done it
      return;
    case Baseline::length:
      break;
  }
  double shift = 0, tokens = 0;
  for (int64_t b = 0; b < g.size; ++b) {
    const double length = static_cast<double>(g.lengths[b]) * g.counted[b * stride + k];
    tokens += length, shift += length * g.part[b * stride + k];
  }
  shift /= std::max(tokens, 1.0);
  for (int64_t b = 0; b < g.size; ++b) g.part[b * stride + k] -= g.counted[b * stride + k] * shift;
}

// Only the best sample keeps its part, and of that what the runner-up does not have as well.
inline void keep_lead(const Group& g, const Column& column, const double* total) {
  constexpr double NOBODY = -std::numeric_limits<double>::infinity();
  int64_t best = -1;
  for (int64_t b = 0; b < g.size; ++b)
    if (g.scored[b] && (best < 0 || total[b] > total[best])) best = b;
  if (best < 0) return;  // nobody is scored, and every part is 0
  double second = NOBODY;
  for (int64_t b = 0; b < g.size; ++b)
    if (g.scored[b] && b != best) second = std::max(second, total[b]);
  const double lead = second == NOBODY ? 0.0 : total[best] - second;
  const double kept = lead > ROUNDING * column.magnitude && total[best] > 0 ? lead / total[best] : 0.0;
  for (int64_t b = 0; b < g.size; ++b)
    for (int64_t k = 0; k < g.rewards; ++k) g.part[b * g.rewards + k] *= b == best ? kept : 0.0;
}

// Squares, about their own mean, of the others of the sample that is farthest from the group's mean.
struct Farthest {
  int64_t sample = -1;
  double squares_of_others = 0;  // 0 where these agree
};

// For the column made of rewards [first, last); own [size] are its deviations.
inline Farthest farthest(const Group& g, Column* columns, int64_t first, int64_t last, const double* own) {
  const int64_t rewards = g.rewards;
  const bool decoupled = g.estimator.decoupled;
  Farthest far;
  for (int64_t b = 0; b < g.size; ++b)
    if (far.sample < 0 || std::abs(own[b]) > std::abs(own[far.sample])) far.sample = b;
  const auto takes_part = [&](int64_t b) {
    return b != far.sample && (decoupled ? g.counted[b * rewards + first] > 0 : g.scored[b]);
  };
  const auto filled = [&](int64_t b, int64_t k) {
    return g.counted[b * rewards + k] > 0 ? g.value[b * rewards + k] : columns[k].mean;
  };
  for (int64_t k = first; k < last; ++k) {
    double sum = 0, count = 0;
    for (int64_t b = 0; b < g.size; ++b)
      if (takes_part(b)) sum += filled(b, k), count += 1;
    columns[k].mean_of_others = sum / std::max(count, 1.0);
  }
  Column others;
  for (int64_t b = 0; b < g.size; ++b) {
    if (!takes_part(b)) continue;
    double apart = 0, size = 0;
    for (int64_t k = first; k < last; ++k) {
      const double weight = decoupled ? 1.0 : g.weights[k];
      if (columns[k].varies()) apart += weight * (filled(b, k) - columns[k].mean_of_others);
      size += std::abs(weight) * std::abs(g.value[b * rewards + k]);
    }
    others.add(apart, size);
  }
  if (others.varies()) far.squares_of_others = others.squares;
  return far;
}

// Divides by the spread of the other samples; where they agree there is none, and the deviation stays. A sample that
// is not the farthest owns at most 3/4 of the squares, and what it leaves of them has all digits; the farthest may own
// all but rounding.
inline double others_divisor(const Estimator& estimator, const Column& column, const Farthest& far, int64_t b,
                             double own) {
  if (column.count <= 2) return 1.0;
  const double left =
      b == far.sample ? far.squares_of_others : column.squares - own * own * column.count / (column.count - 1.0);
  return left > 0 ? estimator.divisor(estimator.std(left, column.count - 1.0)) : 1.0;
}

inline void scale_part(const Group& g, int64_t k, double count, const Column& column, const Farthest& far,
                       const double* own, double spread) {
  const Estimator& estimator = g.estimator;
  double factor = column.varies() || estimator.baseline == Baseline::none ? g.weights[k] : 0.0;
  if (estimator.baseline == Baseline::leave_one_out) factor *= count / std::max(count - 1.0, 1.0);
  if (estimator.scale == Scale::leave_one_out) {
    for (int64_t b = 0; b < g.size; ++b)
      g.part[b * g.rewards + k] *= factor / others_divisor(estimator, column, far, b, own[b]);
    return;
  }
  const double std = estimator.scale == Scale::group ? estimator.std(column.squares, column.count) : spread;
  if (factor != 0 && estimator.scale != Scale::none) factor /= estimator.divisor(std);
  for (int64_t b = 0; b < g.size; ++b) g.part[b * g.rewards + k] *= factor;
}

// Fills g.part; counts groups by reward: sums[k] those in which it is constant, sums[K + k] those it applies to.
inline void group_parts(const Group& g, const std::vector<double>& spread, double* total, Column* columns,
                        double* sums) {
  const int64_t rewards = g.rewards;
  for (int64_t k = 0; k < rewards; ++k) columns[k] = centre(g, k, sums[k], sums[rewards + k]);
  const bool of_others = g.estimator.scale == Scale::leave_one_out;
  if (g.estimator.decoupled) {
    for (int64_t k = 0; k < rewards; ++k) {
      Farthest far;
      if (of_others) {  // the divisor needs the deviation from the mean, which the baseline overwrites
        for (int64_t b = 0; b < g.size; ++b) total[b] = g.part[b * rewards + k];
        far = farthest(g, columns, k, k + 1, total);
      }
      subtract_baseline(g, k);
      scale_part(g, k, columns[k].count, columns[k], far, total, spread[k]);
    }
    return;
  }
  const Column sum = centre_sum(g, total);
  const Farthest far = of_others ? farthest(g, columns, 0, rewards, total) : Farthest{};
  if (g.estimator.baseline == Baseline::second_best) keep_lead(g, sum, total);
  for (int64_t k = 0; k < rewards; ++k) {
    subtract_baseline(g, k);
    scale_part(g, k, columns[k].count, sum, far, total, spread[0]);
  }
}

}  // namespace lvrpo
