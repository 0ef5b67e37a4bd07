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

#include "common/check.h"
#include "common/dispatch.h"
#include "common/names.h"
#include "cpu/advantage_group.h"

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

// The weighted sum of a sample's rewards, a missing one counted as `missing[k]`.
double weighted_sum(const Input& in, const double* value, const double* counted, const double* missing) {
  double sum = 0;
  for (int64_t k = 0; k < in.rewards; ++k)
    sum += in.weights[k] * (counted[k] > 0 || missing == nullptr ? value[k] : missing[k]);
  return sum;
}

// What a group is divided by where that is the same for the whole batch: one number per reward, or one for their sum.
std::vector<double> batch_spread(const Input& in, const Estimator& estimator, const Moments& m) {
  const int64_t rewards = in.rewards;
  if (!estimator.scales_by_batch()) return std::vector<double>(rewards, 1.0);
  if (estimator.scale == Scale::nonzero) {
    const int64_t columns = estimator.decoupled ? rewards : 1;
    std::vector<double> fraction = sum_over_chunks(in, columns, [&](const Chunk& chunk, double* sum) {
      for (int64_t b = 0; b < chunk.samples(); ++b) {
        const double *value = chunk.value.get() + b * rewards, *counted = chunk.counted.get() + b * rewards;
        double size = 0;
        for (int64_t k = 0; k < rewards; ++k) {
          if (estimator.decoupled) sum[k] += value[k] != 0;
          size += std::abs(in.weights[k]) * std::abs(value[k]);
        }
        if (!estimator.decoupled) sum[0] += std::abs(weighted_sum(in, value, counted, nullptr)) > ROUNDING * size;
      }
    });
    for (int64_t k = 0; k < columns; ++k) fraction[k] /= estimator.decoupled ? m.count[k] : m.scored;
    return fraction;
  }
  if (estimator.decoupled) return m.std;

  Doubles total = std::make_unique_for_overwrite<double[]>(in.batch);
  const std::vector<double> sums = sum_over_chunks(in, 1, [&](const Chunk& chunk, double* sum) {
    std::vector<double> missing(rewards);
    for (int64_t p = chunk.first; p < chunk.last; ++p) {
      const int64_t from = in.start[p] - chunk.begin, to = in.start[p + 1] - chunk.begin;
      for (int64_t k = 0; k < rewards; ++k) {
        double count = 0, all = 0;
        for (int64_t b = from; b < to; ++b)
          count += chunk.counted[b * rewards + k], all += chunk.value[b * rewards + k];
        missing[k] = count > 0 ? all / count : m.count[k] > 0 ? m.mean[k] : 0.0;
      }
      for (int64_t b = from; b < to; ++b)
        if (in.scored[chunk.begin + b])
          *sum += total[chunk.begin + b] = weighted_sum(in, chunk.value.get() + b * rewards,
                                                        chunk.counted.get() + b * rewards, missing.data());
    }
  });
  const std::vector<double> squares = sum_over_chunks(in, 1, [&](const Chunk& chunk, double* sum) {
    for (int64_t b = chunk.begin; b < chunk.end; ++b)
      if (in.scored[b]) *sum += (total[b] - sums[0] / m.scored) * (total[b] - sums[0] / m.scored);
  });
  return {estimator.std(squares[0], m.scored)};
}

// part [B, K] of a chunk's samples, from its first one on; see group_parts for sums.
void chunk_parts(const Input& in, const Estimator& estimator, const std::vector<double>& spread, const Chunk& chunk,
                 double* part, double* sums) {
  const int64_t rewards = in.rewards;
  int64_t longest = 0;
  for (int64_t p = chunk.first; p < chunk.last; ++p) longest = std::max(longest, in.start[p + 1] - in.start[p]);
  const Doubles total = std::make_unique_for_overwrite<double[]>(longest);
  std::vector<Column> columns(rewards);
  for (int64_t p = chunk.first; p < chunk.last; ++p) {
    const int64_t row = in.start[p] - chunk.begin;
    const int64_t* lengths = in.lengths == nullptr ? nullptr : in.lengths + in.start[p];
    const Group group{estimator,
                      rewards,
                      in.weights,
                      in.start[p + 1] - in.start[p],
                      chunk.value.get() + row * rewards,
                      chunk.counted.get() + row * rewards,
                      in.scored + in.start[p],
                      lengths,
                      part + row * rewards};
    group_parts(group, spread, total.get(), columns.data(), sums);
  }
}

// What the whole batch's parts are shifted and divided by; zero = the batch's advantages agree up to rounding.
struct Whitening {
  std::vector<double> mean;
  double divisor = 1;
  bool zero = false;
};

double tokens_of(const Input& in, const Estimator& estimator, int64_t b) {
  if (!in.scored[b]) return 0.0;
  return estimator.whiten == Whiten::token ? static_cast<double>(in.lengths[b]) : 1.0;
}

Whitening whitening(const Input& in, const Estimator& estimator, const double* part) {
  const int64_t rewards = in.rewards;
  Whitening w{std::vector<double>(rewards, 0.0)};
  std::vector<double> before(in.chunks(), 0.0), after(in.chunks(), 0.0);
  const auto value_of = [&](int64_t b) {
    double value = 0;
    for (int64_t k = 0; k < rewards; ++k) value += part[b * rewards + k] - w.mean[k];
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
    for (int64_t k = 0; k < rewards; ++k) w.mean[k] = sums[k] / std::max(sums[rewards], 1.0);
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
  for (int64_t b = begin; b < end; ++b, part += rewards) {
    double value = 0;
    const bool zero = w.zero || !in.scored[b];
    for (int64_t k = 0; k < rewards; ++k) {
      part[k] = zero ? 0.0 : (part[k] - w.mean[k]) / w.divisor;
      value += part[k];
    }
    const double clipped = std::clamp(value, -estimator.clip, estimator.clip);
    const double shrink = clipped == value ? 1.0 : clipped / value;
    for (int64_t k = 0; k < rewards; ++k) {
      const double kept = part[k] * shrink;
      sums[2 + k] += kept * clipped;
      out.per_reward[b * rewards + k] = static_cast<out_t>(kept);
    }
    sums[0] += clipped * clipped;
    sums[1] += clipped != 0;
    out.values[b] = static_cast<out_t>(clipped);
  }
}

// Fills the outputs and returns, by reward, constant groups, groups it applies to, then the sums of `finish`.
template <typename out_t>
std::vector<double> advantages(const Input& in, const Estimator& estimator, const std::vector<double>& spread,
                               const Output<out_t>& out) {
  const int64_t rewards = in.rewards;
  Whitening w{std::vector<double>(rewards, 0.0)};
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
  w = whitening(in, estimator, part.get());
  const std::vector<double> rest =
      sum_over_chunks(in, rewards + 2, [&](int64_t, int64_t begin, int64_t end, double* sum) {
        finish(in, estimator, w, begin, end, part.get() + begin * rewards, out, sum);
      });
  sums.insert(sums.end(), rest.begin(), rest.end());
  return sums;
}

void check(const Tensor& rewards, const Tensor& offsets, const Tensor& weights, const std::optional<Tensor>& lengths,
           const Estimator& estimator) {
  LVRPO_CHECK(estimator.clip > 0, "clip is ", estimator.clip, ", expected > 0");
  LVRPO_CHECK(rewards.dim() == 2, "rewards must be [B, K]");
  LVRPO_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be [P + 1]");
  check_dtype(offsets, ScalarType::Long, "offsets");
  check_dtype(weights, ScalarType::Double, "weights");
  check_size(weights, 0, rewards.size(1), "weights");
  const int64_t batch = rewards.size(0), groups = offsets.size(0) - 1;
  const int64_t* start = offsets.const_data_ptr<int64_t>();
  LVRPO_CHECK(start[0] == 0 && start[groups] == batch, "offsets must run from 0 to ", batch);
  for (int64_t p = 0; p < groups; ++p) LVRPO_CHECK(start[p] <= start[p + 1], "offsets must not decrease");
  LVRPO_CHECK(lengths.has_value() || (estimator.baseline != Baseline::length && estimator.whiten != Whiten::token),
              "lengths must be given: the estimator counts tokens");
  if (!lengths.has_value()) return;
  check_dtype(*lengths, ScalarType::Long, "lengths");
  check_size(*lengths, 0, batch, "lengths");
}

// The rows of AdvantageStats.
LVRPO_CHOICES(Stat, share, constant_groups, mean, std, applicable)

const DeclareNames DECLARE("normalize_advantages",
                           {{"combine", names_of(Combine{})},
                            {"baseline", names_of(Baseline{})},
                            {"scale", names_of(Scale{})},
                            {"whiten", names_of(Whiten{})}},
                           {{"numbers", EstimatorNumbers::NAMES}, {"stats", names_of(Stat{})}});

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Result normalize_advantages(Tensor rewards, Tensor offsets, Tensor weights, std::optional<Tensor> lengths,
                            Tensor numbers, int64_t combine, int64_t baseline, int64_t scale, int64_t whiten) {
  numbers = torch::stable::contiguous(numbers);
  check_dtype(numbers, ScalarType::Double, "numbers");
  check_size(numbers, 0, COLUMNS_OF<EstimatorNumbers>, "numbers");
  const EstimatorNumbers& by = *reinterpret_cast<const EstimatorNumbers*>(numbers.const_data_ptr<double>());
  const Estimator estimator{as_choice<Combine>(combine, "combine") == Combine::decoupled,
                            as_choice<Baseline>(baseline, "baseline"),
                            as_choice<Scale>(scale, "scale"),
                            as_choice<Whiten>(whiten, "whiten"),
                            by.ddof,
                            by.eps,
                            by.std_floor,
                            by.clip};
  rewards = torch::stable::contiguous(rewards);
  offsets = torch::stable::contiguous(offsets);
  weights = torch::stable::contiguous(weights);
  if (lengths.has_value()) lengths = torch::stable::contiguous(*lengths);
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
  const auto fresh = [&](std::initializer_list<int64_t> size) { return torch::stable::new_empty(rewards, size, out); };
  Tensor values = fresh({batch}), per_reward = fresh({batch, count}), stats = fresh({CHOICES_OF<Stat>, count});
  Tensor all_zero = torch::stable::new_empty(rewards, {}, ScalarType::Bool);
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
