// Policy loss, its metrics and its gradient over packed tokens. Formulas: docs/ops/grpo_loss.md.
//
// A warp takes a slice of a sequence, so that a long one is no block's serial work. First it counts what is active and
// adds up log-ratios, of which the factor and the ratio of the sequence are made; then it forms terms and gradients;
// then the sums of the slices are added, sequence by sequence. Where a sequence is cut depends on its length alone, and
// the order of all sums on that and on the numbers of tokens and sequences. Few tokens take one launch of one cluster,
// which waits between the steps; more take a launch per step.
//
// Offsets are not trusted: they are read as bounds inside [0, T] that do not decrease, and tokens outside of every
// sequence belong to two more, one in front and one behind, in which nothing is active.

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/grpo_loss_call.h"
#include "common/tensors.h"
#include "cuda/token_terms.cuh"

namespace lvrpo {
namespace {

using namespace grpo;
using std::optional;

constexpr int THREADS = 256;  // two blocks of 128 registers a thread on an SM
// A block of the one launch: enough warps to hide what they wait for, few enough to leave them 128 registers each.
constexpr int WHOLE_THREADS = 512;
constexpr int WHOLE_CLUSTER = 8;  // the most that every device with clusters can form
// Slices that a warp of the one launch takes: with more, the launches that are saved cost less than the idle SMs.
constexpr int WHOLE_SLICES = 2;
// Sequences that a group of lanes adds up before another block is worth its launch.
constexpr int64_t SEQUENCES_PER_GROUP = 8;

// What one slice counts, and the sums that the slopes of a whole sequence need: see Sums; `kl` is of estimators without
// their factor.
struct Counted {
  double tokens, log_ratios, weights, free_log_ratios, kl;
};

// What consecutive slices count: active tokens, sequences that have some, and the first and the last of those.
struct Tally {
  int64_t tokens, sequences, first, last;
};

// What consecutive sequences add to the result, but for the outer factor.
struct Total {
  Statistics statistics;
  double loss;
};

template <typename acc>
struct Work {
  Tokens<acc> in;
  Loss<acc> loss;
  Aggregate aggregate;
  Numbers numbers;
  const int64_t* cu_seqlens;  // [B + 1]
  int64_t tokens, sequences, slots;
  bool counts;  // whether anything is asked of `counted` or `tallies`

  Counted* counted;       // [slots]
  Sums* sums;             // [slots]
  Tally* tallies;         // [slots] of one launch, else [blocks of count_kernel]
  int64_t* first_slot;    // [B + 2], see Slice
  Total* totals;          // [blocks of reduce_kernel]
  acc *dlogp, *dentropy;  // [T]; dentropy may be of length 0
  acc* loss_out;          // []
  Statistics* statistics;
};

template <typename acc>
__device__ __forceinline__ acc advantage_of(const Work<acc>& work, const Slice& slice) {
  return work.in.advantage_per_token ? acc(0) : work.in.advantage[slice.number - 1];
}

// ---- First step: counts ----

struct AddCounted {
  __device__ __forceinline__ Counted operator()(const Counted& a, const Counted& b) const {
    return {a.tokens + b.tokens, a.log_ratios + b.log_ratios, a.weights + b.weights,
            a.free_log_ratios + b.free_log_ratios, a.kl + b.kl};
  }
};

__device__ __forceinline__ Tally joined(const Tally& a, const Tally& b) {
  if (a.sequences == 0) return b;
  if (b.sequences == 0) return a;
  return {a.tokens + b.tokens, a.sequences + b.sequences - (a.last == b.first), a.first, b.last};
}

// The sum of the estimators of the tokens of a lane.
template <KL kind, typename acc>
__device__ __forceinline__ double kl_values(const KLForm<acc>& form, const Loaded<acc>& x) {
  double total = 0;
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    acc value, slope;
    formed_kl<kind>(form, x.active[i] ? x.ref[i] - x.logp[i] : acc(0), value, slope);
    total += static_cast<double>(value);
  }
  return total;
}

template <typename acc, int64_t... kind>
__device__ __forceinline__ double any_kl_values(const Loss<acc>& loss, const Loaded<acc>& x,
                                                std::integer_sequence<int64_t, kind...>) {
  double total = 0;
  ((loss.kl == KL{kind} ? void(total = kl_values<KL{kind}>(loss.kl_form, x)) : void()), ...);
  return total;
}

template <typename acc>
__device__ __forceinline__ Tally count_slice(const Work<acc>& work, int64_t slot) {
  const Slice slice = slice_of(work.cu_seqlens, work.sequences, work.tokens, slot);
  Counted sums{0, 0, 0, 0, 0};
  if (slice.holds_tokens(work.sequences)) {
    const acc advantage = advantage_of(work, slice);
    const Limits limits = limits_of(work.loss, advantage);
    Loaded<acc> x;
    int tokens = 0;
    for (int64_t first = slice.begin + lane(); first < slice.end; first += STEP<acc>) {
      load_tokens(work.in, advantage, first, slice.end, x);
#pragma unroll
      for (int i = 0; i < AT_ONCE<acc>; ++i) {
        const double d = work.in.old ? static_cast<double>(x.logp[i] - x.old[i]) : 0.0;
        tokens += x.active[i];
        sums.log_ratios += x.active[i] ? clamp(d, limits.low, limits.high) : 0.0;
        sums.free_log_ratios += x.active[i] ? d : 0.0;
        sums.weights += x.active[i] ? static_cast<double>(x.weight[i]) : 0.0;
      }
      if (work.in.ref && work.loss.shares_kl()) sums.kl += any_kl_values(work.loss, x, all_of<KL>{});
    }
    sums.tokens = tokens;
    sums = over_warp(sums, AddCounted{});
  }
  if (lane() == 0) work.counted[slot] = sums;
  return {static_cast<int64_t>(sums.tokens), sums.tokens > 0, slice.number, slice.number};
}

// Active tokens of all slices, and sequences that have some: in every thread of the block.
struct Active {
  int64_t tokens, sequences;
};

struct AddActive {
  __device__ __forceinline__ Active operator()(const Active& a, const Active& b) const {
    return {a.tokens + b.tokens, a.sequences + b.sequences};
  }
};

__device__ __forceinline__ Active active_of(const Tally* tallies, int64_t count) {
  Active sum{0, 0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const Tally tally = tallies[i];
    if (tally.sequences == 0) continue;
    int64_t before = i - 1;
    while (before >= 0 && tallies[before].sequences == 0) --before;
    const bool goes_on = before >= 0 && tallies[before].last == tally.first;
    sum = AddActive{}(sum, {tally.tokens, tally.sequences - goes_on});
  }
  return over_block(sum, AddActive{}, shared_memory<Active>());
}

// ---- Second step: terms and gradients ----

// The derivative of a sequence's surrogate by the mean or sum of its log-ratios, a token's share of it, where tokens
// differ in their weights alone.
template <typename Of, typename acc>
__device__ __forceinline__ acc shared_slope(const Loss<acc>& loss, const Shared<acc>& of, const Counted& sequence) {
  const Token<acc> token{acc(0), acc(0), of.whole.ratio, of.whole.weight, of.advantage};
  const acc slope = policy_part<Of>(loss.policy, token, acc(1), true, of.whole.saturated).slope;
  const double n = loss.ratio == Ratio::seq_mean ? sequence.tokens : 1.0;
  const double each = static_cast<double>(slope) * sequence.weights / n;
  return sequence.weights > 0 ? static_cast<acc>(each) * of.factor : acc(0);
}

template <typename acc>
__device__ __forceinline__ Shared<acc> shared_of(const Work<acc>& work, const Slice& slice, double outer) {
  const Loss<acc>& loss = work.loss;
  Counted sequence{0, 0, 0, 0, 0};
  if (work.counts) {
    for (int64_t i = lane(); i < slice.slices; i += WARP)
      sequence = AddCounted{}(sequence, work.counted[slice.first_slot + i]);
    sequence = over_warp(sequence, AddCounted{});
  }
  Shared<acc> of;
  of.advantage = advantage_of(work, slice);
  of.factor = static_cast<acc>(1.0 / (outer * work.aggregate.inner(sequence.tokens)));
  of.whole = of_sequence(loss, sequence.tokens, sequence.log_ratios, of.advantage);
  of.slope = acc(0);
  if (loss.shares_slope()) {
    if (loss.surrogate == Surrogate::clip) of.slope = shared_slope<SurrogateTerm<Surrogate::clip>>(loss, of, sequence);
    if (loss.surrogate == Surrogate::sigmoid)
      of.slope = shared_slope<SurrogateTerm<Surrogate::sigmoid>>(loss, of, sequence);
    if (loss.surrogate == Surrogate::log_clip)
      of.slope = shared_slope<SurrogateTerm<Surrogate::log_clip>>(loss, of, sequence);
  }
  const Limits limits = limits_of(loss, of.advantage);
  of.low = static_cast<acc>(limits.low), of.high = static_cast<acc>(limits.high);
  const KLOfSequence<acc> kl = kl_of_sequence(loss, sequence.tokens, sequence.free_log_ratios);
  const acc kl_term = exp_ratio(saturate(kl.log_ratio, loss.log_ratio_limit)) * static_cast<acc>(sequence.kl);
  of.kl_log_ratio = kl.log_ratio;
  of.kl_slope = kl.share != acc(0) ? kl.share * loss.beta * kl_term * of.factor : acc(0);
  return of;
}

template <typename acc>
__device__ __forceinline__ void add_tokens(const Work<acc>& work, const Shared<acc>& of, int64_t first, int64_t end,
                                           LaneSums<acc>& sums) {
  const Loss<acc>& loss = work.loss;
  const bool own_ratio = loss.own_ratio();
  // Statistics have a limit whether or not the loss has one.
  const acc most = static_cast<acc>(LOG_RATIO_LIMIT);
  const acc limit = loss.log_ratio_limit < most ? loss.log_ratio_limit : most;
  const bool reuse = own_ratio && loss.log_ratio_limit <= most;
  Tile<acc> tile;
  load_tokens(work.in, of.advantage, first, end, tile.x);
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    const bool on = tile.x.active[i];
    tile.log_ratio[i] = on ? tile.x.logp[i] - tile.x.old[i] : acc(0);
    tile.x.logp[i] = on ? tile.x.logp[i] : acc(0);
    tile.ratio[i] = own_ratio ? exp_ratio(saturate(tile.log_ratio[i], loss.log_ratio_limit)) : of.whole.ratio;
    sums.asked += tile.x.asked[i], sums.tokens += on;
    sums.entropy += on && work.in.entropy ? static_cast<double>(tile.x.entropy[i]) : 0.0;
    if (work.in.old == nullptr) continue;
    const acc d = saturate(tile.log_ratio[i], limit);
    sums.kl_old += static_cast<double>(exp_excess(d, reuse ? tile.ratio[i] : exp_ratio(d)));
  }
  add_any_policy(loss, of, tile, sums, all_of<Surrogate>{});
  if (loss.shares_slope()) {
#pragma unroll
    for (int i = 0; i < AT_ONCE<acc>; ++i) tile.slope[i] = acc(0);
  }
  if (work.in.ref && loss.kl_form.plain()) add_any_kl<true>(loss, of.kl_log_ratio, tile, sums, all_of<KL>{});
  if (work.in.ref && !loss.kl_form.plain()) add_any_kl<false>(loss, of.kl_log_ratio, tile, sums, all_of<KL>{});
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    const int64_t t = first + i * WARP;
    if (t >= end) continue;
    const bool on = tile.x.active[i], held = tile.log_ratio[i] < of.low || tile.log_ratio[i] > of.high;
    work.dlogp[t] = on ? of.factor * tile.slope[i] + of.kl_slope + (held ? acc(0) : of.slope) : acc(0);
    if (work.in.entropy) work.dentropy[t] = on ? -loss.entropy_coef * of.factor : acc(0);
  }
}

template <typename acc>
__device__ __forceinline__ void slice_terms(const Work<acc>& work, int64_t slot, double outer) {
  const Slice slice = slice_of(work.cu_seqlens, work.sequences, work.tokens, slot);
  LaneSums<acc> sums;
  if (slice.holds_tokens(work.sequences)) {
    const Shared<acc> of = shared_of(work, slice, outer);
    for (int64_t first = slice.begin + lane(); first < slice.end; first += STEP<acc>)
      add_tokens(work, of, first, slice.end, sums);
  } else {
    for (int64_t t = slice.begin + lane(); t < slice.end; t += WARP) {
      work.dlogp[t] = acc(0);
      if (work.in.entropy) work.dentropy[t] = acc(0);
    }
  }
  const Sums all = over_warp(sums.sums(), AddSums{});
  if (lane() != 0) return;
  work.sums[slot] = all;
  if (slot == slice.first_slot) work.first_slot[slice.number] = slot;
}

template <typename acc>
__device__ __forceinline__ double outer_of(const Work<acc>& work, int64_t tallies) {
  Active active{0, 0};
  if (work.aggregate.counts_active()) active = active_of(work.tallies, tallies);
  return work.aggregate.outer(static_cast<double>(active.tokens), static_cast<double>(work.sequences),
                              static_cast<double>(active.sequences));
}

// ---- Third step: sequences ----

struct AddTotals {
  __device__ __forceinline__ Total operator()(Total a, const Total& b) const {
    Statistics& x = a.statistics;
    const Statistics& y = b.statistics;
    x.policy_loss += y.policy_loss, x.kl += y.kl, x.entropy += y.entropy, x.kl_old += y.kl_old;
    x.clip_fraction_low += y.clip_fraction_low, x.clip_fraction_high += y.clip_fraction_high;
    x.clip_fraction_cap += y.clip_fraction_cap;
    x.ratio += y.ratio, x.ratio_squared += y.ratio_squared, x.ratios += y.ratios;
    x.active_tokens += y.active_tokens, x.active_sequences += y.active_sequences;
    x.dropped_tokens += y.dropped_tokens;
    raise_to(x.ratio_min, y.ratio_min), raise_to(x.ratio_max, y.ratio_max);
    raise_to(x.clip_fraction_low_min, y.clip_fraction_low_min);
    raise_to(x.clip_fraction_high_max, y.clip_fraction_high_max), raise_to(x.kl_old_max, y.kl_old_max);
    a.loss += b.loss;
    return a;
  }
};

// Sequences `first` to `last` - 1, a group of lanes for each; in every thread of the block.
template <typename acc>
__device__ __forceinline__ Total total_of(const Work<acc>& work, int group, int64_t first, int64_t last) {
  Total total{no_statistics(), 0};
  const int rank = threadIdx.x % group, groups = blockDim.x / group;
  for (int64_t base = first; base < last; base += groups) {
    const int64_t sequence = base + threadIdx.x / group;
    Sums sums;
    if (sequence < last) {
      const int64_t end = work.first_slot[sequence + 2];
      for (int64_t slot = work.first_slot[sequence + 1] + rank; slot < end; slot += group)
        sums = AddSums{}(sums, work.sums[slot]);
    }
    sums = over_warp(sums, AddSums{}, 1, group);
    if (rank != 0 || sequence >= last) continue;
    if (work.loss.one_ratio() && sums.tokens > 0) sums.count_once();
    add_sequence(total.statistics, sums, work.loss.one_ratio());
    const double inner = work.aggregate.inner(sums.tokens);
    total.statistics.policy_loss += sums.policy / inner;
    total.loss += loss_of(sums, work.numbers.beta, work.numbers.entropy_coef) / inner;
  }
  return over_block(total, AddTotals{}, shared_memory<Total>());
}

template <typename acc>
__device__ __forceinline__ void store_result(const Work<acc>& work, Total total) {
  const Statistics& found = total.statistics;
  const double sequences = static_cast<double>(work.sequences);
  const double outer = work.aggregate.outer(found.active_tokens, sequences, found.active_sequences);
  total.statistics.policy_loss /= outer;
  *work.loss_out = static_cast<acc>(total.loss / outer);
  *work.statistics = total.statistics;
}

// Lanes that share a sequence: as many as it has slices on average.
int group_of(int64_t slots, int64_t sequences) {
  int group = 1;
  while (group < WARP && group * sequences < slots) group *= 2;
  return group;
}

// ---- Kernels ----

template <typename acc>
__global__ __launch_bounds__(THREADS) void count_kernel(Work<acc> work) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + warp();
  Tally* of_warps = shared_memory<Tally>();
  const Tally tally = slot < work.slots ? count_slice(work, slot) : Tally{0, 0, 0, 0};
  if (lane() == 0) of_warps[warp()] = tally;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Tally all = of_warps[0];
  for (int i = 1; i < THREADS / WARP; ++i) all = joined(all, of_warps[i]);
  work.tallies[blockIdx.x] = all;
}

template <typename acc>
__global__ __launch_bounds__(THREADS) void terms_kernel(Work<acc> work, int64_t tallies) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + warp();
  const double outer = outer_of(work, tallies);
  if (slot < work.slots) slice_terms(work, slot, outer);
}

// A block for `share` sequences; one that has all of them is done.
template <typename acc>
__global__ __launch_bounds__(WHOLE_THREADS) void reduce_kernel(Work<acc> work, int group, int64_t share) {
  const int64_t first = blockIdx.x * share, last = first + share < work.sequences ? first + share : work.sequences;
  const Total total = total_of(work, group, first, last);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    store_result(work, total);
  } else {
    work.totals[blockIdx.x] = total;
  }
}

template <typename acc>
__global__ __launch_bounds__(THREADS) void finish_kernel(Work<acc> work, int64_t count) {
  Total total{no_statistics(), 0};
  for (int64_t i = threadIdx.x; i < count; i += THREADS) total = AddTotals{}(total, work.totals[i]);
  total = over_block(total, AddTotals{}, shared_memory<Total>());
  if (threadIdx.x == 0) store_result(work, total);
}

// All steps; a cluster, and nothing else, is the grid.
template <typename acc>
__global__ __launch_bounds__(WHOLE_THREADS) void whole_kernel(Work<acc> work, int group) {
  const int64_t first = static_cast<int64_t>(rank_in_cluster()) * (WHOLE_THREADS / WARP) + warp();
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (WHOLE_THREADS / WARP);
  if (work.counts) {
    for (int64_t slot = first; slot < work.slots; slot += warps) {
      const Tally tally = count_slice(work, slot);
      if (lane() == 0) work.tallies[slot] = tally;
    }
    sync_cluster();
  }
  const double outer = outer_of(work, work.slots);
  for (int64_t slot = first; slot < work.slots; slot += warps) slice_terms(work, slot, outer);
  sync_cluster();
  if (rank_in_cluster() != 0) return;
  const Total total = total_of(work, group, 0, work.sequences);
  if (threadIdx.x == 0) store_result(work, total);
}

// ---- The op ----

// Memory of the steps in between, one allocation.
class Scratch {
 public:
  explicit Scratch(void* begin) : at_(static_cast<char*>(begin)) {}

  template <typename T>
  T* take(int64_t count) {
    static_assert(sizeof(T) % sizeof(double) == 0 && alignof(T) <= alignof(double));
    T* taken = reinterpret_cast<T*>(at_);
    at_ += count * sizeof(T);
    return taken;
  }
  int64_t doubles() const { return reinterpret_cast<int64_t>(at_) / static_cast<int64_t>(sizeof(double)); }

 private:
  char* at_;
};

// How a call is cut into launches.
struct Plan {
  int64_t slots, blocks, reducing, share;
  int group, cluster;  // a cluster of 0: a launch for each step

  Plan(int64_t tokens, int64_t sequences, int capability) {
    slots = slots_of(tokens, sequences);
    blocks = (slots + THREADS / WARP - 1) / (THREADS / WARP);
    group = group_of(slots, sequences);
    share = SEQUENCES_PER_GROUP * (WHOLE_THREADS / group);
    reducing = std::max<int64_t>(1, (sequences + share - 1) / share);
    const int64_t warps = WHOLE_THREADS / WARP, most = capability >= 90 ? WHOLE_CLUSTER : 1;
    cluster = 1;
    while (cluster < most && cluster * warps < slots) cluster *= 2;
    if (slots > cluster * warps * WHOLE_SLICES) cluster = 0;
  }
};

template <typename acc>
void point_into(Work<acc>& work, const Plan& plan, Scratch& scratch) {
  work.counted = scratch.take<Counted>(work.counts ? plan.slots : 0);
  work.tallies = scratch.take<Tally>(!work.counts ? 0 : plan.cluster ? plan.slots : plan.blocks);
  work.sums = scratch.take<Sums>(plan.slots);
  work.first_slot = scratch.take<int64_t>(work.sequences + 2);
  work.totals = scratch.take<Total>(plan.reducing > 1 ? plan.reducing : 0);
}

template <typename acc>
void run(const OnDeviceOf& device, const Work<acc>& work, const Plan& plan) {
  const auto shared = [](int threads, size_t bytes) { return static_cast<int64_t>(threads / WARP * bytes); };
  const int64_t of_totals = shared(WHOLE_THREADS, sizeof(Total));
  if (plan.cluster > 0) {
    launch(device, {plan.cluster, WHOLE_THREADS, of_totals, plan.cluster}, whole_kernel<acc>, work, plan.group);
    return;
  }
  if (work.counts)
    launch(device, {plan.blocks, THREADS, shared(THREADS, sizeof(Tally))}, count_kernel<acc>, work);
  launch(device, {plan.blocks, THREADS, shared(THREADS, sizeof(Active))}, terms_kernel<acc>, work, plan.blocks);
  launch(device, {plan.reducing, WHOLE_THREADS, of_totals}, reduce_kernel<acc>, work, plan.group, plan.share);
  if (plan.reducing > 1)
    launch(device, {1, THREADS, shared(THREADS, sizeof(Total))}, finish_kernel<acc>, work, plan.reducing);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_loss_fwd(
    Tensor logprobs, optional<Tensor> old_logprobs, Tensor advantages, Tensor cu_seqlens, optional<Tensor> ref_logprobs,
    optional<Tensor> entropy, optional<Tensor> mask, optional<Tensor> policy_weights, Tensor numbers,
    bool advantage_per_token, bool count_empty, int64_t ratio, int64_t surrogate, int64_t kl, int64_t kl_factor,
    int64_t kl_gradient, int64_t aggregation) {
  GrpoLossCall call{logprobs,  old_logprobs,   advantages, cu_seqlens,          ref_logprobs, entropy,
                    mask,      policy_weights, numbers,    advantage_per_token, count_empty,  ratio,
                    surrogate, kl,             kl_factor,  kl_gradient,         aggregation};
  call.prepare();
  const int64_t tokens = call.tokens(), sequences = call.sequences();
  const OnDeviceOf device(logprobs);
  const Plan plan(tokens, sequences, device.capability());
  Tensor loss = make_empty(logprobs, {});
  Tensor statistics = make_empty(logprobs, {COLUMNS_OF<Statistics>}, ScalarType::Double);
  Tensor dlogprobs = make_empty(logprobs, {tokens});
  Tensor dentropy = make_empty(logprobs, {entropy ? tokens : 0});
  LVRPO_DISPATCH_ACC(logprobs.scalar_type(), acc, [&] {
    Work<acc> work{};
    work.in = call.inputs<acc>();
    work.loss = call.loss<acc>();
    work.aggregate = call.aggregate();
    work.numbers = call.named();
    work.cu_seqlens = call.cu_seqlens.const_data_ptr<int64_t>();
    work.tokens = tokens, work.sequences = sequences, work.slots = plan.slots;
    work.counts = work.loss.sums_log_ratios() || work.aggregate.kind == Aggregation::seq_mean_token_mean ||
                  work.aggregate.counts_active();
    work.dlogp = dlogprobs.mutable_data_ptr<acc>(), work.dentropy = dentropy.mutable_data_ptr<acc>();
    work.loss_out = loss.mutable_data_ptr<acc>();
    work.statistics = reinterpret_cast<Statistics*>(statistics.mutable_data_ptr<double>());
    Scratch size(nullptr);
    point_into(work, plan, size);
    Tensor memory = make_empty(logprobs, {size.doubles()}, ScalarType::Double);
    Scratch scratch(memory.mutable_data_ptr<double>());
    point_into(work, plan, scratch);
    run<acc>(device, work, plan);
  });
  return {loss, statistics, dlogprobs, dentropy};
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) { m.impl("grpo_loss_fwd", TORCH_BOX(&lvrpo::grpo_loss_fwd)); }
