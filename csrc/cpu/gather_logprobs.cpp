// One pass per row for the log-sum-exp and the entropy, one for the gradient. Formulas: docs/ops/gather_logprobs.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/simd.h"

namespace lvrpo {
namespace {

using std::optional;

// Columns of one step: the scaled logits of a block stay in L1 between its maximum and its exponentials, so every
// exponential is computed once and every logit read once.
constexpr int64_t BLOCK_V = 1024;

template <typename acc>
struct RowStats {
  acc max;           // largest scaled logit
  acc sum_exp;       // sum exp(z - max)
  acc sum_exp_z;     // sum exp(z - max) * (z - max)
};

template <typename acc>
struct LogitScale {
  acc inv_temperature;
  acc softcap;  // 0 = none

  // z of a logit x.
  LVRPO_INLINE acc operator()(acc x) const {
    return (softcap > acc(0) ? softcap * std::tanh(x / softcap) : x) * inv_temperature;
  }
  // dz / dx.
  LVRPO_INLINE acc derivative(acc x) const {
    if (!(softcap > acc(0))) return inv_temperature;
    const acc t = std::tanh(x / softcap);
    return inv_temperature * (acc(1) - t) * (acc(1) + t);
  }
};

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION RowStats<acc> row_stats(const scalar_t* x, int64_t n, LogitScale<acc> scale) {
  RowStats<acc> stats{-std::numeric_limits<acc>::infinity(), acc(0), acc(0)};
  acc z[BLOCK_V];
  for (int64_t begin = 0; begin < n; begin += BLOCK_V) {
    const int64_t size = n - begin < BLOCK_V ? n - begin : BLOCK_V;
    acc block_max = -std::numeric_limits<acc>::infinity();
    if (scale.softcap > acc(0)) {
      for (int64_t i = 0; i < size; ++i) z[i] = scale(static_cast<acc>(x[begin + i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) z[i] = static_cast<acc>(x[begin + i]) * scale.inv_temperature;
    }
#pragma omp simd reduction(max : block_max)
    for (int64_t i = 0; i < size; ++i) block_max = z[i] > block_max ? z[i] : block_max;
    if (block_max > stats.max) {
      // Shift the sums to the new maximum: sum e^(z-m') (z-m') = e^(m-m') (sum e^(z-m) (z-m) + (m-m') sum e^(z-m)).
      const acc shift = stats.max - block_max;
      if (stats.sum_exp > acc(0)) {
        const acc factor = std::exp(shift);
        stats.sum_exp_z = factor * (stats.sum_exp_z + shift * stats.sum_exp);
        stats.sum_exp *= factor;
      }
      stats.max = block_max;
    }
    if (stats.max == -std::numeric_limits<acc>::infinity()) continue;
    acc sum = 0, sum_z = 0;
    const acc lowest = std::is_same_v<acc, double> ? acc(-700) : acc(-87);
#pragma omp simd reduction(+ : sum, sum_z)
    for (int64_t i = 0; i < size; ++i) {
      const acc d = z[i] - stats.max;
      const acc e = exp_fast(d);
      sum += e;
      // d may be -inf where e is 0; their product must be 0.
      sum_z += e * (d < lowest ? lowest : d);
    }
    stats.sum_exp += sum;
    stats.sum_exp_z += sum_z;
  }
  return stats;
}

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void row_gradient(const scalar_t* x, scalar_t* dx, int64_t n, LogitScale<acc> scale, acc lse,
                                     acc dlogprob_sum, acc dentropy, acc mean_z) {
  if (scale.softcap > acc(0)) {
    for (int64_t i = 0; i < n; ++i) {
      const acc z = scale(static_cast<acc>(x[i]));
      const acc p = exp_fast(z - lse);
      const acc dz = p > acc(0) ? p * (dentropy * (mean_z - z) - dlogprob_sum) : acc(0);
      dx[i] = static_cast<scalar_t>(dz * scale.derivative(static_cast<acc>(x[i])));
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc z = static_cast<acc>(x[i]) * scale.inv_temperature;
    const acc p = exp_fast(z - lse);
    const acc dz = p > acc(0) ? p * (dentropy * (mean_z - z) - dlogprob_sum) : acc(0);
    dx[i] = static_cast<scalar_t>(dz * scale.inv_temperature);
  }
}

// The columns a row's softmax runs over.
struct Columns {
  const int64_t* ranges;  // [R, 2] or null
  int64_t stride_row, stride_side, vocab;
  int64_t low(int64_t row) const { return ranges ? ranges[row * stride_row] : 0; }
  int64_t high(int64_t row) const { return ranges ? ranges[row * stride_row + stride_side] : vocab; }
};

Columns columns_of(const optional<Tensor>& vocab_range, int64_t rows, int64_t vocab) {
  if (!vocab_range) return {nullptr, 0, 0, vocab};
  check_dtype(*vocab_range, ScalarType::Long, "vocab_range");
  check_size(*vocab_range, 0, rows, "vocab_range");
  check_size(*vocab_range, 1, 2, "vocab_range");
  const Columns columns{vocab_range->const_data_ptr<int64_t>(), vocab_range->stride(0), vocab_range->stride(1), vocab};
  for (int64_t row = 0; row < rows; ++row)
    LVRPO_CHECK(columns.low(row) >= 0 && columns.low(row) <= columns.high(row) && columns.high(row) <= vocab,
                "vocab_range[", row, "] is [", columns.low(row), ", ", columns.high(row), "], outside [0, ", vocab,
                "]");
  return columns;
}

// The targets, and the row that predicts each.
class Targets {
 public:
  // Ids and rows are inside the logits from here on, but for the id of an ignored token.
  Targets(const Tensor& token_ids, const optional<Tensor>& row_index, int64_t rows, const Columns& columns,
          int64_t ignore_index)
      : token_ids_(torch::stable::contiguous(token_ids)), ignore_index_(ignore_index) {
    LVRPO_CHECK(token_ids.dim() == 1, "token_ids must be [T]");
    check_dtype(token_ids, ScalarType::Long, "token_ids");
    count_ = token_ids.size(0);
    ids_ = token_ids_.const_data_ptr<int64_t>();
    if (row_index) {
      check_dtype(*row_index, ScalarType::Long, "row_index");
      check_size(*row_index, 0, count_, "row_index");
      row_index_ = torch::stable::contiguous(*row_index);
      rows_ = row_index_->const_data_ptr<int64_t>();
    }
    for (int64_t t = 0; t < count_; ++t) {
      LVRPO_CHECK(row(t) >= 0 && row(t) < rows, "row_index[", t, "] is ", row(t), ", expected [0, ", rows, ")");
      LVRPO_CHECK(ignored(t) || (id(t) >= columns.low(row(t)) && id(t) < columns.high(row(t))), "token_ids[", t,
                  "] is ", id(t), ", outside its row's vocabulary");
    }
  }
  int64_t count() const { return count_; }
  int64_t id(int64_t t) const { return ids_[t]; }
  int64_t row(int64_t t) const { return rows_ ? rows_[t] : t; }
  bool ignored(int64_t t) const { return ids_[t] == ignore_index_; }

 private:
  Tensor token_ids_;
  optional<Tensor> row_index_;
  const int64_t* ids_;
  const int64_t* rows_ = nullptr;
  int64_t count_, ignore_index_;
};

// A row can be as long as a vocabulary; a thread is worth starting for about this many logits.
int64_t row_grain(int64_t vocab) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, vocab)); }

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_logprobs_fwd(Tensor logits, Tensor token_ids, optional<Tensor> row_index,
                                                       optional<Tensor> vocab_range, double temperature,
                                                       double softcap, int64_t ignore_index, bool with_entropy,
                                                       bool with_sum_squares) {
  LVRPO_CHECK(!with_sum_squares, "the sum of squares is not there yet");
  LVRPO_CHECK(logits.dim() == 2, "logits must be [R, V]");
  if (logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const Columns columns = columns_of(vocab_range, rows, vocab);
  const Targets targets(token_ids, row_index, rows, columns, ignore_index);
  const ScalarType dtype = logits.scalar_type();
  const ScalarType out_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logprobs = torch::stable::new_empty(logits, {targets.count()}, out_dtype);
  Tensor lse = torch::stable::new_empty(logits, {rows}, out_dtype);
  Tensor entropy = torch::stable::new_empty(logits, {with_entropy ? rows : 0}, out_dtype);

  LVRPO_DISPATCH_FLOATING(dtype, scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const LogitScale<acc> scale{static_cast<acc>(1.0 / temperature), static_cast<acc>(softcap)};
    const scalar_t* x = logits.const_data_ptr<scalar_t>();
    const int64_t stride = logits.stride(0);
    acc* lse_ptr = lse.mutable_data_ptr<acc>();
    acc* entropy_ptr = entropy.mutable_data_ptr<acc>();
    acc* out = logprobs.mutable_data_ptr<acc>();
    // log p is (z - max) - log(sum), which keeps its digits under a large common offset of the logits; z - lse does not.
    std::vector<acc> max(rows), log_sum(rows);
    torch::stable::parallel_for(0, rows, row_grain(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t low = columns.low(row), high = columns.high(row);
        const RowStats<acc> stats = row_stats<scalar_t, acc>(x + row * stride + low, high - low, scale);
        max[row] = stats.max;
        log_sum[row] = std::log(stats.sum_exp);
        lse_ptr[row] = stats.max + log_sum[row];
        if (with_entropy) entropy_ptr[row] = log_sum[row] - stats.sum_exp_z / stats.sum_exp;
      }
    });
    for (int64_t t = 0; t < targets.count(); ++t) {
      const int64_t row = targets.row(t);
      if (targets.ignored(t)) {
        out[t] = acc(0);
      } else {
        out[t] = (scale(static_cast<acc>(x[row * stride + targets.id(t)])) - max[row]) - log_sum[row];
      }
    }
  });
  return {logprobs, lse, entropy, torch::stable::new_empty(lse, {0})};
}

void gather_logprobs_bwd(Tensor dlogits, Tensor dlogprobs, optional<Tensor> dentropy, Tensor logits, Tensor token_ids,
                           optional<Tensor> row_index, optional<Tensor> vocab_range, Tensor lse,
                           optional<Tensor> entropy, double temperature, double softcap, int64_t ignore_index) {
  LVRPO_CHECK(logits.dim() == 2, "logits must be [R, V]");
  if (logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const Columns columns = columns_of(vocab_range, rows, vocab);
  const Targets targets(token_ids, row_index, rows, columns, ignore_index);
  check_size(dlogprobs, 0, targets.count(), "dlogprobs");
  check_size(lse, 0, rows, "lse");
  LVRPO_CHECK(!dentropy || entropy, "dentropy needs entropy");
  if (dentropy) {
    check_size(*dentropy, 0, rows, "dentropy");
    check_size(*entropy, 0, rows, "entropy");
    dentropy = torch::stable::contiguous(*dentropy);
    entropy = torch::stable::contiguous(*entropy);
  }
  dlogprobs = torch::stable::contiguous(dlogprobs);
  lse = torch::stable::contiguous(lse);
  check_dtype(dlogits, logits.scalar_type(), "dlogits");
  check_contiguous(dlogits, "dlogits");

  LVRPO_DISPATCH_FLOATING(logits.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const LogitScale<acc> scale{static_cast<acc>(1.0 / temperature), static_cast<acc>(softcap)};
    const scalar_t* x = logits.const_data_ptr<scalar_t>();
    const int64_t stride = logits.stride(0);
    const acc* dlp = dlogprobs.const_data_ptr<acc>();
    const acc* dent = dentropy ? dentropy->const_data_ptr<acc>() : nullptr;
    const acc* ent = dentropy ? entropy->const_data_ptr<acc>() : nullptr;
    const acc* lse_ptr = lse.const_data_ptr<acc>();
    scalar_t* dx = dlogits.mutable_data_ptr<scalar_t>();

    // Targets sorted by row, so that each row is written by one thread and its sums have one order.
    std::vector<int64_t> first(rows + 1, 0);
    for (int64_t t = 0; t < targets.count(); ++t) first[targets.row(t) + 1] += !targets.ignored(t);
    for (int64_t row = 0; row < rows; ++row) first[row + 1] += first[row];
    std::vector<int64_t> next(first.begin(), first.end() - 1), order(first[rows]);
    for (int64_t t = 0; t < targets.count(); ++t)
      if (!targets.ignored(t)) order[next[targets.row(t)]++] = t;

    torch::stable::parallel_for(0, rows, row_grain(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t low = columns.low(row), high = columns.high(row);
        scalar_t* out = dx + row * vocab;
        std::fill(out, out + low, scalar_t(0));
        std::fill(out + high, out + vocab, scalar_t(0));
        acc total = 0;
        for (int64_t k = first[row]; k < first[row + 1]; ++k) total += dlp[order[k]];
        const acc de = dent ? dent[row] : acc(0);
        if (de == acc(0) && first[row] == first[row + 1]) {
          std::fill(out + low, out + high, scalar_t(0));
          continue;
        }
        const acc mean_z = ent ? lse_ptr[row] - ent[row] : acc(0);
        row_gradient<scalar_t, acc>(x + row * stride + low, out + low, high - low, scale, lse_ptr[row], total, de,
                                    mean_z);
        for (int64_t k = first[row]; k < first[row + 1]; ++k) {
          const int64_t id = targets.id(order[k]);
          // A target's column is formed whole in acc and stored once: rounding p first would lose 1 - p.
          acc hits = 0;
          for (int64_t j = first[row]; j < first[row + 1]; ++j)
            if (targets.id(order[j]) == id) hits += dlp[order[j]];
          const acc logit = static_cast<acc>(x[row * stride + id]);
          const acc z = scale(logit);
          const acc p = exp_fast(z - lse_ptr[row]);
          // z may be -inf where p is 0; their product must be 0.
          const acc spread = p > acc(0) ? p * (de * (mean_z - z) - total) : acc(0);
          out[id] = static_cast<scalar_t>((hits + spread) * scale.derivative(logit));
        }
      }
    });
  });
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) {
  m.impl("gather_logprobs_fwd", TORCH_BOX(&lvrpo::gather_logprobs_fwd));
  m.impl("gather_logprobs_bwd", TORCH_BOX(&lvrpo::gather_logprobs_bwd));
}
