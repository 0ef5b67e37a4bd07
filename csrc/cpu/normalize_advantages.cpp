// Group-relative advantages of K rewards, all statistics in fp64. Formulas: docs/ops/normalize_advantages.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/advantage_group.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/names.h"
#include "common/tensors.h"

namespace lvrpo {
namespace {

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
// Groups that one thread takes at a time. Sums over the batch add these chunks up in order, whoever computed them.
constexpr int64_t CHUNK = 256;

using Doubles = std::unique_ptr<double[]>;
using Load = void (*)(const void* x, int64_t begin, int64_t end, double* value, double* counted);

// Rewards [begin, end) as numbers; one that does not apply, or is infinite where nobody could refuse it, holds 0 and
// counts 0.
template <typename scalar_t>
void load(const void* x, int64_t begin, int64_t end, double* value, double* counted) {
  const scalar_t* from = static_cast<const scalar_t*>(x) + begin;
  for (int64_t i = 0; i < end - begin; ++i) {
    const double number = static_cast<double>(from[i]);
    const bool applies = std::abs(number) <= std::numeric_limits<double>::max();
    value[i] = applies ? number : 0.0;
    counted[i] = applies ? 1.0 : 0.0;
  }
}

// Samples that one thread has all of; see common/advantage_group.h.
struct Rows {
  int64_t size, rewards;
  const double *values, *counts;
  const bool* has_any;     // [size]
  const int64_t* lengths;  // null unless the estimator counts tokens
  double *parts, *totals;

  static constexpr int64_t first() { return 0; }
  static constexpr int64_t step() { return 1; }
  double value(int64_t b, int64_t k) const { return values[b * rewards + k]; }
  double counted(int64_t b, int64_t k) const { return counts[b * rewards + k]; }
  bool scored(int64_t b) const { return has_any[b]; }
  double length(int64_t b) const { return static_cast<double>(lengths[b]); }
  double& part(int64_t b, int64_t k) const { return parts[b * rewards + k]; }
  double& total(int64_t b) const { return totals[b]; }
  template <typename T, typename Joined>
  const T& over_group(const T& x, const Joined&) const {
    return x;
  }
  template <typename T>
  void show(T& to, const T& x) const {
    to = x;
  }
};

struct Input {
  int64_t batch, rewards, groups;
  const void* x;
  Load load;
  const int64_t* start;
  const double* weights;
  const int64_t* lengths;  // null unless the estimator counts tokens
  bool* scored;            // [B], whether any reward applies; written by moments

  int64_t chunks() const { return (groups + CHUNK - 1) / CHUNK; }
};

// Groups [first, last) and their samples [begin, end).
struct Chunk {
  int64_t index, first, last, begin, end, rewards;
  Doubles value, counted;

  Chunk(const Input& in, int64_t c)
      : index(c),
        first(c * CHUNK),
        last(std::min(in.groups, first + CHUNK)),
        begin(in.start[first]),
        end(in.start[last]),
        rewards(in.rewards),
        value(std::make_unique_for_overwrite<double[]>((end - begin) * rewards)),
        counted(std::make_unique_for_overwrite<double[]>((end - begin) * rewards)) {
    in.load(in.x, begin * rewards, end * rewards, value.get(), counted.get());
  }
  int64_t samples() const { return end - begin; }
  // Samples [from, to) of the batch, with parts that begin with those of `from`, and totals.
  Rows rows(const Input& in, int64_t from, int64_t to, double* parts, double* totals) const {
    const int64_t at = (from - begin) * rewards;
    return {to - from,          rewards, value.get() + at, counted.get() + at, in.scored + from,
            in.lengths + (in.lengths == nullptr ? 0 : from), parts, totals};
  }
};

// body(chunk, sums), or body(chunk's index, first sample, last, sums) where the rewards are not needed. sums [width]
// start at 0; returns them added up in the order of the chunks.
template <typename Body>
std::vector<double> sum_over_chunks(const Input& in, int64_t width, const Body& body) {
  std::vector<double> partial(in.chunks() * width, 0.0), total(width, 0.0);
  torch::stable::parallel_for(0, in.chunks(), 1, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) {
      double* sums = partial.data() + c * width;
      if constexpr (std::is_invocable_v<Body, const Chunk&, double*>)
        body(Chunk(in, c), sums);
      else
        body(c, in.start[c * CHUNK], in.start[std::min(in.groups, (c + 1) * CHUNK)], sums);
    }
  });
  for (int64_t c = 0; c < in.chunks(); ++c)
    for (int64_t i = 0; i < width; ++i) total[i] += partial[c * width + i];
  return total;
}

// Of every reward, over the samples it applies to; and how many samples have any.
struct Moments {
  std::vector<double> count, mean, std;
  double scored;
};

Moments moments(const Input& in, const Estimator& estimator) {
  const int64_t rewards = in.rewards;
  const std::vector<double> sums = sum_over_chunks(in, 2 * rewards + 1, [&](const Chunk& chunk, double* sum) {
    for (int64_t b = 0; b < chunk.samples(); ++b) {
      double any = 0;
      for (int64_t k = 0; k < rewards; ++k) {
        any = std::max(any, chunk.counted[b * rewards + k]);
        sum[k] += chunk.counted[b * rewards + k];
        sum[rewards + k] += chunk.value[b * rewards + k];
      }
      in.scored[chunk.begin + b] = any > 0;
      sum[2 * rewards] += any;
    }
  });
  Moments m{std::vector<double>(sums.begin(), sums.begin() + rewards), std::vector<double>(rewards, NOT_A_NUMBER),
            std::vector<double>(rewards, NOT_A_NUMBER), sums[2 * rewards]};
  for (int64_t k = 0; k < rewards; ++k)
    if (m.count[k] > 0) m.mean[k] = sums[rewards + k] / m.count[k];
  const std::vector<double> squares = sum_over_chunks(in, rewards, [&](const Chunk& chunk, double* sum) {
    for (int64_t b = 0; b < chunk.samples(); ++b)
      for (int64_t k = 0; k < rewards; ++k) {
        const double deviation = chunk.counted[b * rewards + k] * (chunk.value[b * rewards + k] - m.mean[k]);
        sum[k] += deviation * deviation;
      }
  });
  for (int64_t k = 0; k < rewards; ++k)
    if (m.count[k] > 0) m.std[k] = estimator.std(squares[k], m.count[k]);
  return m;
}

// What a group is divided by where that is the same for the whole batch: one number per reward, or one for their sum.
std::vector<double> batch_spread(const Input& in, const Estimator& estimator, const Moments& m) {
  const int64_t rewards = in.rewards;
  if (!estimator.scales_by_batch()) return std::vector<double>(rewards, 1.0);
  if (estimator.scale == Scale::nonzero) {
    const int64_t columns = estimator.decoupled ? rewards : 1;
    std::vector<double> fraction = sum_over_chunks(in, columns, [&](const Chunk& chunk, double* sum) {
      const Rows rows = chunk.rows(in, chunk.begin, chunk.end, nullptr, nullptr);
      for (int64_t b = 0; b < rows.size; ++b)
        if (!estimator.decoupled)
          sum[0] += has_sum(rows, in.weights, b);
        else
          for (int64_t k = 0; k < rewards; ++k) sum[k] += rows.value(b, k) != 0;
    });
    for (int64_t k = 0; k < columns; ++k) fraction[k] /= estimator.decoupled ? m.count[k] : m.scored;
    return fraction;
  }
  if (estimator.decoupled) return m.std;

  Doubles total = std::make_unique_for_overwrite<double[]>(in.batch);
  const std::vector<double> sums = sum_over_chunks(in, 1, [&](const Chunk& chunk, double* sum) {
    const auto batch_mean = [&](int64_t k) { return m.count[k] > 0 ? m.mean[k] : 0.0; };
    for (int64_t p = chunk.first; p < chunk.last; ++p) {
      const Rows rows = chunk.rows(in, in.start[p], in.start[p + 1], nullptr, total.get() + in.start[p]);
      sum_filled(rows, in.weights, batch_mean);
      for (int64_t b = 0; b < rows.size; ++b)
        if (rows.scored(b)) *sum += rows.total(b);
    }
  });
  const std::vector<double> squares = sum_over_chunks(in, 1, [&](const Chunk& chunk, double* sum) {
    for (int64_t b = chunk.begin; b < chunk.end; ++b)
      if (in.scored[b]) *sum += (total[b] - sums[0] / m.scored) * (total[b] - sums[0] / m.scored);
  });
  return {estimator.std(squares[0], m.scored)};
}

// part [B, K] of a chunk's samples, from its first one on. sums: by reward, groups in which it is constant, then groups
// it applies to.
void chunk_parts(const Input& in, const Estimator& estimator, const std::vector<double>& spread, const Chunk& chunk,
                 double* part, double* sums) {
  const int64_t rewards = in.rewards;
  int64_t longest = 0;
  for (int64_t p = chunk.first; p < chunk.last; ++p) longest = std::max(longest, in.start[p + 1] - in.start[p]);
  const Doubles total = std::make_unique_for_overwrite<double[]>(longest);
  std::vector<Column> columns(rewards);
  for (int64_t p = chunk.first; p < chunk.last; ++p) {
    double* parts = part + (in.start[p] - chunk.begin) * rewards;
    group_parts(chunk.rows(in, in.start[p], in.start[p + 1], parts, total.get()), estimator, in.weights, spread.data(),
                columns.data(), [&](int64_t k, const Column& column) {
                  sums[k] += column.count > 0 && !column.varies();
                  sums[rewards + k] += column.count > 0;
                });
  }
}

double tokens_of(const Input& in, const Estimator& estimator, int64_t b) {
  if (!in.scored[b]) return 0.0;
  return estimator.whiten == Whiten::token ? static_cast<double>(in.lengths[b]) : 1.0;
}

// Of parts [B, K]; fills mean [K], which it refers to.
Whitening whitening(const Input& in, const Estimator& estimator, const double* part, std::vector<double>& mean) {
  const int64_t rewards = in.rewards;
  Whitening w{mean.data()};
  std::vector<double> before(in.chunks(), 0.0), after(in.chunks(), 0.0);
  const auto value_of = [&](int64_t b) {
    double value = 0;
    for (int64_t k = 0; k < rewards; ++k) value += part[b * rewards + k] - mean[k];
    return in.scored[b] ? value : 0.0;
  };
  const auto samples = [&](const auto& body) {  // body(chunk index, sample, sums)
    return sum_over_chunks(in, rewards + 2, [&](int64_t c, int64_t begin, int64_t end, double* sums) {
      for (int64_t b = begin; b < end; ++b) body(c, b, sums);
    });
  };
  if (!estimator.sums_to_zero()) {
    const std::vector<double> sums = samples([&](int64_t c, int64_t b, double* sum) {
      const double tokens = tokens_of(in, estimator, b);
      for (int64_t k = 0; k < rewards; ++k) sum[k] += tokens * part[b * rewards + k];
      sum[rewards] += tokens;
      before[c] = std::max(before[c], std::abs(value_of(b)));
    });
    for (int64_t k = 0; k < rewards; ++k) mean[k] = sums[k] / std::max(sums[rewards], 1.0);
  }
  const std::vector<double> sums = samples([&](int64_t c, int64_t b, double* sum) {
    const double tokens = tokens_of(in, estimator, b), value = value_of(b);
    sum[0] += tokens * value * value;
    sum[1] += tokens;
    after[c] = std::max(after[c], std::abs(value));
  });
  const auto largest = [](const std::vector<double>& x) {
    return x.empty() ? 0.0 : *std::max_element(x.begin(), x.end());
  };
  w.zero = !estimator.sums_to_zero() && largest(after) <= ROUNDING * largest(before);
  const double std = w.zero ? 0.0 : estimator.std(sums[0], sums[1]);
  w.divisor = estimator.divisor(std);
  return w;
}

template <typename out_t>
struct Output {
  out_t *values, *per_reward;
};

// Whitens and clips the parts of samples [begin, end). sums: energy, number of advantages that are not 0, then
// the covariance of every reward's part with the advantage.
template <typename out_t>
void finish(const Input& in, const Estimator& estimator, const Whitening& w, int64_t begin, int64_t end, double* part,
            const Output<out_t>& out, double* sums) {
  const int64_t rewards = in.rewards;
  const Rows rows{end - begin, rewards, nullptr, nullptr, in.scored + begin, nullptr, part, nullptr};
  for (int64_t b = 0; b < rows.size; ++b) {
    const double value = whiten_and_clip(rows, w, estimator.clip, b);
    for (int64_t k = 0; k < rewards; ++k) {
      sums[2 + k] += rows.part(b, k) * value;
      out.per_reward[(begin + b) * rewards + k] = static_cast<out_t>(rows.part(b, k));
    }
    sums[0] += value * value;
    sums[1] += value != 0;
    out.values[begin + b] = static_cast<out_t>(value);
  }
}

// Fills the outputs and returns, by reward, constant groups, groups it applies to, then the sums of `finish`.
template <typename out_t>
std::vector<double> advantages(const Input& in, const Estimator& estimator, const std::vector<double>& spread,
                               const Output<out_t>& out) {
  const int64_t rewards = in.rewards;
  std::vector<double> mean(rewards, 0.0);
  Whitening w{mean.data()};
  if (estimator.whiten == Whiten::none)
    return sum_over_chunks(in, 3 * rewards + 2, [&](const Chunk& chunk, double* sums) {
      const Doubles part = std::make_unique_for_overwrite<double[]>(chunk.samples() * rewards);
      chunk_parts(in, estimator, spread, chunk, part.get(), sums);
      finish(in, estimator, w, chunk.begin, chunk.end, part.get(), out, sums + 2 * rewards);
    });
  const Doubles part = std::make_unique_for_overwrite<double[]>(in.batch * rewards);
  std::vector<double> sums = sum_over_chunks(in, 2 * rewards, [&](const Chunk& chunk, double* sum) {
    chunk_parts(in, estimator, spread, chunk, part.get() + chunk.begin * rewards, sum);
  });
  w = whitening(in, estimator, part.get(), mean);
  const std::vector<double> rest =
      sum_over_chunks(in, rewards + 2, [&](int64_t, int64_t begin, int64_t end, double* sum) {
        finish(in, estimator, w, begin, end, part.get() + begin * rewards, out, sum);
      });
  sums.insert(sums.end(), rest.begin(), rest.end());
  return sums;
}

void check(const Tensor& rewards, const Tensor& offsets, const Tensor& weights, const std::optional<Tensor>& lengths,
           const Estimator& estimator) {
  LVRPO_CHECK(rewards.dim() == 2, "rewards must be [B, K]");
  LVRPO_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be [P + 1]");
  check_dtype(offsets, ScalarType::Long, "offsets");
  check_dtype(weights, ScalarType::Double, "weights");
  check_size(weights, 0, rewards.size(1), "weights");
  const int64_t batch = rewards.size(0), groups = offsets.size(0) - 1;
  const int64_t* start = offsets.const_data_ptr<int64_t>();
  LVRPO_CHECK(start[0] == 0 && start[groups] == batch, "offsets must run from 0 to ", batch);
  for (int64_t p = 0; p < groups; ++p) LVRPO_CHECK(start[p] <= start[p + 1], "offsets must not decrease");
  LVRPO_CHECK(lengths.has_value() || !estimator.counts_tokens(),
              "lengths must be given: the estimator counts tokens");
  if (!lengths.has_value()) return;
  check_dtype(*lengths, ScalarType::Long, "lengths");
  check_size(*lengths, 0, batch, "lengths");
}

const DeclareNames DECLARE("normalize_advantages",
                           {{"combine", names_of(Combine{})},
                            {"baseline", names_of(Baseline{})},
                            {"scale", names_of(Scale{})},
                            {"whiten", names_of(Whiten{})}},
                           {{"numbers", EstimatorNumbers::NAMES}, {"stats", names_of(Stat{})}});

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Result normalize_advantages(Tensor rewards, Tensor offsets, Tensor weights, std::optional<Tensor> lengths,
                            Tensor numbers, int64_t combine, int64_t baseline, int64_t scale, int64_t whiten) {
  numbers = dense(numbers);
  check_dtype(numbers, ScalarType::Double, "numbers");
  check_size(numbers, 0, COLUMNS_OF<EstimatorNumbers>, "numbers");
  const EstimatorNumbers& by = *reinterpret_cast<const EstimatorNumbers*>(numbers.const_data_ptr<double>());
  const Estimator estimator = as_estimator(by, combine, baseline, scale, whiten);
  rewards = dense(rewards);
  offsets = dense(offsets);
  weights = dense(weights);
  if (lengths.has_value()) lengths = dense(*lengths);
  check(rewards, offsets, weights, lengths, estimator);
  const int64_t batch = rewards.size(0), count = rewards.size(1);
  const std::unique_ptr<bool[]> scored = std::make_unique_for_overwrite<bool[]>(batch);
  Input in{batch,
           count,
           offsets.size(0) - 1,
           nullptr,
           nullptr,
           offsets.const_data_ptr<int64_t>(),
           weights.const_data_ptr<double>(),
           lengths.has_value() ? lengths->const_data_ptr<int64_t>() : nullptr,
           scored.get()};
  LVRPO_DISPATCH_FLOATING(rewards.scalar_type(), scalar_t, [&] {
    in.x = rewards.const_data_ptr<scalar_t>();
    in.load = &load<scalar_t>;
  });

  const Moments m = moments(in, estimator);
  const std::vector<double> spread = batch_spread(in, estimator, m);
  const ScalarType out = rewards.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto fresh = [&](std::initializer_list<int64_t> size) { return make_empty(rewards, size, out); };
  Tensor values = fresh({batch}), per_reward = fresh({batch, count}), stats = fresh({CHOICES_OF<Stat>, count});
  Tensor all_zero = make_empty(rewards, {}, ScalarType::Bool);
  LVRPO_DISPATCH_ACC(out, out_t, [&] {
    const Output<out_t> output{values.mutable_data_ptr<out_t>(), per_reward.mutable_data_ptr<out_t>()};
    const std::vector<double> sums = advantages(in, estimator, spread, output);
    const double *constant = sums.data(), *seen = constant + count, *energy = seen + count;
    for (int64_t k = 0; k < count; ++k) {
      const auto store = [&](Stat row, double x) {
        stats.mutable_data_ptr<out_t>()[static_cast<int64_t>(row) * count + k] = static_cast<out_t>(x);
      };
      store(Stat::share, energy[0] > 0 ? energy[2 + k] / energy[0] : energy[2 + k]);
      store(Stat::constant_groups, constant[k] / seen[k]);
      store(Stat::mean, m.mean[k]);
      store(Stat::std, m.std[k]);
      store(Stat::applicable, m.count[k] / static_cast<double>(batch));
    }
    *all_zero.mutable_data_ptr<bool>() = energy[1] == 0;
  });
  return {values, per_reward, stats, all_zero};
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) { m.impl("normalize_advantages", TORCH_BOX(&lvrpo::normalize_advantages)); }
