// One read of the logits for the log-sum-exp, the entropy and the sum of squares, one for the gradient.
// Formulas: docs/ops/gather_logprobs.md.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/tensors.h"
#include "cuda/softmax_rows.cuh"

namespace lvrpo {
namespace {

using std::optional;

// Rows per multiprocessor from which a block has a row of its own: as many as keep its memory busy.
constexpr int64_t ROWS_EACH = 4;
// Packs of a row that a thread of the backward has: several loads, so that what the block must know of the row first
// costs little, and few enough that a row has several blocks.
constexpr int64_t PACKS_OF_TILE = 16;

template <typename T>
const T* data_or_null(const optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// ---- Forward ----

template <typename acc>
struct RowOutputs {
  acc *lse, *entropy, *sum_squares;  // [R]; the last two may be null
  acc *reference, *log_sum;          // [R], for gather_kernel; null where a row's token is its own
  acc* logprobs;                     // [T], of the tokens that are rows
};

// What the sums of a whole row say; by one thread.
template <typename T, typename acc>
__device__ void finish_row(const SoftmaxSums<acc>& sums, int64_t row, const Logits<T>& logits, const Targets& targets,
                           const LogitScale<acc>& scale, const RowOutputs<acc>& out) {
  const acc log_sum = log(sums.e);
  out.lse[row] = sums.lse(log_sum, scale.inv_temperature);
  if (out.entropy) out.entropy[row] = sums.entropy(log_sum);
  if (out.sum_squares) out.sum_squares[row] = sums.sum_squares();
  if (out.reference) {
    out.reference[row] = sums.reference;
    out.log_sum[row] = log_sum;
  } else if (row < targets.count) {
    const int64_t id = targets.id_in(row, logits.range(row));
    out.logprobs[row] = id == NO_TARGET ? acc(0)
                                        : token_logprob(scale.cap(load(logits.row(row) + id)), sums.reference, log_sum,
                                                        scale.inv_temperature);
  }
}

// A block sums every parts-th chunk of a row: all of them, or one. Then what its threads have goes to
// sums [R, parts, THREADS].
template <Summed which, typename T, typename acc>
__global__ __launch_bounds__(THREADS, BLOCKS_EACH<acc>) void sums_kernel(Logits<T> logits, Targets targets, LogitScale<acc> scale,
                                                       int64_t parts, SoftmaxSums<acc>* sums, RowOutputs<acc> out) {
  const int64_t row = blockIdx.x / parts, part = blockIdx.x % parts;
  const SoftmaxSums<acc> total = row_sums<which>(logits.row(row), logits.range(row), scale, part, parts);
  if (parts > 1) {
    sums[static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x] = total;
    return;
  }
  const SoftmaxSums<acc> all = add_threads(total, scale);
  if (threadIdx.x == 0) finish_row(all, row, logits, targets, scale, out);
}

template <typename T, typename acc>
__global__ __launch_bounds__(THREADS) void join_kernel(Logits<T> logits, Targets targets, LogitScale<acc> scale,
                                                       int64_t parts, const SoftmaxSums<acc>* sums,
                                                       RowOutputs<acc> out) {
  const int64_t row = blockIdx.x;
  SoftmaxSums<acc> total;
  for (int64_t part = 0; part < parts; ++part)
    add_sums(total, sums[(row * parts + part) * THREADS + threadIdx.x], scale.inv_temperature);
  total = add_threads(total, scale);
  if (threadIdx.x == 0) finish_row(total, row, logits, targets, scale, out);
}

// The log-probs of tokens that say which row is theirs.
template <typename T, typename acc>
__global__ __launch_bounds__(THREADS) void gather_kernel(Logits<T> logits, Targets targets, LogitScale<acc> scale,
                                                         const acc* reference, const acc* log_sum, acc* logprobs) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t >= targets.count) return;
  const int64_t row = targets.row(t), id = row == NO_TARGET ? NO_TARGET : targets.id_in(t, logits.range(row));
  logprobs[t] = id == NO_TARGET ? acc(0)
                                : token_logprob(scale.cap(load(logits.row(row) + id)), reference[row], log_sum[row],
                                                scale.inv_temperature);
}

template <typename T, typename acc>
void sum_rows(const OnDeviceOf& device, Summed which, const Logits<T>& logits, int64_t rows, const Targets& targets,
              const LogitScale<acc>& scale, const Tensor& like, const RowOutputs<acc>& out) {
  const int64_t chunks = chunks_of(logits.columns.vocab);
  // The same bits either way: a thread's sums of the chunks are added in the order of the chunks.
  const int64_t parts = rows >= ROWS_EACH * device.processors() ? 1 : chunks;
  constexpr int64_t size = sizeof(SoftmaxSums<acc>) / sizeof(acc), shared = SHARED_SUMS<acc>;
  Tensor memory = make_empty(like, {parts > 1 ? rows * parts * THREADS * size : 0}, acc_dtype<acc>);
  auto* sums = reinterpret_cast<SoftmaxSums<acc>*>(memory.mutable_data_ptr<acc>());
  const auto kernel = which == PLAIN_SUM      ? sums_kernel<PLAIN_SUM, T, acc>
                      : which == WITH_ENTROPY ? sums_kernel<WITH_ENTROPY, T, acc>
                                              : sums_kernel<WITH_SQUARES, T, acc>;
  launch(device, {rows * parts, THREADS, shared}, kernel, logits, targets, scale, parts, sums, out);
  if (parts > 1) launch(device, {rows, THREADS, shared}, join_kernel<T, acc>, logits, targets, scale, parts, sums, out);
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
  const TargetTensors given_targets(token_ids, row_index, rows, given.ignore_index);
  const Targets& targets = given_targets.targets;
  const ScalarType dtype = logits.scalar_type();
  const ScalarType out_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto empty = [&](int64_t size) { return make_empty(logits, {size}, out_dtype); };
  Tensor logprobs = empty(targets.count), lse = empty(rows), entropy = empty(with_entropy ? rows : 0);
  Tensor sum_squares = empty(with_sum_squares ? rows : 0);
  Tensor reference = empty(row_index ? rows : 0), log_sum = empty(row_index ? rows : 0);

  const OnDeviceOf device(logits);
  LVRPO_DISPATCH_FLOATING(dtype, scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const LogitScale<acc> scale(given.temperature, given.softcap);
    const Logits<scalar_t> x{logits.const_data_ptr<scalar_t>(), logits.stride(0), columns};
    const auto data = [](Tensor& t, bool there) { return there ? t.mutable_data_ptr<acc>() : nullptr; };
    const RowOutputs<acc> out{data(lse, true),
                              data(entropy, with_entropy),
                              data(sum_squares, with_sum_squares),
                              data(reference, row_index.has_value()),
                              data(log_sum, row_index.has_value()),
                              data(logprobs, true)};
    sum_rows(device, with_sum_squares ? WITH_SQUARES : with_entropy ? WITH_ENTROPY : PLAIN_SUM, x, rows, targets, scale,
             lse, out);
    if (row_index)
      launch(device, {(targets.count + THREADS - 1) / THREADS, THREADS}, gather_kernel<scalar_t, acc>, x, targets,
             scale, out.reference, out.log_sum, out.logprobs);
  });
  return {logprobs, lse, entropy, sum_squares};
}

// ---- The tokens of a row, in their order, by lists that no thread's turn decides ----

// Tokens are counted from 1; 0 is none.
struct TokenLists {
  unsigned long long* newest;  // [R] the token of the row that was linked last
  int64_t* before;             // [T] the one that was linked before it: in any order
  int64_t* first;              // [R] the row's first token
  int64_t* next;               // [T] the one after it: in their order
};

__global__ __launch_bounds__(THREADS) void link_kernel(Targets targets, Columns columns, TokenLists lists) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t >= targets.count) return;
  const int64_t row = targets.row(t);
  if (row == NO_TARGET || targets.id_in(t, range_of(columns, row)) == NO_TARGET) return;
  lists.before[t] = static_cast<int64_t>(atomicExch(lists.newest + row, static_cast<unsigned long long>(t + 1)));
}

// A thread looks through its token's row for the one that comes next.
__global__ __launch_bounds__(THREADS) void order_kernel(Targets targets, Columns columns, TokenLists lists) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t >= targets.count) return;
  const int64_t row = targets.row(t);
  if (row == NO_TARGET || targets.id_in(t, range_of(columns, row)) == NO_TARGET) return;
  bool is_first = true;
  int64_t next = 0;
  for (auto other = static_cast<int64_t>(lists.newest[row]); other != 0; other = lists.before[other - 1]) {
    is_first = is_first && other >= t + 1;
    if (other > t + 1 && (next == 0 || other < next)) next = other;
  }
  lists.next[t] = next;
  if (is_first) lists.first[row] = t + 1;
}

// ---- Backward ----

template <typename acc>
struct Upstream {
  const acc *dlogprobs, *dentropy, *lse, *entropy;  // [T], then [R]; dentropy and entropy are null together
};

// A block per row says what its gradient is made of, before that may take the place of the logits.
template <typename T, typename acc>
__global__ __launch_bounds__(THREADS) void rows_kernel(Logits<T> logits, Targets targets, TokenLists lists,
                                                       LogitScale<acc> scale, Upstream<acc> from,
                                                       RowGradient<acc>* gradients) {
  const int64_t row = blockIdx.x;
  RowGradient<acc> gradient{from.lse[row], acc(0), acc(0), acc(0)};
  if (lost_digits(gradient.lse)) {
    const SoftmaxSums<acc> sums =
        add_threads(row_sums<PLAIN_SUM>(logits.row(row), logits.range(row), scale), scale);
    gradient.shift = sums.reference;
    gradient.lse = log(sums.e);
  }
  if (threadIdx.x != 0) return;
  if (lists.first) {
    for (int64_t t = lists.first[row]; t != 0; t = lists.next[t - 1]) gradient.dlogprob += from.dlogprobs[t - 1];
  } else if (row < targets.count && targets.id_in(row, logits.range(row)) != NO_TARGET) {
    gradient.dlogprob = from.dlogprobs[row];
  }
  if (from.dentropy) gradient.entropy = from.entropy[row], gradient.dentropy = from.dentropy[row];
  gradients[row] = gradient;
}

// What tokens that say which row is theirs add to the gradient at their column: the first of those that share one forms
// it whole, and store_targets_kernel puts it in its place.
template <typename T, typename acc>
__global__ __launch_bounds__(THREADS) void targets_kernel(Logits<T> logits, Targets targets, TokenLists lists,
                                                          LogitScale<acc> scale, const acc* dlogprobs,
                                                          const RowGradient<acc>* gradients, acc* values,
                                                          bool* is_stored) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t >= targets.count) return;
  const int64_t row = targets.row(t), id = row == NO_TARGET ? NO_TARGET : targets.id_in(t, logits.range(row));
  is_stored[t] = false;
  if (id == NO_TARGET) return;
  acc hits = 0;
  for (int64_t other = lists.first[row]; other != 0; other = lists.next[other - 1]) {
    if (targets.ids[other - 1] != id) continue;
    if (other < t + 1) return;
    hits += dlogprobs[other - 1];
  }
  const RowGradient<acc> gradient = gradients[row];
  const acc y = scale.cap(load(logits.row(row) + id));
  // A row of which no gradient is asked may hold anything.
  const bool asked = hits != acc(0) || !gradient.is_zero();
  values[t] = asked ? gradient(y - gradient.shift, hits, scale) * scale.cap_slope(y) : acc(0);
  is_stored[t] = true;
}

template <typename G, typename acc>
__global__ __launch_bounds__(THREADS) void store_targets_kernel(Targets targets, const acc* values,
                                                                const bool* is_stored, G* dlogits, int64_t stride) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (t < targets.count && is_stored[t]) store(dlogits + targets.row(t) * stride + targets.ids[t], values[t]);
}

// A block has a tile of a row of dlogits [R, V], which may be the logits.
template <typename T, typename G, typename acc>
__global__ __launch_bounds__(THREADS, GRADIENT_BLOCKS_EACH<acc>) void dlogits_kernel(Logits<T> logits, Targets targets, LogitScale<acc> scale,
                                                          const RowGradient<acc>* gradients, int64_t tiles, G* dlogits,
                                                          int64_t stride) {
  const int64_t row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const Range range = logits.range(row);
  const RowGradient<acc> gradient = gradients[row];  // read once: for all nvcc knows, dlogits are in the same memory
  // Tokens that say which row is theirs are not looked at here.
  const bool own = !targets.rows && row < targets.count;
  write_gradient(logits.row(row), range, logits.columns.vocab, scale, gradient,
                 own ? targets.id_in(row, range) : NO_TARGET, tile, PACKS_OF_TILE, dlogits + row * stride);
}

// The lists of a row_index, if there is one. Memory that nothing is read of before it is written is not cleared.
struct ListMemory {
  ListMemory(const Tensor& token_ids, int64_t rows, int64_t tokens)
      : newest(torch::stable::new_zeros(token_ids, {rows})), first(torch::stable::new_zeros(token_ids, {rows})),
        before(make_empty(token_ids, {tokens})), next(make_empty(token_ids, {tokens})) {}
  TokenLists lists() {
    return {reinterpret_cast<unsigned long long*>(newest.mutable_data_ptr<int64_t>()),
            before.mutable_data_ptr<int64_t>(), first.mutable_data_ptr<int64_t>(), next.mutable_data_ptr<int64_t>()};
  }
  Tensor newest, first, before, next;
};

// Checked and contiguous.
struct BackwardInputs {
  Tensor dlogprobs, lse;
  optional<Tensor> dentropy, entropy;

  BackwardInputs(const Tensor& dlogprobs_, const optional<Tensor>& dentropy_, const Tensor& lse_,
                 const optional<Tensor>& entropy_, int64_t tokens, int64_t rows)
      : dlogprobs(dense(dlogprobs_)), lse(dense(lse_)) {
    check_size(dlogprobs, 0, tokens, "dlogprobs");
    check_size(lse, 0, rows, "lse");
    LVRPO_CHECK(!dentropy_ || entropy_, "dentropy needs entropy");
    if (!dentropy_) return;
    check_size(*dentropy_, 0, rows, "dentropy");
    check_size(*entropy_, 0, rows, "entropy");
    dentropy = dense(*dentropy_);
    entropy = dense(*entropy_);
  }
};

void gather_logprobs_bwd(Tensor dlogits, Tensor dlogprobs, optional<Tensor> dentropy, Tensor logits, Tensor token_ids,
                         optional<Tensor> row_index, optional<Tensor> vocab_range, Tensor lse,
                         optional<Tensor> entropy, Tensor numbers) {
  const SoftmaxNumbers given(numbers);
  LVRPO_CHECK(logits.dim() == 2 && dlogits.dim() == 2, "logits and dlogits must be [R, V]");
  check_memory(dlogits, logits);
  if (!has_unit_columns(logits)) logits = dense(logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const Columns columns = columns_of(vocab_range, rows, vocab);
  const TargetTensors given_targets(token_ids, row_index, rows, given.ignore_index);
  const Targets& targets = given_targets.targets;
  const BackwardInputs inputs(dlogprobs, dentropy, lse, entropy, targets.count, rows);
  const int64_t count = targets.count, listed = row_index ? count : 0;
  ListMemory list_memory(token_ids, row_index ? rows : 0, listed);
  const TokenLists lists = row_index ? list_memory.lists() : TokenLists{};

  const OnDeviceOf device(logits);
  const Launch by_token{(listed + THREADS - 1) / THREADS, THREADS};
  launch(device, by_token, link_kernel, targets, columns, lists);
  launch(device, by_token, order_kernel, targets, columns, lists);
  LVRPO_DISPATCH_FLOATING(logits.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const LogitScale<acc> scale(given.temperature, given.softcap);
    const Logits<scalar_t> x{logits.const_data_ptr<scalar_t>(), logits.stride(0), columns};
    const Upstream<acc> from{inputs.dlogprobs.const_data_ptr<acc>(), data_or_null<acc>(inputs.dentropy),
                             inputs.lse.const_data_ptr<acc>(), data_or_null<acc>(inputs.entropy)};
    constexpr int64_t size = sizeof(RowGradient<acc>) / sizeof(acc);
    Tensor row_memory = make_empty(inputs.lse, {rows * size});
    Tensor values = make_empty(inputs.lse, {listed});
    Tensor is_stored = make_empty(inputs.lse, {listed}, ScalarType::Bool);
    auto* gradients = reinterpret_cast<RowGradient<acc>*>(row_memory.mutable_data_ptr<acc>());
    launch(device, {rows, THREADS, SHARED_SUMS<acc>}, rows_kernel<scalar_t, acc>, x, targets,
           lists, scale, from, gradients);
    launch(device, by_token, targets_kernel<scalar_t, acc>, x, targets, lists, scale, from.dlogprobs, gradients,
           values.mutable_data_ptr<acc>(), is_stored.mutable_data_ptr<bool>());
    LVRPO_DISPATCH_FLOATING(dlogits.scalar_type(), grad_t, [&] {
      const int64_t tiles = tiles_of<scalar_t, grad_t>(vocab, PACKS_OF_TILE);
      grad_t* dx = dlogits.mutable_data_ptr<grad_t>();
      launch(device, {rows * tiles, THREADS}, dlogits_kernel<scalar_t, grad_t, acc>, x, targets, scale, gradients,
             tiles, dx, dlogits.stride(0));
      launch(device, by_token, store_targets_kernel<grad_t, acc>, targets, values.const_data_ptr<acc>(),
             is_stored.const_data_ptr<bool>(), dx, dlogits.stride(0));
    });
  });
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) {
  m.impl("gather_logprobs_fwd", TORCH_BOX(&lvrpo::gather_logprobs_fwd));
  m.impl("gather_logprobs_bwd", TORCH_BOX(&lvrpo::gather_logprobs_bwd));
}
