// Rows of logits under blocks of threads: sums over a row, and its gradient, in packs of 16 bytes wherever it begins.
// Formulas: docs/ops/gather_logprobs.md.
//
// A row is cut into chunks, and in a chunk a column's thread depends on the column alone. A thread adds up its columns
// in their order, then the chunks in theirs, then the threads' sums are added: a row's bits depend neither on its
// neighbours, nor on where it lies in memory, nor on how many blocks have shared it.
#pragma once


#include <algorithm>
#include <optional>

#include "common/logits.h"
#include "common/softmax_row.h"
#include "common/tensors.h"
#include "cuda/device.cuh"

namespace lvrpo {

// Threads that share a row, and packs that each has on the way: 16 KB a block.
inline constexpr int THREADS = 256, IN_FLIGHT = 4;
// Blocks that a multiprocessor has registers for: with four, 64 KB are on the way, more than its share of the memory's
// bandwidth takes to arrive. Of doubles a thread holds as many again.
template <typename acc>
inline constexpr int BLOCKS_EACH = sizeof(acc) == 8 ? 2 : 4;
// The gradient takes more registers, and as many bytes are on their way out.
template <typename acc>
inline constexpr int GRADIENT_BLOCKS_EACH = sizeof(acc) == 8 ? 2 : 3;
// Columns whose sums are formed apart: several loads of each thread of any dtype, and few enough that the blocks of a
// few long rows fill a GPU.
inline constexpr int64_t CHUNK_V = 16384;
inline constexpr int64_t NO_TARGET = std::numeric_limits<int64_t>::min();

inline int64_t chunks_of(int64_t columns) { return std::max<int64_t>(1, (columns + CHUNK_V - 1) / CHUNK_V); }

// ---- Which columns, which tokens: nobody has checked their values ----

struct Range {
  int64_t low, high;
  __device__ __forceinline__ bool has(int64_t column) const { return column >= low && column < high; }
  __device__ __forceinline__ bool has(int64_t begin, int64_t end) const { return begin >= low && end <= high; }
};

// What of a row's range is there.
__device__ __forceinline__ Range range_of(const Columns& columns, int64_t row) {
  const int64_t low = columns.low(row), high = columns.high(row);
  return {low > 0 ? low : 0, high < columns.vocab ? high : columns.vocab};
}

template <typename T>
struct Logits {
  const T* data;
  int64_t stride;
  Columns columns;
  __device__ __forceinline__ const T* row(int64_t index) const { return data + index * stride; }
  __device__ __forceinline__ Range range(int64_t index) const { return range_of(columns, index); }
};

struct Targets {
  const int64_t* ids;   // [T]
  const int64_t* rows;  // [T], or null where token t is predicted by row t
  int64_t count, row_count, ignore_index;

  // NO_TARGET where it is not there.
  __device__ __forceinline__ int64_t row(int64_t t) const {
    const int64_t row = rows ? rows[t] : t;
    return row >= 0 && row < row_count ? row : NO_TARGET;
  }
  // The token's id, NO_TARGET for one that is ignored or outside the range of its row.
  __device__ __forceinline__ int64_t id_in(int64_t t, const Range& range) const {
    const int64_t id = ids[t];
    return id != ignore_index && range.has(id) ? id : NO_TARGET;
  }
};

// Targets, and the memory that they are read from.
struct TargetTensors {
  TargetTensors(const Tensor& token_ids, const std::optional<Tensor>& row_index, int64_t rows, int64_t ignore_index)
      : ids_(dense(token_ids)) {
    LVRPO_CHECK(token_ids.dim() == 1, "token_ids must be [T]");
    check_dtype(token_ids, ScalarType::Long, "token_ids");
    const int64_t count = token_ids.size(0);
    if (row_index) {
      check_dtype(*row_index, ScalarType::Long, "row_index");
      check_size(*row_index, 0, count, "row_index");
      rows_ = dense(*row_index);
    }
    LVRPO_CHECK(row_index || count <= rows, count, " tokens need a row_index, there are ", rows, " rows");
    targets = {ids_.const_data_ptr<int64_t>(), rows_ ? rows_->const_data_ptr<int64_t>() : nullptr, count, rows,
               ignore_index};
  }

  Targets targets;

 private:
  Tensor ids_;
  std::optional<Tensor> rows_;
};

// ---- Sums over a row ----

// Shared memory that add_threads needs.
template <typename acc>
inline constexpr int64_t SHARED_SUMS = sizeof(SoftmaxSums<acc>) * THREADS / WARP;

// The sums of a block's threads, in every thread.
template <typename acc>
__device__ __forceinline__ SoftmaxSums<acc> add_threads(const SoftmaxSums<acc>& sums, const LogitScale<acc>& scale) {
  const auto add = [&](SoftmaxSums<acc> a, const SoftmaxSums<acc>& b) {
    add_sums(a, b, scale.inv_temperature);
    return a;
  };
  return over_block(sums, add, shared_memory<SoftmaxSums<acc>>());
}

// What a loop over columns may take for granted. ANY_ROW is for what is rare, and keeps down what there is to compile.
enum RowForm { ALIGNED_ROW, PLAIN_ROW, ANY_ROW };

// y of a logit; only ANY_ROW may have a cap.
template <RowForm form, typename acc>
__device__ __forceinline__ acc capped(acc x, const LogitScale<acc>& scale) {
  if constexpr (form == ANY_ROW) return scale.cap(x);
  return x;
}

template <RowForm form, typename T>
__device__ __forceinline__ void read_pack(Pack<T>& pack, const T* from) {
  if constexpr (form == ALIGNED_ROW)
    pack.read(from);
  else
    pack.read_unaligned(from);
}

// Around it read_unaligned touches no more than a pack.
template <RowForm form, typename T>
inline constexpr int64_t MARGIN = form == ALIGNED_ROW ? 0 : Pack<T>::SIZE;

// A pack of which only the columns in `range` are read; others are 0.
template <RowForm form, typename T>
__device__ __forceinline__ void read_part(Pack<T>& pack, const T* row, int64_t column, const Range& range) {
  constexpr int SIZE = Pack<T>::SIZE;
  if (range.has(column - MARGIN<form, T>, column + SIZE + MARGIN<form, T>))
    return read_pack<form>(pack, row + column);
#pragma unroll
  for (int i = 0; i < SIZE; ++i) pack.set(i, range.has(column + i) ? load(row + column + i) : acc_t<T>(0));
}

// What is done with a pack that has been read: nothing.
struct Forget {
  template <typename T>
  __device__ __forceinline__ void operator()(int64_t, const Pack<T>&) const {}
};

template <Summed which, RowForm form, typename T, typename acc, typename Keep>
__device__ __forceinline__ void add_chunk(const T* row, int64_t begin, const Range& range, const LogitScale<acc>& scale,
                                          const Keep& keep, SoftmaxSums<acc>& total) {
  constexpr int SIZE = Pack<T>::SIZE, STRIDE = THREADS * SIZE, GROUP = IN_FLIGHT * STRIDE;
  constexpr acc none = -std::numeric_limits<acc>::infinity();
  static_assert(CHUNK_V % GROUP == 0);
  SoftmaxSums<acc> sums;
  const int64_t end = begin + CHUNK_V < range.high ? begin + CHUNK_V : range.high;
#pragma unroll 1
  for (int64_t at = begin; at < end; at += GROUP) {
    if (at + GROUP <= range.low) continue;
    const int64_t first = at + threadIdx.x * SIZE;
    // The same for all threads. Either way a group has the same sums.
    const bool whole = range.has(at - MARGIN<form, T>, at + GROUP + MARGIN<form, T>);
    Pack<T> packs[IN_FLIGHT];
    acc y[IN_FLIGHT * SIZE];
    acc top = none;
    if (whole) {
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) read_pack<form>(packs[i], row + first + i * STRIDE);
#pragma unroll
      for (int i = 0; i < IN_FLIGHT * SIZE; ++i) y[i] = capped<form>(packs[i / SIZE][i % SIZE], scale);
      if constexpr (form != ANY_ROW)
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) top = fmax(top, packs[i].largest());
    } else {
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) read_part<form>(packs[i], row, first + i * STRIDE, range);
#pragma unroll
      for (int i = 0; i < IN_FLIGHT * SIZE; ++i)
        y[i] = range.has(first + i / SIZE * STRIDE + i % SIZE) ? capped<form>(packs[i / SIZE][i % SIZE], scale) : none;
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) keep(first + i * STRIDE, packs[i]);
    if (form == ANY_ROW || !whole)
#pragma unroll
      for (int i = 0; i < IN_FLIGHT * SIZE; ++i) top = fmax(top, y[i]);
    if (top > sums.reference) move_reference(sums, top, scale.inv_temperature);
    const acc reference = sums.empty() ? acc(0) : sums.reference;
#pragma unroll
    for (int i = 0; i < IN_FLIGHT * SIZE; ++i) {
      const acc d = scale.distance(y[i], reference), e = exp_bounded(d);
      sums.e += e;
      if constexpr (which != PLAIN_SUM) sums.e_d += e * d;
      if constexpr (which == WITH_SQUARES) sums.e_e += e * e;
    }
  }
  add_sums(total, sums, scale.inv_temperature);
}

// This thread's sums over the chunks of a row that begin at `first`, a multiple of a pack; every parts-th of them, from
// `part` on. keep(column, pack) gets what is read.
template <Summed which, typename T, typename acc, typename Keep = Forget>
__device__ __forceinline__ SoftmaxSums<acc> row_sums(const T* row, const Range& range, const LogitScale<acc>& scale,
                                                     int64_t part = 0, int64_t parts = 1, int64_t first = 0,
                                                     const Keep& keep = {}) {
  SoftmaxSums<acc> total;
  const auto add = [&](const auto& add_one) {
    for (int64_t begin = first + part * CHUNK_V; begin < range.high; begin += parts * CHUNK_V) add_one(begin);
  };
  if (scale.capped())
    add([&](int64_t begin) { add_chunk<which, ANY_ROW>(row, begin, range, scale, keep, total); });
  else if (is_aligned(row))
    add([&](int64_t begin) { add_chunk<which, ALIGNED_ROW>(row, begin, range, scale, keep, total); });
  else
    add([&](int64_t begin) { add_chunk<which, PLAIN_ROW>(row, begin, range, scale, keep, total); });
  return total;
}

// ---- The gradient of a row ----

// Columns that a thread reads and writes together: whole packs of logits T and of gradients G.
template <typename T, typename G>
inline constexpr int TOGETHER = Pack<T>::SIZE > Pack<G>::SIZE ? Pack<T>::SIZE : Pack<G>::SIZE;

template <typename T, int N>
struct Packs {
  static constexpr int SIZE = Pack<T>::SIZE;
  Pack<T> packs[N / SIZE];
  __device__ __forceinline__ acc_t<T> operator[](int i) const { return packs[i / SIZE][i % SIZE]; }
};

// The gradient of N columns from `column` on; 0 outside the range.
template <RowForm form, bool WHOLE, int N, typename T, typename acc>
__device__ __forceinline__ void form_gradient(const Packs<T, N>& x, int64_t column, const Range& range,
                                              const LogitScale<acc>& scale, const RowGradient<acc>& row, int64_t id,
                                              acc (&dx)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const acc y = capped<form>(x[i], scale);
    dx[i] = row(y - row.shift, acc(0), scale);
    if constexpr (form == ANY_ROW) dx[i] *= scale.cap_slope(y);
    if (!WHOLE && !range.has(column + i)) dx[i] = acc(0);
  }
  if (id < column || id >= column + N) return;
  // A target's column is formed whole in acc and stored once: rounding p first would lose 1 - p.
  acc of_target = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) of_target = column + i == id ? x[i] : of_target;
  const acc y = scale.cap(of_target);
  of_target = row(y - row.shift, row.dlogprob, scale) * scale.cap_slope(y);
#pragma unroll
  for (int i = 0; i < N; ++i) dx[i] = column + i == id ? of_target : dx[i];
}

template <int N, typename G, typename acc>
__device__ __forceinline__ void write_packs(const acc (&dx)[N], G* out) {
#pragma unroll
  for (int i = 0; i < N; i += Pack<G>::SIZE) {
    acc_t<G> values[Pack<G>::SIZE];
#pragma unroll
    for (int j = 0; j < Pack<G>::SIZE; ++j) values[j] = static_cast<acc_t<G>>(dx[i + j]);
    Pack<G> pack;
    pack.set(values);
    pack.write(out + i);
  }
}

template <RowForm form, typename T, typename G, typename acc>
__device__ __forceinline__ void write_columns(const T* x, int64_t begin, int64_t end, const Range& range, int64_t vocab,
                                              const LogitScale<acc>& scale, const RowGradient<acc>& row, int64_t id,
                                              G* out) {
  constexpr int N = TOGETHER<T, G>, SIZE = Pack<T>::SIZE, STRIDE = THREADS * N;
  constexpr int READ = IN_FLIGHT * SIZE > N ? IN_FLIGHT * SIZE / N : 1;
#pragma unroll 1
  for (int64_t at = begin; at < end; at += READ * STRIDE) {
    const int64_t first = at + threadIdx.x * N;
    Packs<T, N> columns[READ];
    acc dx[N];
    if (range.has(at - MARGIN<form, T>, at + READ * STRIDE + MARGIN<form, T>)) {
#pragma unroll
      for (int i = 0; i < READ; ++i)
#pragma unroll
        for (int j = 0; j < N / SIZE; ++j) read_pack<form>(columns[i].packs[j], x + first + i * STRIDE + j * SIZE);
#pragma unroll
      for (int i = 0; i < READ; ++i) {
        form_gradient<form, true>(columns[i], first + i * STRIDE, range, scale, row, id, dx);
        write_packs(dx, out + first + i * STRIDE);
      }
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < READ; ++i) {
      const int64_t column = first + i * STRIDE;
#pragma unroll
      for (int j = 0; j < N / SIZE; ++j) read_part<form>(columns[0].packs[j], x, column + j * SIZE, range);
      form_gradient<form, false>(columns[0], column, range, scale, row, id, dx);
      if (column >= 0 && column + N <= vocab) {
        write_packs(dx, out + column);
        continue;
      }
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (column + j >= 0 && column + j < vocab) store(out + column + j, dx[j]);
    }
  }
}

// Columns of a tile of a row, of which each thread takes `packs` times TOGETHER.
template <typename T, typename G>
LVRPO_INLINE constexpr int64_t tile_of(int64_t packs) {
  return packs * THREADS * TOGETHER<T, G>;
}

// Tiles that a row may need: the first begins up to a pack before it.
template <typename T, typename G>
int64_t tiles_of(int64_t vocab, int64_t packs) {
  return (vocab + TOGETHER<T, G> + tile_of<T, G>(packs) - 1) / tile_of<T, G>(packs);
}

// A tile of the gradient `out` of the row x, which it may take the place of; `id` is the column of its one target,
// whose upstream gradient is row.dlogprob, or NO_TARGET. A row of which no gradient is asked may hold anything and is
// not read. `packs` is a multiple of IN_FLIGHT.
template <typename T, typename G, typename acc>
__device__ __forceinline__ void write_gradient(const T* x, Range range, int64_t vocab, const LogitScale<acc>& scale,
                                               const RowGradient<acc>& row, int64_t id, int64_t tile, int64_t packs,
                                               G* out) {
  constexpr int N = TOGETHER<T, G>;
  if (row.is_zero()) range = {0, 0}, id = NO_TARGET;
  // Packs begin where the memory of `out` has a multiple of 16.
  const int64_t lead = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(out) % 16) % 16 / sizeof(G));
  const int64_t begin = (lead > 0 ? lead - N : 0) + tile * tile_of<T, G>(packs);
  const int64_t limit = begin + tile_of<T, G>(packs), end = limit < vocab ? limit : vocab;
  if constexpr (std::is_same_v<T, G>) {
    if (!scale.capped() && is_aligned(x + begin))
      return write_columns<ALIGNED_ROW>(x, begin, end, range, vocab, scale, row, id, out);
    if (!scale.capped()) return write_columns<PLAIN_ROW>(x, begin, end, range, vocab, scale, row, id, out);
  }
  write_columns<ANY_ROW>(x, begin, end, range, vocab, scale, row, id, out);
}

}  // namespace lvrpo
