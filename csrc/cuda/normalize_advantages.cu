// Group-relative advantages of K rewards in one launch, all statistics in fp64. Formulas: docs/ops/normalize_advantages.md.
//
// A few lanes share a group, and a block takes a chunk of groups, whose samples it keeps in shared memory. What is needed
// of the whole batch every chunk leaves behind as sums; all blocks meet, and each adds up the sums of all chunks in the
// same order. How many lanes and chunks there are depends on the shape alone, so that the bits do not depend on the GPU.

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/tensors.h"
#include "cuda/advantage_chunks.cuh"

namespace lvrpo {
namespace {

using namespace advantages;
using std::optional;

// Bytes of what a block needs for every reward, beside; if it needs more, that is in global memory.
constexpr int64_t REWARD_BYTES = 24 << 10;
// Bytes that over_block has.
constexpr int64_t SCRATCH_BYTES = 256;

struct Moments {
  double count, mean, squares;
};

struct Together {
  __device__ __forceinline__ Moments operator()(const Moments& a, const Moments& b) const {
    const double count = a.count + b.count, share = count > 0 ? b.count / count : 0.0, step = b.mean - a.mean;
    return {count, a.mean + step * share, a.squares + b.squares + step * step * a.count * share};
  }
};

struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -low;
};

struct Widest {
  __device__ __forceinline__ Range operator()(const Range& a, const Range& b) const {
    return {std::min(a.low, b.low), std::max(a.high, b.high)};
  }
};

// Of the advantages: their squares, and how many are not 0.
struct Energy {
  double squares = 0, nonzero = 0;
  __device__ __forceinline__ Energy operator()(const Energy& a, const Energy& b) const {
    return {a.squares + b.squares, a.nonzero + b.nonzero};
  }
};

// Where the sums of a chunk stand, in doubles.
struct Layout {
  int64_t rewards;
  LVRPO_INLINE int64_t reward(int64_t k) const { return 3 * k; }              // Moments
  LVRPO_INLINE int64_t spread(int64_t k) const { return 3 * (rewards + k); }  // Moments of what divides the whole batch
  LVRPO_INLINE int64_t part(int64_t k) const { return 3 * (2 * rewards + k); }  // Moments
  LVRPO_INLINE int64_t share(int64_t k) const { return 9 * rewards + k; }
  LVRPO_INLINE int64_t constant(int64_t k) const { return 10 * rewards + k; }
  LVRPO_INLINE int64_t seen(int64_t k) const { return 11 * rewards + k; }
  LVRPO_INLINE int64_t value() const { return 12 * rewards; }       // Moments
  LVRPO_INLINE int64_t range() const { return 12 * rewards + 3; }   // Range
  LVRPO_INLINE int64_t energy() const { return 12 * rewards + 5; }  // Energy
  int64_t width() const { return 12 * rewards + 7; }
};

// A block's memory for every reward.
struct RewardMemory {
  double *spread, *mean;     // [K]
  unsigned *constant, *seen;  // [K], groups of the chunk
  Column* columns;           // [teams, K]

  static int64_t bytes(int64_t rewards, int64_t teams) {
    return rewards * static_cast<int64_t>(2 * sizeof(double) + 2 * sizeof(unsigned) + teams * sizeof(Column));
  }
  __device__ RewardMemory(void* memory, int64_t rewards)
      : spread(static_cast<double*>(memory)),
        mean(spread + rewards),
        constant(reinterpret_cast<unsigned*>(mean + rewards)),
        seen(constant + rewards),
        columns(reinterpret_cast<Column*>(seen + rewards)) {}
};

// The samples before the first group and after the last are in none.
template <typename scalar_t>
__device__ void clear_outside(const Call<scalar_t>& call) {
  const int64_t begin = start_of(call, 0), end = start_of(call, call.groups), threads = gridDim.x * int64_t(THREADS);
  LVRPO_ROLLED for (int64_t b = blockIdx.x * int64_t(THREADS) + threadIdx.x; b < call.batch; b += threads) {
    if (b >= begin && b < end) continue;
    call.values[b] = 0;
    LVRPO_ROLLED for (int64_t k = 0; k < call.rewards; ++k) call.per_reward[b * call.rewards + k] = 0;
  }
}

// ---- Sums over a chunk, and over all of them ----

template <typename scalar_t, typename T>
__device__ __forceinline__ void leave(const Call<scalar_t>& call, int64_t slot, int64_t chunk, const T& sum) {
  constexpr int FIELDS = sizeof(T) / sizeof(double);
  double fields[FIELDS];
  memcpy(fields, &sum, sizeof(T));
#pragma unroll
  for (int i = 0; i < FIELDS; ++i) call.sums[(slot + i) * call.cut.chunks + chunk] = fields[i];
}

template <typename T, typename scalar_t, typename Join>
__device__ T over_chunks(const Call<scalar_t>& call, int64_t slot, T total, const Join& join) {
  constexpr int FIELDS = sizeof(T) / sizeof(double);
  LVRPO_ROLLED for (int64_t chunk = threadIdx.x; chunk < call.cut.chunks; chunk += THREADS) {
    double fields[FIELDS];
#pragma unroll
    for (int i = 0; i < FIELDS; ++i) fields[i] = call.sums[(slot + i) * call.cut.chunks + chunk];
    T sum;
    memcpy(&sum, fields, sizeof(T));
    total = join(total, sum);
  }
  return over_block(total, join, shared_memory<T>());
}

// Leaves the moments of of(b) = {count, sum of so many} over the chunk; if they are `centred`, about 0.
template <typename scalar_t, typename Of>
__device__ void leave_moments(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, int64_t slot, bool centred,
                              const Of& of) {
  const Samples<scalar_t>& all = chunk.all;
  CountAndSum sum;
  LVRPO_ROLLED for (int64_t b = all.first(); b < all.size; b += all.step()) {
    const CountAndSum one = of(b);
    sum.add(one.count, one.count * one.sum);
  }
  sum = over_block(sum, Join{}, shared_memory<CountAndSum>());
  const double mean = centred || sum.count == 0 ? 0.0 : sum.sum / sum.count;
  double squares = 0;
  LVRPO_ROLLED for (int64_t b = all.first(); b < all.size; b += all.step()) {
    const CountAndSum one = of(b);
    squares += one.count * (one.sum - mean) * (one.sum - mean);
  }
  squares = over_block(squares, Add{}, shared_memory<double>());
  if (threadIdx.x == 0) leave(call, slot, chunk.index, Moments{sum.count, mean, squares});
}

// Leaves the moments of every reward over the samples it applies to.
template <typename scalar_t>
__device__ void leave_reward_moments(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk) {
  LVRPO_ROLLED for (int64_t k = 0; k < call.rewards; ++k)
    leave_moments(call, chunk, Layout{call.rewards}.reward(k), false,
                  [&](int64_t b) { return CountAndSum{chunk.all.counted(b, k), chunk.all.value(b, k)}; });
}

template <typename scalar_t>
__device__ __noinline__ Moments moments_of(const Call<scalar_t>& call, int64_t slot) {
  return over_chunks(call, slot, Moments{0, 0, 0}, Together{});
}

// ---- What is done with a chunk ----

// What batch_spread of the CPU needs of a chunk: the moments of every reward, and the fraction that is not 0.
template <typename scalar_t>
__device__ void measure_rewards(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk) {
  const Samples<scalar_t>& all = chunk.all;
  const bool decoupled = call.estimator.decoupled;
  leave_reward_moments(call, chunk);
  if (call.estimator.scale != Scale::nonzero) return;
  LVRPO_ROLLED for (int64_t k = 0; k < (decoupled ? call.rewards : 1); ++k)
    leave_moments(call, chunk, Layout{call.rewards}.spread(k), false, [&](int64_t b) {
      if (decoupled) return CountAndSum{all.counted(b, k), all.value(b, k) != 0 ? 1.0 : 0.0};
      return CountAndSum{all.scored(b) ? 1.0 : 0.0, has_sum(all, call.weights, b) ? 1.0 : 0.0};
    });
}

// The moments of the weighted sum of the rewards, by the means of the batch.
template <typename scalar_t>
__device__ void measure_sum(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, const RewardMemory& known) {
  for_groups(call, chunk, [&](const Samples<scalar_t>& group, int) {
    sum_filled(group, call.weights, [&](int64_t k) { return known.mean[k]; });
  });
  leave_moments(call, chunk, Layout{call.rewards}.spread(0), false, [&](int64_t b) {
    return CountAndSum{chunk.all.scored(b) ? 1.0 : 0.0, chunk.all.total(b)};
  });
}

// Fills the parts of a chunk, and leaves how many groups each reward applies to and is constant in.
template <typename scalar_t>
__device__ void fill_parts(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, const RewardMemory& known) {
  const Layout layout{call.rewards};
  LVRPO_ROLLED for (int64_t k = threadIdx.x; k < call.rewards; k += THREADS) known.constant[k] = known.seen[k] = 0;
  __syncthreads();
  for_groups(call, chunk, [&](const Samples<scalar_t>& group, int team) {
    group_parts(group, call.estimator, call.weights, known.spread, known.columns + team * call.rewards,
                [&](int64_t k, const Column& column) {
                  if (group.rank != 0 || column.count == 0) return;
                  atomicAdd(known.seen + k, 1u);
                  if (!column.varies()) atomicAdd(known.constant + k, 1u);
                });
  });
  LVRPO_ROLLED for (int64_t k = threadIdx.x; k < call.rewards; k += THREADS) {
    leave(call, layout.constant(k), chunk.index, static_cast<double>(known.constant[k]));
    leave(call, layout.seen(k), chunk.index, static_cast<double>(known.seen[k]));
  }
}

// Leaves what whitening has to know of a chunk's parts, and these where the block has no room to keep them.
template <typename scalar_t>
__device__ void measure(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, bool keep) {
  const Samples<scalar_t>& all = chunk.all;
  const Layout layout{call.rewards};
  const bool centred = call.estimator.sums_to_zero(), by_token = call.estimator.whiten == Whiten::token;
  const auto tokens = [&](int64_t b) { return !all.scored(b) ? 0.0 : by_token ? all.length(b) : 1.0; };
  Range range;
  LVRPO_ROLLED for (int64_t b = all.first(); b < all.size; b += all.step()) {
    double value = 0;
    LVRPO_ROLLED for (int64_t k = 0; k < call.rewards; ++k) value += all.part(b, k);
    all.total(b) = value;
    if (all.scored(b)) range = Widest{}(range, Range{value, value});
  }
  range = over_block(range, Widest{}, shared_memory<Range>());
  if (threadIdx.x == 0) leave(call, layout.range(), chunk.index, range);
  leave_moments(call, chunk, layout.value(), centred, [&](int64_t b) { return CountAndSum{tokens(b), all.total(b)}; });
  LVRPO_ROLLED for (int64_t k = 0; !centred && k < call.rewards; ++k) {
    const auto part = [&](int64_t b) { return CountAndSum{tokens(b), all.part(b, k)}; };
    leave_moments(call, chunk, layout.part(k), false, part);
  }
  if (keep || !chunk.fits) return;
  LVRPO_ROLLED for (int64_t i = threadIdx.x; i < all.size * call.rewards; i += THREADS)
    call.parts[all.begin * call.rewards + i] = all.parts[padded(i)];
}

// Whitens and clips the parts of a chunk, writes them, and leaves the sums that `stats` needs.
template <typename scalar_t>
__device__ void finish(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, const Whitening& by) {
  const Samples<scalar_t>& all = chunk.all;
  const Layout layout{call.rewards};
  Energy energy;
  LVRPO_ROLLED for (int64_t b = all.first(); b < all.size; b += all.step()) {
    const double value = whiten_and_clip(all, by, call.estimator.clip, b);
    all.total(b) = value;
    energy = Energy{}(energy, Energy{value * value, value != 0 ? 1.0 : 0.0});
  }
  energy = over_block(energy, Energy{}, shared_memory<Energy>());
  if (threadIdx.x == 0) leave(call, layout.energy(), chunk.index, energy);
  LVRPO_ROLLED for (int64_t k = 0; k < call.rewards; ++k) {
    double share = 0;
    LVRPO_ROLLED for (int64_t b = all.first(); b < all.size; b += all.step()) share += all.part(b, k) * all.total(b);
    share = over_block(share, Add{}, shared_memory<double>());
    if (threadIdx.x == 0) leave(call, layout.share(k), chunk.index, share);
  }
  const int64_t before = all.begin - all.origin;
  write_each(call.values + all.begin, all.size, [&](int64_t i) { return all.totals[before + i]; });
  write_each(call.per_reward + all.begin * call.rewards, all.size * call.rewards, [&](int64_t i) {
    const int64_t number = before * call.rewards + i;
    return all.parts[number + (number >> all.pad)];
  });
}

// By one block, of what all have left.
template <typename scalar_t>
__device__ void write_stats(const Call<scalar_t>& call) {
  using out_t = acc_t<scalar_t>;
  const Layout layout{call.rewards};
  const auto sum = [&](int64_t slot) { return over_chunks(call, slot, 0.0, Add{}); };
  const Energy energy = over_chunks(call, layout.energy(), Energy{}, Energy{});
  if (threadIdx.x == 0) *call.all_zero = energy.nonzero == 0;
  LVRPO_ROLLED for (int64_t k = 0; k < call.rewards; ++k) {
    const Moments m = moments_of(call, layout.reward(k));
    const double share = sum(layout.share(k)), constant = sum(layout.constant(k)), seen = sum(layout.seen(k));
    if (threadIdx.x != 0) continue;
    const double missing = std::numeric_limits<double>::quiet_NaN();
    const auto write = [&](Stat row, double x) {
      call.stats[static_cast<int64_t>(row) * call.rewards + k] = static_cast<out_t>(x);
    };
    write(Stat::share, energy.squares > 0 ? share / energy.squares : share);
    write(Stat::constant_groups, seen > 0 ? constant / seen : missing);
    write(Stat::mean, m.count > 0 ? m.mean : missing);
    write(Stat::std, m.count > 0 ? call.estimator.std(m.squares, m.count) : missing);
    write(Stat::applicable, call.batch > 0 ? m.count / static_cast<double>(call.batch) : missing);
  }
}

// ---- Phases: in each all chunks leave something that the next one needs of the whole batch ----

enum class Phase { rewards, sums, parts, whiten, done };

template <typename scalar_t>
__device__ __forceinline__ Phase after(const Call<scalar_t>& call, Phase phase) {
  const Estimator& estimator = call.estimator;
  if (phase == Phase::rewards && estimator.scale == Scale::batch && !estimator.decoupled) return Phase::sums;
  if (phase == Phase::rewards || phase == Phase::sums) return Phase::parts;
  return phase == Phase::parts && estimator.whiten != Whiten::none ? Phase::whiten : Phase::done;
}

// known.mean [K], those of the rewards or of the parts, from where the moments begin.
template <typename scalar_t>
__device__ void find_means(const Call<scalar_t>& call, const RewardMemory& known, int64_t slot) {
  LVRPO_ROLLED for (int64_t k = 0; k < call.rewards; ++k) {
    const double mean = moments_of(call, slot + 3 * k).mean;
    if (threadIdx.x == 0) known.mean[k] = mean;
  }
}

// known.spread, what every group is divided by.
template <typename scalar_t>
__device__ void find_spread(const Call<scalar_t>& call, const RewardMemory& known) {
  const Estimator& estimator = call.estimator;
  const Layout layout{call.rewards};
  const bool nonzero = estimator.scale == Scale::nonzero;
  const int64_t slot = !nonzero && estimator.decoupled ? layout.reward(0) : layout.spread(0);
  LVRPO_ROLLED for (int64_t k = 0; k < (estimator.decoupled ? call.rewards : 1); ++k) {
    const Moments m = moments_of(call, slot + 3 * k);
    if (threadIdx.x == 0) known.spread[k] = nonzero ? m.mean : estimator.std(m.squares, m.count);
  }
}

template <typename scalar_t>
__device__ Whitening find_whitening(const Call<scalar_t>& call, const RewardMemory& known) {
  const Estimator& estimator = call.estimator;
  const Layout layout{call.rewards};
  const Moments value = moments_of(call, layout.value());
  Whitening by{known.mean};
  if (!estimator.sums_to_zero()) {
    const Range range = over_chunks(call, layout.range(), Range{}, Widest{});
    const double before = std::max(std::abs(range.low), std::abs(range.high));
    by.zero = std::max(range.high - value.mean, value.mean - range.low) <= ROUNDING * before;
    find_means(call, known, layout.part(0));
  }
  by.divisor = estimator.divisor(by.zero ? 0.0 : estimator.std(value.squares, value.count));
  return by;
}

template <typename scalar_t>
__global__ __launch_bounds__(THREADS, BLOCKS_EACH) void advantages_kernel(const __grid_constant__ Call<scalar_t> call) {
  char* memory = shared_memory<char>() + SCRATCH_BYTES;
  const RewardMemory known(call.of_rewards ? call.of_rewards + blockIdx.x * call.reward_bytes : memory, call.rewards);
  if (!call.of_rewards) memory += call.reward_bytes;
  clear_outside(call);
  const bool whitens = call.estimator.whiten != Whiten::none;
  const bool keep = call.cut.chunks <= gridDim.x;  // a block has one chunk, and it stays where it is
  const Phase first = call.estimator.scales_by_batch() ? Phase::rewards : Phase::parts;
  for (Phase phase = first; phase != Phase::done; phase = after(call, phase)) {
    Whitening by{known.mean};
    if (phase == Phase::sums) find_means(call, known, Layout{call.rewards}.reward(0));
    if (phase == Phase::parts) {
      LVRPO_ROLLED for (int64_t k = threadIdx.x; k < call.rewards; k += THREADS) known.spread[k] = 1, known.mean[k] = 0;
      __syncthreads();
      if (phase != first) find_spread(call, known);
    }
    if (phase == Phase::whiten) by = find_whitening(call, known);
    __syncthreads();
    LVRPO_ROLLED for (int64_t index = blockIdx.x; index < call.cut.chunks; index += gridDim.x) {
      const Chunk<scalar_t> chunk = chunk_of(call, index, memory);
      if (phase == first || !keep) fetch(call, chunk, phase == Phase::whiten);
      if (phase == Phase::rewards) measure_rewards(call, chunk);
      if (phase == Phase::sums) measure_sum(call, chunk, known);
      if (phase == Phase::parts) {
        fill_parts(call, chunk, known);
        if (phase == first) leave_reward_moments(call, chunk);
        if (whitens) measure(call, chunk, keep);
      }
      if (after(call, phase) == Phase::done) finish(call, chunk, by);
      __syncthreads();  // the next chunk takes its place
    }
    sync_grid();
  }
  if (blockIdx.x == 0) write_stats(call);
}

// ---- The op ----

void check(const Tensor& rewards, const Tensor& offsets, const Tensor& weights, const optional<Tensor>& lengths,
           const Estimator& estimator) {
  LVRPO_CHECK(rewards.dim() == 2, "rewards must be [B, K]");
  LVRPO_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be [P + 1]");
  check_dtype(offsets, ScalarType::Long, "offsets");
  check_dtype(weights, ScalarType::Double, "weights");
  check_size(weights, 0, rewards.size(1), "weights");
  LVRPO_CHECK(lengths.has_value() || !estimator.counts_tokens(), "lengths must be given: the estimator counts tokens");
  if (!lengths.has_value()) return;
  check_dtype(*lengths, ScalarType::Long, "lengths");
  check_size(*lengths, 0, rewards.size(0), "lengths");
}

template <typename scalar_t>
void run(Call<scalar_t>& call, const Tensor& rewards) {
  const OnDeviceOf device(rewards);
  call.cut = cut_of(call.batch, call.groups, call.rewards, sizeof(scalar_t));
  const Cut& cut = call.cut;
  const auto scratch = [&](int64_t count) { return make_empty(rewards, {count}, ScalarType::Double); };
  call.reward_bytes = (RewardMemory::bytes(call.rewards, THREADS / cut.lanes) + 15) / 16 * 16;
  const bool shares = call.reward_bytes <= REWARD_BYTES;
  const int64_t samples = sizeof(double) * (cut.room + padded(cut.room * call.rewards)) +
                          sizeof(scalar_t) * padded(cut.room * call.rewards);
  const int64_t shared = SCRATCH_BYTES + (shares ? call.reward_bytes : 0) + samples;
  const int64_t blocks = std::min(cut.chunks, resident_blocks(device, advantages_kernel<scalar_t>, THREADS, shared));

  const bool whole = cut.chunks == 1 && cut.room == call.batch;
  Tensor parts = scratch(whole ? 0 : call.batch * call.rewards), totals = scratch(whole ? 0 : call.batch);
  Tensor of_rewards = scratch(shares ? 0 : blocks * call.reward_bytes / static_cast<int64_t>(sizeof(double)));
  Tensor sums = scratch(Layout{call.rewards}.width() * cut.chunks);
  call.parts = parts.template mutable_data_ptr<double>(), call.totals = totals.template mutable_data_ptr<double>();
  call.of_rewards = shares ? nullptr : reinterpret_cast<char*>(of_rewards.template mutable_data_ptr<double>());
  call.sums = sums.template mutable_data_ptr<double>();
  launch(device, {blocks, THREADS, shared, 1, true}, advantages_kernel<scalar_t>, call);
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Result normalize_advantages(Tensor rewards, Tensor offsets, Tensor weights, optional<Tensor> lengths, Tensor numbers,
                            int64_t combine, int64_t baseline, int64_t scale, int64_t whiten) {
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
  const ScalarType out = rewards.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto fresh = [&](std::initializer_list<int64_t> size) { return make_empty(rewards, size, out); };
  Tensor values = fresh({batch}), per_reward = fresh({batch, count}), stats = fresh({CHOICES_OF<Stat>, count});
  Tensor all_zero = make_empty(rewards, {}, ScalarType::Bool);
  LVRPO_DISPATCH_FLOATING(rewards.scalar_type(), scalar_t, [&] {
    using out_t = acc_t<scalar_t>;
    Call<scalar_t> call{estimator, {}, batch, count};
    call.groups = offsets.size(0) - 1;
    call.x = rewards.const_data_ptr<scalar_t>();
    call.offsets = offsets.const_data_ptr<int64_t>();
    call.weights = weights.const_data_ptr<double>();
    call.lengths = lengths.has_value() ? lengths->const_data_ptr<int64_t>() : nullptr;
    call.values = values.mutable_data_ptr<out_t>();
    call.per_reward = per_reward.mutable_data_ptr<out_t>();
    call.stats = stats.mutable_data_ptr<out_t>();
    call.all_zero = all_zero.mutable_data_ptr<bool>();
    run(call, rewards);
  });
  return {values, per_reward, stats, all_zero};
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) { m.impl("normalize_advantages", TORCH_BOX(&lvrpo::normalize_advantages)); }
