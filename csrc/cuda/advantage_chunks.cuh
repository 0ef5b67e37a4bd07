// A chunk of groups: which samples it has, where a block keeps them, and how its threads share them. Used by
// normalize_advantages.cu alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/advantage_group.h"
#include "cuda/device.cuh"

namespace lvrpo::advantages {

inline constexpr int THREADS = 256;
// Of a multiprocessor, which is told: nvcc would make room for a third, and spill.
inline constexpr int BLOCKS_EACH = 2;

// How the batch is cut.
struct Cut {
  int lanes;      // that share a group
  int64_t chunk;  // groups
  int64_t chunks;
  int64_t room;   // samples that fit in shared memory
};

// In shared memory every 16 numbers have one beside them that nobody uses, so that lanes whose groups have a power of 2
// of numbers do not meet in one bank.
inline constexpr int PAD = 4, NO_PAD = 63;
LVRPO_INLINE int64_t padded(int64_t numbers) { return numbers + (numbers >> PAD); }

// With as many threads an H100 is busy; then lanes that share a group only cost.
inline constexpr int64_t ENOUGH_THREADS = 1 << 17;
// Bytes of samples in shared memory: with those of the rewards a block fits on every GPU, and on an A100 or H100 two, for
// which it has registers.
inline constexpr int64_t SAMPLE_BYTES = 52 << 10;

// As few lanes share a group as keep an H100 busy and let the groups that fit in shared memory occupy a block.
inline Cut cut_of(int64_t batch, int64_t groups, int64_t rewards, int64_t size) {
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
    LVRPO_ROLLED for (int64_t k = 0; k < rewards; ++k) any |= applies(raw(b, k));
    return any;
  }
  __device__ __forceinline__ double length(int64_t b) const { return static_cast<double>(lengths[begin + b]); }
  __device__ __forceinline__ double& part(int64_t b, int64_t k) const { return parts[at(b, k)]; }
  __device__ __forceinline__ double& total(int64_t b) const { return totals[begin - origin + b]; }
  template <typename T, typename Joined>
  __device__ __forceinline__ T over_group(T value, const Joined& join) const {
    // These commute.
    LVRPO_ROLLED for (int bits = threads / 2; bits > 0; bits /= 2) value = join(value, from_lane_xor(value, bits));
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
  LVRPO_ROLLED for (int64_t first = threadIdx.x; first < packs; first += FLIGHT * THREADS) {
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
  LVRPO_ROLLED for (int64_t i = threadIdx.x; i < head; i += THREADS) body(i, load(from + i));
  LVRPO_ROLLED for (int64_t i = head + packs * SIZE + threadIdx.x; i < count; i += THREADS) body(i, load(from + i));
}

// number(i) to [0, count) from `to` on, by a block.
template <typename T, typename Number>
__device__ __forceinline__ void write_each(T* to, int64_t count, const Number& number) {
  constexpr int SIZE = Pack<T>::SIZE;
  const int64_t odd = reinterpret_cast<uintptr_t>(to) % 16 / sizeof(T);
  const int64_t head = std::min(odd == 0 ? 0 : SIZE - odd, count), packs = (count - head) / SIZE;
  LVRPO_ROLLED for (int64_t p = threadIdx.x; p < packs; p += THREADS) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < SIZE; ++j) pack.set(j, static_cast<T>(number(head + p * SIZE + j)));
    pack.write(to + head + p * SIZE);
  }
  LVRPO_ROLLED for (int64_t i = threadIdx.x; i < head; i += THREADS) to[i] = static_cast<T>(number(i));
  LVRPO_ROLLED for (int64_t i = head + packs * SIZE + threadIdx.x; i < count; i += THREADS)
    to[i] = static_cast<T>(number(i));
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

// body(group, number of the lanes that share it in the block); all lanes of a warp make every turn, some with no samples.
template <typename scalar_t, typename Body>
__device__ __forceinline__ void for_groups(const Call<scalar_t>& call, const Chunk<scalar_t>& chunk, const Body& body) {
  const int lanes = call.cut.lanes, team = threadIdx.x / lanes, teams = THREADS / lanes;
  const int64_t begin = chunk.all.begin, end = begin + chunk.all.size;
  Samples<scalar_t> group = chunk.all;
  group.rank = threadIdx.x % lanes, group.threads = lanes;
  LVRPO_ROLLED for (int64_t turn = chunk.first; turn < chunk.last; turn += teams) {
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

}  // namespace lvrpo::advantages
