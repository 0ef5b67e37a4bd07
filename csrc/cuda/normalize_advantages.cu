// Group-relative advantages of K rewards in one launch, all statistics in fp64. Formulas: docs/ops/normalize_advantages.md.
//
// A few lanes share a group, and a block takes a chunk of groups, whose samples it keeps in shared memory. What is needed
// of the whole batch every chunk leaves behind as sums; all blocks meet, and each adds up the sums of all chunks in the
// same order. How many lanes and chunks there are depends on the shape alone, so that the bits do not depend on the GPU.

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/advantage_group.h"
#include "common/tensors.h"
#include "cuda/device.cuh"

namespace lvrpo {
namespace {

using std::optional;

constexpr int THREADS = 256;
// With as many threads an H100 is busy; then lanes that share a group only cost.
constexpr int64_t ENOUGH_THREADS = 1 << 17;
// Bytes of samples in shared memory: with those of the rewards a block fits on every GPU, and on an A100 or H100 two, for
// which it has registers.
constexpr int64_t SAMPLE_BYTES = 52 << 10;
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

// How the batch is cut.
struct Cut {
  int lanes;      // that share a group
  int64_t chunk;  // groups
  int64_t chunks;
  int64_t room;   // samples that fit in shared memory
};

template <typename scalar_t>
struct Call {
  using out_t = acc_t<scalar_t>;
  Estimator estimator;
  Cut cut;
  int64_t batch, rewards, groups;
  const scalar_t* x;       // [B, K]
  const int64_t* offsets;  // [P + 1]
  const double* weights;   // [K]
  const int64_t* lengths;  // [B], or null
  double *parts, *totals;  // [B, K], [B]: of chunks that do not fit in shared memory, and of those that wait
  char* of_rewards;        // [blocks, reward_bytes], or null: in shared memory
  int64_t reward_bytes;
  double* sums;  // [width, chunks]
  out_t *values, *per_reward, *stats;
  bool* all_zero;
};

// In shared memory every 16 numbers have one beside them that nobody uses, so that lanes whose groups have a power of 2
// of numbers do not meet in one bank.
constexpr int PAD = 4, NO_PAD = 63;
LVRPO_INLINE int64_t padded(int64_t numbers) { return numbers + (numbers >> PAD); }

// A range of samples for the threads that share it: the lanes of a group, or a block.
template <typename scalar_t>
struct Samples {
  int64_t begin, size, rewards;
  const scalar_t* x;
  double *parts, *totals;
  const int64_t* lengths;
  int64_t origin;  // the sample that x, parts and totals begin with
  int pad;
  int rank, threads;

  __device__ __forceinline__ int64_t first() const { return rank; }
  __device__ __forceinline__ int64_t step() const { return threads; }
  __device__ __forceinline__ int64_t at(int64_t b, int64_t k) const {
    const int64_t number = (begin - origin + b) * rewards + k;
    return number + (number >> pad);
  }
  __device__ __forceinline__ double raw(int64_t b, int64_t k) const { return static_cast<double>(load(x + at(b, k))); }
  static __device__ __forceinline__ bool applies(double x) { return std::abs(x) <= std::numeric_limits<double>::max(); }
  __device__ __forceinline__ double value(int64_t b, int64_t k) const {
    const double x = raw(b, k);
    return applies(x) ? x : 0.0;
  }
  __device__ __forceinline__ double counted(int64_t b, int64_t k) const { return applies(raw(b, k)) ? 1.0 : 0.0; }
  __device__ __forceinline__ bool scored(int64_t b) const {
    bool any = false;
    for (int64_t k = 0; k < rewards; ++k) any |= applies(raw(b, k));
    return any;
  }
  __device__ __forceinline__ double length(int64_t b) const { return static_cast<double>(lengths[begin + b]); }
  __device__ __forceinline__ double& part(int64_t b, int64_t k) const { return parts[at(b, k)]; }
  __device__ __forceinline__ double& total(int64_t b) const { return totals[begin - origin + b]; }
  template <typename T, typename Joined>
  __device__ __forceinline__ T over_group(T value, const Joined& join) const {
#pragma unroll 1  // the instructions of all joins should fit in their cache
    for (int bits = threads / 2; bits > 0; bits /= 2) value = join(value, from_lane_xor(value, bits));  // these commute
    return value;
  }
  template <typename T>
  __device__ __forceinline__ void show(T& to, const T& value) const {
    __syncwarp();  // others may still read what was there
    if (rank == 0) to = value;
    __syncwarp();
  }
};

// Chunk `index`: its groups [first, last), its samples for the whole block.
template <typename scalar_t>
struct Chunk {
  int64_t index, first, last;
  bool fits;
  Samples<scalar_t> all;
};

// Where a group begins, or the last one ends; nobody may have checked the offsets.
template <typename scalar_t>
__device__ __forceinline__ int64_t start_of(const Call<scalar_t>& call, int64_t group) {
  return std::clamp<int64_t>(call.offsets[group], 0, call.batch);
}

template <typename scalar_t>
__device__ Chunk<scalar_t> chunk_of(const Call<scalar_t>& call, int64_t index, char* memory) {
  const int64_t first = index * call.cut.chunk, last = std::min(first + call.cut.chunk, call.groups);
  const int64_t begin = start_of(call, first), size = std::max<int64_t>(start_of(call, last) - begin, 0);
  double* totals = reinterpret_cast<double*>(memory);
  double* parts = totals + call.cut.room;
  scalar_t* x = reinterpret_cast<scalar_t*>(parts + padded(call.cut.room * call.rewards));
  const int rank = threadIdx.x;
  const bool fits = size <= call.cut.room;
  Samples<scalar_t> all{begin, size, call.rewards, x, parts, totals, call.lengths, begin, PAD, rank, THREADS};
  if (!fits) all.x = call.x, all.parts = call.parts, all.totals = call.totals, all.origin = 0, all.pad = NO_PAD;
  return {index, first, last, fits, all};
}

// body(i, x) for the numbers [0, count) that stand from `from` on, in a block.
template <typename T, typename Body>
__device__ __forceinline__ void for_each_of(const T* from, int64_t count, const Body& body) {
  constexpr int SIZE = Pack<T>::SIZE, FLIGHT = 4;
  const int64_t odd = reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T);
  const int64_t head = std::min(odd == 0 ? 0 : SIZE - odd, count), packs = (count - head) / SIZE;
  for (int64_t first = threadIdx.x; first < packs; first += FLIGHT * THREADS) {
    Pack<T> pack[FLIGHT];
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i)
      if (first + i * THREADS < packs) pack[i].read(from + head + (first + i * THREADS) * SIZE);
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i)
      if (first + i * THREADS < packs)
#pragma unroll
        for (int j = 0; j < SIZE; ++j) body(head + (first + i * THREADS) * SIZE + j, pack[i][j]);
  }
  for (int64_t i = threadIdx.x; i < head; i += THREADS) body(i, load(from + i));
  for (int64_t i = head + packs * SIZE + threadIdx.x; i < count; i += THREADS) body(i, load(from + i));
}

// number(i) to [0, count) from `to` on, by a block.
template <typename T, typename Number>
__device__ __forceinline__ void write_each(T* to, int64_t count, const Number& number) {
  constexpr int SIZE = Pack<T>::SIZE;
  const int64_t odd = reinterpret_cast<uintptr_t>(to) % 16 / sizeof(T);
  const int64_t head = std::min(odd == 0 ? 0 : SIZE - odd, count), packs = (count - head) / SIZE;
  for (int64_t p = threadIdx.x; p < packs; p += THREADS) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < SIZE; ++j) pack.set(j, static_cast<T>(number(head + p * SIZE + j)));
    pack.write(to + head + p * SIZE);
  }
  for (int64_t i = threadIdx.x; i < head; i += THREADS) to[i] = static_cast<T>(number(i));
  for (int64_t i = head + packs * SIZE + threadIdx.x; i < count; i += THREADS) to[i] = static_cast<T>(number(i));
}

// Brings the rewards of a chunk to shared memory if they fit, and its parts where an earlier phase has left them.
template <typename scalar_t>
__device__ void fetch(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, bool with_parts) {
  const Samples<scalar_t>& all = chunk.all;
  const int64_t begin = all.begin * call.rewards, count = all.size * call.rewards;
  if (chunk.fits) {
    scalar_t* x = const_cast<scalar_t*>(all.x);
    for_each_of(call.x + begin, count, [&](int64_t i, acc_t<scalar_t> value) { store(x + padded(i), value); });
    if (with_parts)
      for_each_of(call.parts + begin, count, [&](int64_t i, double part) { all.parts[padded(i)] = part; });
  }
  __syncthreads();
}

// The samples before the first group and after the last are in none.
template <typename scalar_t>
__device__ void clear_outside(const Call<scalar_t>& call) {
  const int64_t begin = start_of(call, 0), end = start_of(call, call.groups), threads = gridDim.x * int64_t(THREADS);
  for (int64_t b = blockIdx.x * int64_t(THREADS) + threadIdx.x; b < call.batch; b += threads) {
    if (b >= begin && b < end) continue;
    call.values[b] = 0;
    for (int64_t k = 0; k < call.rewards; ++k) call.per_reward[b * call.rewards + k] = 0;
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
  for (int64_t chunk = threadIdx.x; chunk < call.cut.chunks; chunk += THREADS) {
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
  for (int64_t b = all.first(); b < all.size; b += all.step()) {
    const CountAndSum one = of(b);
    sum.add(one.count, one.count * one.sum);
  }
  sum = over_block(sum, Join{}, shared_memory<CountAndSum>());
  const double mean = centred || sum.count == 0 ? 0.0 : sum.sum / sum.count;
  double squares = 0;
  for (int64_t b = all.first(); b < all.size; b += all.step()) {
    const CountAndSum one = of(b);
    squares += one.count * (one.sum - mean) * (one.sum - mean);
  }
  squares = over_block(squares, Add{}, shared_memory<double>());
  if (threadIdx.x == 0) leave(call, slot, chunk.index, Moments{sum.count, mean, squares});
}

// Leaves the moments of every reward over the samples it applies to.
template <typename scalar_t>
__device__ void leave_reward_moments(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk) {
  for (int64_t k = 0; k < call.rewards; ++k)
    leave_moments(call, chunk, Layout{call.rewards}.reward(k), false,
                  [&](int64_t b) { return CountAndSum{chunk.all.counted(b, k), chunk.all.value(b, k)}; });
}

template <typename scalar_t>
__device__ __noinline__ Moments moments_of(const Call<scalar_t>& call, int64_t slot) {
  return over_chunks(call, slot, Moments{0, 0, 0}, Together{});
}

// ---- What is done with a chunk ----

// body(group, number of the lanes that share it in the block); all lanes of a warp make every turn, some with no samples.
template <typename scalar_t, typename Body>
__device__ __forceinline__ void for_groups(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, const Body& body) {
  const int lanes = call.cut.lanes, team = threadIdx.x / lanes, teams = THREADS / lanes;
  const int64_t begin = chunk.all.begin, end = begin + chunk.all.size;
  Samples<scalar_t> group = chunk.all;
  group.rank = threadIdx.x % lanes, group.threads = lanes;
  for (int64_t turn = chunk.first; turn < chunk.last; turn += teams) {
    const int64_t p = turn + team;
    group.begin = begin, group.size = 0;
    if (p < chunk.last) {
      group.begin = std::clamp(start_of(call, p), begin, end);
      group.size = std::max<int64_t>(std::clamp(start_of(call, p + 1), begin, end) - group.begin, 0);
    }
    body(group, team);
  }
  __syncthreads();
}

// What batch_spread of the CPU needs of a chunk: the moments of every reward, and the fraction that is not 0.
template <typename scalar_t>
__device__ void measure_rewards(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk) {
  const Samples<scalar_t>& all = chunk.all;
  const bool decoupled = call.estimator.decoupled;
  leave_reward_moments(call, chunk);
  if (call.estimator.scale != Scale::nonzero) return;
  for (int64_t k = 0; k < (decoupled ? call.rewards : 1); ++k)
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
  for (int64_t k = threadIdx.x; k < call.rewards; k += THREADS) known.constant[k] = known.seen[k] = 0;
  __syncthreads();
  for_groups(call, chunk, [&](const Samples<scalar_t>& group, int team) {
    group_parts(group, call.estimator, call.weights, known.spread, known.columns + team * call.rewards,
                [&](int64_t k, const Column& column) {
                  if (group.rank != 0 || column.count == 0) return;
                  atomicAdd(known.seen + k, 1u);
                  if (!column.varies()) atomicAdd(known.constant + k, 1u);
                });
  });
  for (int64_t k = threadIdx.x; k < call.rewards; k += THREADS) {
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
  for (int64_t b = all.first(); b < all.size; b += all.step()) {
    double value = 0;
    for (int64_t k = 0; k < call.rewards; ++k) value += all.part(b, k);
    all.total(b) = value;
    if (all.scored(b)) range = Widest{}(range, Range{value, value});
  }
  range = over_block(range, Widest{}, shared_memory<Range>());
  if (threadIdx.x == 0) leave(call, layout.range(), chunk.index, range);
  leave_moments(call, chunk, layout.value(), centred, [&](int64_t b) { return CountAndSum{tokens(b), all.total(b)}; });
  for (int64_t k = 0; !centred && k < call.rewards; ++k) {
    const auto part = [&](int64_t b) { return CountAndSum{tokens(b), all.part(b, k)}; };
    leave_moments(call, chunk, layout.part(k), false, part);
  }
  if (keep || !chunk.fits) return;
  for (int64_t i = threadIdx.x; i < all.size * call.rewards; i += THREADS)
    call.parts[all.begin * call.rewards + i] = all.parts[padded(i)];
}

// Whitens and clips the parts of a chunk, writes them, and leaves the sums that `stats` needs.
template <typename scalar_t>
__device__ void finish(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, const Whitening& by) {
  const Samples<scalar_t>& all = chunk.all;
  const Layout layout{call.rewards};
  Energy energy;
  for (int64_t b = all.first(); b < all.size; b += all.step()) {
    const double value = whiten_and_clip(all, by, call.estimator.clip, b);
    all.total(b) = value;
    energy = Energy{}(energy, Energy{value * value, value != 0 ? 1.0 : 0.0});
  }
  energy = over_block(energy, Energy{}, shared_memory<Energy>());
  if (threadIdx.x == 0) leave(call, layout.energy(), chunk.index, energy);
  for (int64_t k = 0; k < call.rewards; ++k) {
    double share = 0;
    for (int64_t b = all.first(); b < all.size; b += all.step()) share += all.part(b, k) * all.total(b);
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
  for (int64_t k = 0; k < call.rewards; ++k) {
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
  for (int64_t k = 0; k < call.rewards; ++k) {
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
  for (int64_t k = 0; k < (estimator.decoupled ? call.rewards : 1); ++k) {
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
__global__ __launch_bounds__(THREADS) void advantages_kernel(const __grid_constant__ Call<scalar_t> call) {
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
      for (int64_t k = threadIdx.x; k < call.rewards; k += THREADS) known.spread[k] = 1, known.mean[k] = 0;
      __syncthreads();
      if (phase != first) find_spread(call, known);
    }
    if (phase == Phase::whiten) by = find_whitening(call, known);
    __syncthreads();
    for (int64_t index = blockIdx.x; index < call.cut.chunks; index += gridDim.x) {
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

// As few lanes share a group as keep an H100 busy and let the groups that fit in shared memory occupy a block.
Cut cut_of(int64_t batch, int64_t groups, int64_t rewards, int64_t size) {
  groups = std::max<int64_t>(groups, 1);                                        // somebody has to write the statistics
  const int64_t longest = std::max<int64_t>((batch + groups - 1) / groups, 1);  // where all are equal
  const int64_t expected = longest + (longest + 7) / 8;                         // ragged ones need more now and then
  const int64_t numbers = rewards * (size + sizeof(double));
  const int64_t fit = SAMPLE_BYTES / (numbers + (numbers >> PAD) + 1 + sizeof(double));
  const int64_t most = std::max<int64_t>(fit / expected, 1);
  int lanes = 1;
  while (lanes < WARP && lanes < longest && (lanes * groups < ENOUGH_THREADS || lanes * most < THREADS)) lanes *= 2;
  const int64_t chunk = std::min(most, THREADS / static_cast<int64_t>(lanes));
  const int64_t room = std::min(batch, chunk * expected);
  return {lanes, chunk, (groups + chunk - 1) / chunk, room <= fit ? room : 0};
}

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
