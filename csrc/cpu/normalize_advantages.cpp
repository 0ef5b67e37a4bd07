// Group-relative advantages of K rewards, all statistics in fp64. Formulas: docs/ops/normalize_advantages.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"

namespace lvrpo {
namespace {

// What is left of a group after subtracting its mean is rounding below this share of its largest reward.
constexpr double ROUNDING = 0x1p-40;
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

enum Scale { GROUP = 0, BATCH = 1, NONE = 2 };

struct Estimator {
  bool decoupled, leave_one_out;
  int64_t scale, ddof;
  double eps, std_floor;

  double freedom(double n) const { return std::max(n - static_cast<double>(ddof), 1.0); }
  double divisor(double std) const { return scale == NONE ? 1.0 : std::max(std + eps, std_floor); }
};

// B samples of K rewards; a reward that does not apply holds 0 and counts 0.
struct Table {
  int64_t batch, rewards;
  std::vector<double> value, counted;
  double at(int64_t b, int64_t k) const { return value[b * rewards + k]; }
  double counts(int64_t b, int64_t k) const { return counted[b * rewards + k]; }
};

template <typename scalar_t>
Table read(const scalar_t* x, int64_t batch, int64_t rewards) {
  Table table{batch, rewards, std::vector<double>(batch * rewards), std::vector<double>(batch * rewards)};
  for (int64_t i = 0; i < batch * rewards; ++i) {
    const double value = static_cast<double>(x[i]);
    table.counted[i] = std::isnan(value) ? 0.0 : 1.0;
    table.value[i] = std::isnan(value) ? 0.0 : value;
  }
  return table;
}

struct Moments {
  double count = 0, mean = 0, std = 0;
};

// Over the samples that `count(b)` counts; NaN where there are none.
template <typename Value, typename Count>
Moments batch_moments(int64_t batch, const Estimator& estimator, Value value, Count count) {
  Moments m;
  for (int64_t b = 0; b < batch; ++b) m.count += count(b), m.mean += value(b) * count(b);
  if (m.count == 0) return {0, NOT_A_NUMBER, NOT_A_NUMBER};
  m.mean /= m.count;
  double squares = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const double deviation = count(b) * (value(b) - m.mean);
    squares += deviation * deviation;
  }
  m.std = std::sqrt(squares / estimator.freedom(m.count));
  return m;
}

// A contiguous range of samples, and what is divided by one spread in it: all of it or nothing.
struct Column {
  double squares = 0, largest = 0, magnitude = 0;
  void add(double deviation, double size) {
    squares += deviation * deviation;
    largest = std::max(largest, std::abs(deviation));
    magnitude = std::max(magnitude, size);
  }
  bool varies() const { return largest > ROUNDING * magnitude; }
};

// One group: fills its rows of `part` with what each reward contributes and `constant[k]` for rewards that do not vary.
void group_parts(const Table& table, const double* weights, const Estimator& estimator, const double* batch_std,
                 int64_t begin, int64_t end, double* part, signed char* constant) {
  const int64_t rewards = table.rewards;
  const double size = static_cast<double>(end - begin);
  std::vector<double> factor(rewards, 0.0);
  for (int64_t k = 0; k < rewards; ++k) {
    double count = 0, sum = 0;
    for (int64_t b = begin; b < end; ++b) count += table.counts(b, k), sum += table.at(b, k);
    const double mean = sum / std::max(count, 1.0);
    Column column;
    for (int64_t b = begin; b < end; ++b) {
      part[b * rewards + k] = table.counts(b, k) * (table.at(b, k) - mean);
      column.add(part[b * rewards + k], std::abs(table.at(b, k)));
    }
    constant[k] = count > 0 ? !column.varies() : -1;  // -1: applies to nobody here
    if (!column.varies()) {
      for (int64_t b = begin; b < end; ++b) part[b * rewards + k] = 0;
      continue;
    }
    factor[k] = weights[k] * (estimator.leave_one_out ? count / std::max(count - 1.0, 1.0) : 1.0);
    if (estimator.decoupled) {
      const double std = estimator.scale == BATCH ? batch_std[k] : std::sqrt(column.squares / estimator.freedom(count));
      factor[k] /= estimator.divisor(std);
    }
  }
  if (!estimator.decoupled) {
    Column column;
    for (int64_t b = begin; b < end; ++b) {
      double total = 0, magnitude = 0;
      for (int64_t k = 0; k < rewards; ++k) {
        total += weights[k] * part[b * rewards + k];
        magnitude += std::abs(weights[k]) * std::abs(table.at(b, k));
      }
      column.add(total, magnitude);
    }
    const double std = estimator.scale == BATCH ? batch_std[0] : std::sqrt(column.squares / estimator.freedom(size));
    for (int64_t k = 0; k < rewards; ++k) factor[k] = column.varies() ? factor[k] / estimator.divisor(std) : 0.0;
  }
  for (int64_t b = begin; b < end; ++b)
    for (int64_t k = 0; k < rewards; ++k) part[b * rewards + k] *= factor[k];
}

std::vector<double> row_sums(const std::vector<double>& part, int64_t batch, int64_t rewards) {
  std::vector<double> sums(batch, 0.0);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < rewards; ++k) sums[b] += part[b * rewards + k];
  return sums;
}

double sum_of_squares(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  return sum;
}

double std_of_sum(const Table& table, const double* weights, const Estimator& estimator) {
  const auto total = [&](int64_t b) {
    double sum = 0;
    for (int64_t k = 0; k < table.rewards; ++k) sum += weights[k] * table.at(b, k);
    return sum;
  };
  return batch_moments(table.batch, estimator, total, [](int64_t) { return 1.0; }).std;
}

// Whitens and clips `part` in place, and returns its row sums: the advantages.
std::vector<double> finish(const Estimator& estimator, int64_t batch, int64_t rewards, bool whiten, double clip,
                           std::vector<double>& part) {
  std::vector<double> values = row_sums(part, batch, rewards);
  if (whiten) {
    const double spread = std::sqrt(sum_of_squares(values) / estimator.freedom(static_cast<double>(batch)));
    const double divisor = std::max(spread + estimator.eps, estimator.std_floor);
    if (divisor > 0)
      for (double& x : part) x /= divisor;
    values = row_sums(part, batch, rewards);
  }
  for (int64_t b = 0; b < batch; ++b) {
    const double clipped = std::clamp(values[b], -clip, clip);
    if (clipped == values[b]) continue;
    for (int64_t k = 0; k < rewards; ++k) part[b * rewards + k] *= clipped / values[b];
    values[b] = clipped;
  }
  return values;
}

std::vector<double> covariance_shares(const std::vector<double>& part, const std::vector<double>& values,
                                      int64_t rewards) {
  const double energy = sum_of_squares(values);
  std::vector<double> share(rewards, 0.0);
  for (size_t b = 0; b < values.size(); ++b)
    for (int64_t k = 0; k < rewards; ++k) share[k] += part[b * rewards + k] * values[b];
  if (energy > 0)
    for (double& x : share) x /= energy;
  return share;
}

std::vector<double> constant_fractions(const std::vector<signed char>& constant, int64_t groups, int64_t rewards) {
  std::vector<double> fraction(rewards);
  for (int64_t k = 0; k < rewards; ++k) {
    double flat = 0, seen = 0;
    for (int64_t p = 0; p < groups; ++p) flat += constant[p * rewards + k] == 1, seen += constant[p * rewards + k] >= 0;
    fraction[k] = flat / seen;
  }
  return fraction;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename out_t>
void store(const std::vector<double>& from, Tensor& to) {
  out_t* out = to.mutable_data_ptr<out_t>();
  for (size_t i = 0; i < from.size(); ++i) out[i] = static_cast<out_t>(from[i]);
}

Result normalize_advantages(Tensor rewards, Tensor offsets, Tensor weights, bool decoupled, bool leave_one_out,
                            int64_t scale, int64_t ddof, double eps, double std_floor, bool whiten, double clip) {
  LVRPO_CHECK(scale >= GROUP && scale <= NONE, "scale is ", scale);
  LVRPO_CHECK(clip > 0, "clip is ", clip, ", expected > 0");
  LVRPO_CHECK(rewards.dim() == 2, "rewards must be [B, K]");
  LVRPO_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be [P + 1]");
  rewards = torch::stable::contiguous(rewards);
  offsets = torch::stable::contiguous(offsets);
  weights = torch::stable::contiguous(weights);
  check_dtype(offsets, ScalarType::Long, "offsets");
  check_dtype(weights, ScalarType::Double, "weights");
  const int64_t batch = rewards.size(0), count = rewards.size(1), groups = offsets.size(0) - 1;
  check_size(weights, 0, count, "weights");
  const int64_t* start = offsets.const_data_ptr<int64_t>();
  LVRPO_CHECK(start[0] == 0 && start[groups] == batch, "offsets must run from 0 to ", batch);
  for (int64_t p = 0; p < groups; ++p) LVRPO_CHECK(start[p] <= start[p + 1], "offsets must not decrease");
  const double* w = weights.const_data_ptr<double>();
  const Estimator estimator{decoupled, leave_one_out, scale, ddof, eps, std_floor};

  Table table;
  LVRPO_DISPATCH_FLOATING(rewards.scalar_type(), scalar_t,
                          [&] { table = read(rewards.const_data_ptr<scalar_t>(), batch, count); });

  std::vector<double> mean(count), std(count), applicable(count);
  for (int64_t k = 0; k < count; ++k) {
    const Moments m = batch_moments(
        batch, estimator, [&](int64_t b) { return table.at(b, k); }, [&](int64_t b) { return table.counts(b, k); });
    mean[k] = m.mean, std[k] = m.std, applicable[k] = m.count / static_cast<double>(batch);
  }
  const std::vector<double> batch_std = decoupled ? std : std::vector<double>{std_of_sum(table, w, estimator)};

  std::vector<double> part(batch * count);
  std::vector<signed char> constant(groups * count);
  torch::stable::parallel_for(0, groups, 256, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      group_parts(table, w, estimator, batch_std.data(), start[p], start[p + 1], part.data(),
                  constant.data() + p * count);
  });

  const std::vector<double> values = finish(estimator, batch, count, whiten, clip, part);
  const std::vector<double> share = covariance_shares(part, values, count);
  const std::vector<double> constant_groups = constant_fractions(constant, groups, count);

  const ScalarType out = rewards.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto fresh = [&](std::initializer_list<int64_t> size) { return torch::stable::new_empty(rewards, size, out); };
  Result result{fresh({batch}), fresh({batch, count}), fresh({count}), fresh({count}), fresh({count}), fresh({count}),
                fresh({count}), torch::stable::new_empty(rewards, {}, ScalarType::Bool)};
  LVRPO_DISPATCH_ACC(out, out_t, [&] {
    store<out_t>(values, std::get<0>(result));
    store<out_t>(part, std::get<1>(result));
    store<out_t>(share, std::get<2>(result));
    store<out_t>(constant_groups, std::get<3>(result));
    store<out_t>(mean, std::get<4>(result));
    store<out_t>(std, std::get<5>(result));
    store<out_t>(applicable, std::get<6>(result));
  });
  *std::get<7>(result).mutable_data_ptr<bool>() =
      std::all_of(values.begin(), values.end(), [](double value) { return value == 0; });
  return result;
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) { m.impl("normalize_advantages", TORCH_BOX(&lvrpo::normalize_advantages)); }
