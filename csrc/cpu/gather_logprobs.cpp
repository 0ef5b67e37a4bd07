// One pass over the logits for the log-sum-exp, the entropy and the sum of squares, one for the gradient.
// Formulas: docs/ops/gather_logprobs.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/logits.h"
#include "common/tensors.h"
#include "cpu/huge_pages.h"
#include "cpu/gather_logprobs_rows.h"

namespace lvrpo {
namespace {

using std::optional;

// A row is summed in chunks of this many columns, which threads share when there are few rows. Where the chunks begin
// depends on the row alone, so its bits do not depend on the threads or on other rows.
constexpr int64_t CHUNK_V = 8 * BLOCK_V;

void check_columns(const Columns& columns, int64_t rows) {
  const int64_t vocab = columns.vocab;
  for (int64_t row = 0; row < rows; ++row)
    LVRPO_CHECK(columns.low(row) >= 0 && columns.low(row) <= columns.high(row) && columns.high(row) <= vocab,
                "vocab_range[", row, "] is [", columns.low(row), ", ", columns.high(row), "], outside [0, ", vocab,
                "]");
}

// The targets, and the row that predicts each.
class Targets {
 public:
  // Ids and rows are inside the logits from here on, but for the id of an ignored token.
  Targets(const Tensor& token_ids, const optional<Tensor>& row_index, int64_t rows, const Columns& columns,
          int64_t ignore_index)
      : token_ids_(dense(token_ids)), ignore_index_(ignore_index) {
    LVRPO_CHECK(token_ids.dim() == 1, "token_ids must be [T]");
    check_dtype(token_ids, ScalarType::Long, "token_ids");
    count_ = token_ids.size(0);
    ids_ = token_ids_.const_data_ptr<int64_t>();
    if (row_index) {
      check_dtype(*row_index, ScalarType::Long, "row_index");
      check_size(*row_index, 0, count_, "row_index");
      row_index_ = dense(*row_index);
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

int64_t chunks_of(int64_t columns) { return std::max<int64_t>(1, (columns + CHUNK_V - 1) / CHUNK_V); }

// body(row, chunk) for every chunk of every row; a thread is worth starting for about this many logits.
template <typename Body>
void for_each_chunk(int64_t rows, int64_t columns, const Body& body) {
  const int64_t chunks = chunks_of(columns);
  const int64_t grain = std::max<int64_t>(1, CHUNK_V / std::max<int64_t>(1, std::min(columns, CHUNK_V)));
  torch::stable::parallel_for(0, rows * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / chunks, i % chunks);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_logprobs_fwd(Tensor logits, Tensor token_ids,
                                                               optional<Tensor> row_index,
                                                               optional<Tensor> vocab_range, Tensor numbers,
                                                               bool with_entropy, bool with_sum_squares) {
  const SoftmaxNumbers given(numbers);
  LVRPO_CHECK(logits.dim() == 2, "logits must be [R, V]");
  if (!has_unit_columns(logits)) logits = dense(logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const Columns columns = columns_of(vocab_range, rows, vocab);
  check_columns(columns, rows);
  const Targets targets(token_ids, row_index, rows, columns, given.ignore_index);
  const ScalarType dtype = logits.scalar_type();
  const ScalarType out_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logprobs = make_empty(logits, {targets.count()}, out_dtype);
  Tensor lse = make_empty(logits, {rows}, out_dtype);
  Tensor entropy = make_empty(logits, {with_entropy ? rows : 0}, out_dtype);
  Tensor sum_squares = make_empty(logits, {with_sum_squares ? rows : 0}, out_dtype);

  LVRPO_DISPATCH_FLOATING(dtype, scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const LogitScale<acc> scale(given.temperature, given.softcap);
    const scalar_t* x = logits.const_data_ptr<scalar_t>();
    const int64_t stride = logits.stride(0), chunks = chunks_of(vocab);
    std::vector<SoftmaxSums<acc>> sums(rows * chunks);
    const Summed which = with_sum_squares ? WITH_SQUARES : with_entropy ? WITH_ENTROPY : PLAIN_SUM;
    for_each_chunk(rows, vocab, [&](int64_t row, int64_t chunk) {
      const int64_t begin = columns.low(row) + chunk * CHUNK_V, size = std::min(columns.high(row) - begin, CHUNK_V);
      if (size <= 0) return;
      sums[row * chunks + chunk] = softmax_sums(which, x + row * stride + begin, size, scale);
    });

    acc* lse_ptr = lse.mutable_data_ptr<acc>();
    acc* entropy_ptr = entropy.mutable_data_ptr<acc>();
    acc* sum_squares_ptr = sum_squares.mutable_data_ptr<acc>();
    acc* out = logprobs.mutable_data_ptr<acc>();
    std::vector<acc> log_sum(rows);
    for (int64_t row = 0; row < rows; ++row) {
      SoftmaxSums<acc>& of_row = sums[row * chunks];
      for (int64_t chunk = 1; chunk < chunks; ++chunk) add_sums(of_row, sums[row * chunks + chunk], scale.inv_temperature);
      log_sum[row] = std::log(of_row.e);
      lse_ptr[row] = of_row.lse(log_sum[row], scale.inv_temperature);
      if (with_entropy) entropy_ptr[row] = of_row.entropy(log_sum[row]);
      if (with_sum_squares) sum_squares_ptr[row] = of_row.sum_squares();
    }
    for (int64_t t = 0; t < targets.count(); ++t) {
      const int64_t row = targets.row(t);
      if (targets.ignored(t)) {
        out[t] = acc(0);
      } else {
        const acc y = scale.cap(load(x + row * stride + targets.id(t)));
        out[t] = token_logprob(y, sums[row * chunks].reference, log_sum[row], scale.inv_temperature);
      }
    }
  });
  return {logprobs, lse, entropy, sum_squares};
}

// A column that is the target of one or more tokens of its row.
template <typename acc>
struct Hit {
  int64_t id;
  acc dlogprob;  // summed over those tokens, in their order
  acc y;         // the capped logit, read before the gradient may overwrite it
};

// The hits of every row by ascending id; `first` [R + 1] says where a row's begin.
template <typename acc>
struct Hits {
  std::vector<Hit<acc>> list;
  std::vector<int64_t> first;
  std::vector<acc> dlogprob;  // [R] summed over a row's tokens
};

template <typename scalar_t, typename acc>
Hits<acc> find_hits(const Targets& targets, const scalar_t* x, int64_t rows, int64_t stride, const acc* dlogprobs,
                    const LogitScale<acc>& scale) {
  std::vector<int64_t> first(rows + 1, 0);
  for (int64_t t = 0; t < targets.count(); ++t) first[targets.row(t) + 1] += !targets.ignored(t);
  for (int64_t row = 0; row < rows; ++row) first[row + 1] += first[row];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  std::vector<std::pair<int64_t, int64_t>> id_token(first[rows]);
  for (int64_t t = 0; t < targets.count(); ++t)
    if (!targets.ignored(t)) id_token[next[targets.row(t)]++] = {targets.id(t), t};

  Hits<acc> hits;
  hits.list.reserve(id_token.size());
  hits.first.assign(rows + 1, 0);
  hits.dlogprob.assign(rows, acc(0));
  for (int64_t row = 0; row < rows; ++row) {
    const auto begin = id_token.begin() + first[row], end = id_token.begin() + first[row + 1];
    for (auto it = begin; it != end; ++it) hits.dlogprob[row] += dlogprobs[it->second];
    std::sort(begin, end);
    for (auto it = begin; it != end; ++it) {
      if (it == begin || it->first != (it - 1)->first)
        hits.list.push_back({it->first, acc(0), scale.cap(load(x + row * stride + it->first))});
      hits.list.back().dlogprob += dlogprobs[it->second];
    }
    hits.first[row + 1] = static_cast<int64_t>(hits.list.size());
  }
  return hits;
}

void gather_logprobs_bwd(Tensor dlogits, Tensor dlogprobs, optional<Tensor> dentropy, Tensor logits, Tensor token_ids,
                         optional<Tensor> row_index, optional<Tensor> vocab_range, Tensor lse,
                         optional<Tensor> entropy, Tensor numbers) {
  const SoftmaxNumbers given(numbers);
  LVRPO_CHECK(logits.dim() == 2 && dlogits.dim() == 2, "logits and dlogits must be [R, V]");
  check_memory(dlogits, logits);
  if (!has_unit_columns(logits)) logits = dense(logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const Columns columns = columns_of(vocab_range, rows, vocab);
  check_columns(columns, rows);
  const Targets targets(token_ids, row_index, rows, columns, given.ignore_index);
  check_size(dlogprobs, 0, targets.count(), "dlogprobs");
  check_size(lse, 0, rows, "lse");
  LVRPO_CHECK(!dentropy || entropy, "dentropy needs entropy");
  if (dentropy) {
    check_size(*dentropy, 0, rows, "dentropy");
    check_size(*entropy, 0, rows, "entropy");
    dentropy = dense(*dentropy);
    entropy = dense(*entropy);
  }
  dlogprobs = dense(dlogprobs);
  lse = dense(lse);
  if (rows > 0) advise_huge_pages(dlogits.data_ptr(), ((rows - 1) * dlogits.stride(0) + vocab) * dlogits.element_size());

  LVRPO_DISPATCH_FLOATING(logits.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const LogitScale<acc> scale(given.temperature, given.softcap);
    const scalar_t* x = logits.const_data_ptr<scalar_t>();
    const int64_t stride = logits.stride(0), out_stride = dlogits.stride(0);
    const acc* lse_ptr = lse.const_data_ptr<acc>();
    const acc* entropy_ptr = dentropy ? entropy->const_data_ptr<acc>() : nullptr;
    const acc* dentropy_ptr = dentropy ? dentropy->const_data_ptr<acc>() : nullptr;
    const Hits<acc> hits = find_hits(targets, x, rows, stride, dlogprobs.const_data_ptr<acc>(), scale);

    // Before the gradient may overwrite the logits.
    std::vector<acc> log_sum(lse_ptr, lse_ptr + rows), shift(rows, acc(0));
    for (int64_t row = 0; row < rows; ++row) {
      if (!lost_digits(log_sum[row])) continue;
      const int64_t low = columns.low(row);
      const auto sums = softmax_sums(PLAIN_SUM, x + row * stride + low, columns.high(row) - low, scale);
      shift[row] = sums.reference;
      log_sum[row] = std::log(sums.e);
    }

    LVRPO_DISPATCH_FLOATING(dlogits.scalar_type(), grad_t, [&] {
      grad_t* dx = dlogits.mutable_data_ptr<grad_t>();
      for_each_chunk(rows, vocab, [&](int64_t row, int64_t chunk) {
        const int64_t begin = chunk * CHUNK_V, end = std::min(begin + CHUNK_V, vocab);
        const int64_t low = std::clamp(columns.low(row), begin, end), high = std::clamp(columns.high(row), low, end);
        grad_t* out = dx + row * out_stride;
        std::fill(out + begin, out + low, grad_t(0));
        std::fill(out + high, out + end, grad_t(0));
        const RowGradient<acc> gradient{log_sum[row], dentropy ? entropy_ptr[row] : acc(0), hits.dlogprob[row],
                                        dentropy ? dentropy_ptr[row] : acc(0), shift[row]};
        if (gradient.dentropy == acc(0) && hits.first[row] == hits.first[row + 1]) {
          std::fill(out + low, out + high, grad_t(0));
          return;
        }
        columns_gradient(x + row * stride + low, out + low, high - low, scale, gradient);
        // A target's column is formed whole in acc and stored once: rounding p first would lose 1 - p.
        auto hit = std::lower_bound(hits.list.begin() + hits.first[row], hits.list.begin() + hits.first[row + 1], low,
                                    [](const Hit<acc>& a, int64_t id) { return a.id < id; });
        for (; hit != hits.list.begin() + hits.first[row + 1] && hit->id < high; ++hit)
          store(out + hit->id, gradient(hit->y - gradient.shift, hit->dlogprob, scale) * scale.cap_slope(hit->y));
      });
    });
  });
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) {
  m.impl("gather_logprobs_fwd", TORCH_BOX(&lvrpo::gather_logprobs_fwd));
  m.impl("gather_logprobs_bwd", TORCH_BOX(&lvrpo::gather_logprobs_bwd));
}
