// The policy loss from logits with its gradient, for ratios per token: a row is read from memory once.
// Formulas: docs/ops/logits_grpo_loss.md.
//
// The blocks of a cluster share a row, each keeps its slice of the columns in shared memory, and all see each other's
// sums. So they know the token's log-prob, the slope of its term follows, and the gradient is written from what is on
// the chip. A row that is too long for that is read again, as far as possible from the L2.

#include <optional>
#include <tuple>
#include <utility>

#include "common/grpo_loss_call.h"
#include "common/tensors.h"
#include "cuda/softmax_rows.cuh"

namespace lvrpo {
namespace {

using std::optional;

// Bytes of a row that a block is meant to keep: several blocks fit a multiprocessor, so that some read while others
// write.
constexpr int64_t SLICE_BYTES = 40 << 10;
// The most it may keep, board and all, on every architecture; and blocks of a cluster that every one with clusters can
// form.
constexpr int64_t MOST_BYTES = 96 << 10;
constexpr int MOST_BLOCKS = 8;

// Shared memory of a block, in front of its slice of the row.
template <typename acc>
struct alignas(16) Board {
  SoftmaxSums<acc> scratch[THREADS / WARP];
  SoftmaxSums<acc> sums;  // of the slice, for the other blocks
  RowGradient<acc> gradient;
};

// How blocks share a row: by its length alone, as the order of its sums does.
struct RowPlan {
  int blocks;
  int64_t slice;  // columns of each, a multiple of a pack
  bool resident;
};

template <typename T>
RowPlan plan_of(int64_t vocab, int capability) {
  constexpr int64_t size = Pack<T>::SIZE;
  const int most = capability >= 90 ? MOST_BLOCKS : 1;
  int blocks = 1;
  while (blocks < most && vocab * static_cast<int64_t>(sizeof(T)) > blocks * SLICE_BYTES) blocks *= 2;
  const int64_t slice = ((vocab + blocks - 1) / blocks + size - 1) / size * size;
  const int64_t bytes = sizeof(Board<acc_t<T>>) + slice * sizeof(T);
  return {blocks, slice, bytes <= MOST_BYTES};
}

// What the loss takes of a token besides its log-prob.
template <typename acc>
struct Terms {
  Tokens<acc> in;
  const acc* factors;  // [R], what the aggregation multiplies a token's term by
  Loss<acc> loss;
};

template <typename acc, int64_t... kind>
__device__ acc policy_slope(const Loss<acc>& loss, const Token<acc>& token, acc weight, bool past,
                            std::integer_sequence<int64_t, kind...>) {
  if (loss.ratio == Ratio::none) return policy_part<ScoreTerm>(loss.policy, token, weight, true, past).slope;
  acc slope = 0;
  ((loss.surrogate == Surrogate{kind}
        ? void(slope = policy_part<SurrogateTerm<Surrogate{kind}>>(loss.policy, token, weight, true, past).slope)
        : void()),
   ...);
  return slope;
}

template <typename acc, int64_t... kind>
__device__ acc kl_slope(const Loss<acc>& loss, acc d, acc log_ratio, std::integer_sequence<int64_t, kind...>) {
  acc slope = 0;
  ((loss.kl == KL{kind} ? void(slope = kl_part<KL{kind}, false>(loss.kl_form, d, log_ratio).slope) : void()), ...);
  return slope;
}

// The derivative of a token's term by its log-prob, before the aggregation.
template <typename acc>
__device__ acc slope_of(const Terms<acc>& terms, int64_t t, acc logp) {
  const Loss<acc>& loss = terms.loss;
  const acc log_ratio = terms.in.old ? logp - terms.in.old[t] : acc(0), limit = loss.log_ratio_limit;
  const Token<acc> token{logp, log_ratio, exp_ratio(saturate(log_ratio, limit)), acc(1), terms.in.advantage[t]};
  const acc weight = terms.in.weight ? terms.in.weight[t] : acc(1);
  acc slope = policy_slope(loss, token, weight, is_saturated(log_ratio, limit), all_of<Surrogate>{});
  // Without a coefficient the reference is for the metric alone, and may overflow.
  if (terms.in.ref && loss.beta != acc(0))
    slope += loss.beta * kl_slope(loss, terms.in.ref[t] - logp, log_ratio, all_of<KL>{});
  return slope;
}

// What of a row's statistics goes to memory; 0 for a masked token.
template <typename acc>
struct RowOutputs {
  acc *logprobs, *lse, *entropy;  // [R]
  __device__ __forceinline__ void write(int64_t row, acc logprob, acc log_sum_exp, acc row_entropy) const {
    logprobs[row] = logprob, lse[row] = log_sum_exp, entropy[row] = row_entropy;
  }
};

// The gradient of a row by the sums of all its columns.
template <typename T, typename acc>
__device__ RowGradient<acc> gradient_of(const SoftmaxSums<acc>& sums, int64_t row, acc y, const LogitScale<acc>& scale,
                                        const Terms<acc>& terms, bool writes, const RowOutputs<acc>& out) {
  const acc log_sum = log(sums.e), entropy = sums.entropy(log_sum), lse = sums.lse(log_sum, scale.inv_temperature);
  const acc logp = token_logprob(y, sums.reference, log_sum, scale.inv_temperature), factor = terms.factors[row];
  if (writes) out.write(row, logp, lse, entropy);
  // By the logits less the reference, which keeps their digits; nothing of a token whose inputs are no numbers, nor of
  // a row without a finite log-sum-exp.
  RowGradient<acc> gradient{log_sum, entropy, acc(0), acc(0), sums.reference};
  if (factor == acc(0) || logp - logp != acc(0) || lse - lse != acc(0)) return gradient;
  gradient.dlogprob = factor * slope_of(terms, row, logp);
  gradient.dentropy = -terms.loss.entropy_coef * factor;
  return gradient;
}

// A cluster per row, of which dlogits [R, V] may take the place.
template <bool RESIDENT, typename T, typename G, typename acc>
__global__ __launch_bounds__(THREADS, GRADIENT_BLOCKS_EACH<acc>) void row_kernel(
    Logits<T> logits, Targets targets, LogitScale<acc> scale, Terms<acc> terms, int blocks, int64_t slice, G* dlogits,
    int64_t stride, RowOutputs<acc> out) {
  const int64_t row = blockIdx.x / blocks, rank = blockIdx.x % blocks, vocab = logits.columns.vocab;
  const int64_t begin = rank * slice < vocab ? rank * slice : vocab;
  const int64_t end = begin + slice < vocab ? begin + slice : vocab;
  const Range range = logits.range(row);
  const int64_t id = terms.in.mask[row] ? targets.id_in(row, range) : NO_TARGET;
  const Range mine{range.low > begin ? range.low : begin, range.high < end ? range.high : end};
  const T* x = logits.row(row);
  Board<acc>& board = *shared_memory<Board<acc>>();
  T* kept = reinterpret_cast<T*>(&board + 1);
  RowGradient<acc> gradient{};
  if (id == NO_TARGET) {  // a masked row may hold anything, and is not read
    if (threadIdx.x == 0 && rank == 0) out.write(row, acc(0), acc(0), acc(0));
  } else {
    const auto keep = [&](int64_t column, const Pack<T>& pack) {
      if (RESIDENT && column < end) pack.write(kept + (column - begin));
    };
    SoftmaxSums<acc> sums = add_threads(row_sums<WITH_ENTROPY>(x, mine, scale, 0, 1, begin, keep), scale);
    if (threadIdx.x == 0) board.sums = sums;
    sync_cluster();
    if (threadIdx.x == 0) {
      sums = SoftmaxSums<acc>{};
      for (int other = 0; other < blocks; ++other)
        add_sums(sums, *shared_memory_of(&board.sums, other), scale.inv_temperature);
      const acc y = scale.cap(load(x + id));
      board.gradient = gradient_of<T>(sums, row, y, scale, terms, rank == 0, out);
    }
    // Before it no logit is overwritten, and after it no block reads what another has.
    sync_cluster();
    gradient = board.gradient;
  }
  const T* from = RESIDENT ? kept : x + begin;
  const int64_t own_id = id >= begin && id < end ? id - begin : NO_TARGET;
  write_gradient(from, Range{mine.low - begin, mine.high - begin}, end - begin, scale, gradient, own_id, 0, slice,
                 dlogits + row * stride + begin);
}

template <typename T, typename G, typename acc>
void run(const OnDeviceOf& device, const Logits<T>& logits, const Targets& targets, const LogitScale<acc>& scale,
         const Terms<acc>& terms, Tensor& dlogits, const RowOutputs<acc>& out) {
  const RowPlan plan = plan_of<T>(logits.columns.vocab, device.capability());
  constexpr int64_t board = sizeof(Board<acc>);
  // Where a row is read again its block shares its multiprocessor with few others or none, so that the L2 holds the
  // rows under way.
  const int64_t shared = plan.resident ? board + plan.slice * static_cast<int64_t>(sizeof(T)) : MOST_BYTES;
  launch(device, {targets.row_count * plan.blocks, THREADS, shared, plan.blocks},
         plan.resident ? row_kernel<true, T, G, acc> : row_kernel<false, T, G, acc>, logits, targets, scale, terms,
         plan.blocks, plan.slice, dlogits.mutable_data_ptr<G>(), dlogits.stride(0), out);
}

std::tuple<Tensor, Tensor, Tensor> logits_grpo_loss_rows(
    Tensor dlogits, Tensor logits, Tensor token_ids, optional<Tensor> vocab_range, optional<Tensor> old_logprobs,
    Tensor advantages, Tensor cu_seqlens, optional<Tensor> ref_logprobs, Tensor mask, optional<Tensor> policy_weights,
    Tensor factors, Tensor softmax_numbers, Tensor loss_numbers, int64_t ratio, int64_t surrogate, int64_t kl,
    int64_t kl_factor, int64_t kl_gradient) {
  const SoftmaxNumbers given(softmax_numbers);
  LVRPO_CHECK(logits.dim() == 2 && dlogits.dim() == 2, "logits and dlogits must be [R, V]");
  check_memory(dlogits, logits);
  if (!has_unit_columns(logits)) logits = dense(logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const Columns columns = columns_of(vocab_range, rows, vocab);
  const TargetTensors given_targets(token_ids, std::nullopt, rows, given.ignore_index);
  check_size(token_ids, 0, rows, "token_ids");
  check_size(factors, 0, rows, "factors");
  // With the factors in the place of the log-probs, which have the same shape and dtype.
  GrpoLossCall call{factors,      old_logprobs,   advantages,   cu_seqlens, ref_logprobs, std::nullopt,
                    mask,         policy_weights, loss_numbers, true,       false,        ratio,
                    surrogate,    kl,             kl_factor,    kl_gradient, 0};
  call.prepare();
  const ScalarType dtype = logits.scalar_type();
  const auto empty = [&] { return make_empty(call.logprobs, {rows}); };
  Tensor logprobs = empty(), lse = empty(), entropy = empty();

  const OnDeviceOf device(logits);
  LVRPO_DISPATCH_FLOATING(dtype, scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    // As the loss has no scale yet, fp16 could not hold its gradient.
    using grad_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;
    const Loss<acc> loss = call.template loss<acc>();
    LVRPO_CHECK(!loss.of_sequence() && !loss.shares_kl(),
                "a ratio per sequence needs the log-probs of all its rows");
    const LogitScale<acc> scale(given.temperature, given.softcap);
    const Logits<scalar_t> x{logits.const_data_ptr<scalar_t>(), logits.stride(0), columns};
    const Terms<acc> terms{call.template inputs<acc>(), call.logprobs.template const_data_ptr<acc>(), loss};
    const RowOutputs<acc> out{logprobs.mutable_data_ptr<acc>(), lse.mutable_data_ptr<acc>(),
                              entropy.mutable_data_ptr<acc>()};
    run<scalar_t, grad_t, acc>(device, x, given_targets.targets, scale, terms, dlogits, out);
  });
  return {logprobs, lse, entropy};
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) { m.impl("logits_grpo_loss_rows", TORCH_BOX(&lvrpo::logits_grpo_loss_rows)); }
