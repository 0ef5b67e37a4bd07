// One tile of attention: 64 lanes (query row, head) against 64 keys at a time. The lanes are the vector dimension of
// the scores, so that maxima and sums over keys need no horizontal step. Formulas: docs/ops/packed_attention.md.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/tile_gemm.h"
#include "cpu/packed_attention_keys.h"

namespace lvrpo {

// Matrix rows in acc: the tensor's own memory, or a copy.
template <typename acc>
struct Rows {
  const acc* data;
  int64_t stride;
};

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void copy_rows(const scalar_t* source, int64_t stride, const int32_t* index, int64_t count,
                                  int64_t width, int64_t padded, acc* out) {
  for (int64_t n = 0; n < count; ++n) {
    const scalar_t* row = source + index[n] * stride;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[n * padded + i] = static_cast<acc>(row[i]);
    for (int64_t i = width; i < padded; ++i) out[n * padded + i] = acc(0);
  }
}

// The rows of a block of keys; copied where they are scattered or narrow, or lack the `whole_vectors` asked for.
template <typename scalar_t, typename acc>
Rows<acc> key_rows(const scalar_t* source, int64_t stride, const KeyBlock& block, int64_t width, bool whole_vectors,
                   acc* copy) {
  const int64_t padded = round_to_vector<acc>(width);
  if constexpr (std::is_same_v<scalar_t, acc>) {
    if (block.contiguous && (!whole_vectors || width == padded)) return {source + block.key[0] * stride, stride};
  }
  copy_rows<scalar_t, acc>(source, stride, block.key, block.count, width, padded, copy);
  return {copy, padded};
}

// Lanes of q (or dout) as rows, `out` [padded lanes, padded width], and transposed, `out_t`.
template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void load_lanes(const scalar_t* source, int64_t row_stride, int64_t head_stride, Lanes lanes,
                                   int64_t width, acc scale, acc* out, acc* out_t) {
  const int64_t padded = round_to_vector<acc>(width);
  for (int64_t r = 0; r < lanes.rows; ++r) {
    for (int64_t h = 0; h < lanes.heads; ++h) {
      const scalar_t* x = source + r * row_stride + h * head_stride;
      acc* y = out + (r * lanes.heads + h) * padded;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) y[i] = static_cast<acc>(x[i]) * scale;
      for (int64_t i = width; i < padded; ++i) y[i] = acc(0);
    }
  }
  for (int64_t i = lanes.count * padded; i < lanes.padded * padded; ++i) out[i] = acc(0);
  transpose(out, lanes.padded, padded, out_t);
}

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void store_lanes(const acc* x, acc factor, Lanes lanes, int64_t width, scalar_t* out,
                                    int64_t row_stride, int64_t head_stride) {
  const int64_t padded = round_to_vector<acc>(width);
  for (int64_t r = 0; r < lanes.rows; ++r) {
    for (int64_t h = 0; h < lanes.heads; ++h) {
      const int64_t m = r * lanes.heads + h;
      scalar_t* y = out + r * row_stride + h * head_stride;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) y[i] = static_cast<scalar_t>(x[m * padded + i] * factor);
    }
  }
}

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION acc row_dot(const acc* x, const scalar_t* y, int64_t width) {
  acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += x[i] * static_cast<acc>(y[i]);
  return sum;
}

template <typename acc>
LVRPO_MULTIVERSION void add_values(acc* sum, const acc* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

// Lanes, in whole vectors, in which the GEMM_ROWS keys from n on have a score.
template <typename acc>
LVRPO_INLINE void scored_lanes(const KeyBlock& block, int64_t n, int64_t& begin, int64_t& end) {
  begin = BLOCK_LANES;
  end = 0;
  for (int64_t i = n; i < n + GEMM_ROWS && i < block.count; ++i) {
    if (block.lane_begin[i] >= block.lane_end[i]) continue;
    begin = block.lane_begin[i] < begin ? block.lane_begin[i] : begin;
    end = block.lane_end[i] > end ? block.lane_end[i] : end;
  }
  if (begin > end) begin = end;
  begin = begin / VECTOR<acc> * VECTOR<acc>;
  end = round_to_vector<acc>(end);
}

// s[n][m] = rows[n] . lanes_t[:, m]
template <typename acc>
LVRPO_INLINE void dot_keys(const KeyBlock& block, Rows<acc> rows, const acc* lanes_t, int64_t width, int64_t lanes,
                           acc* s) {
  for (int64_t n = 0; n < block.count; n += GEMM_ROWS) {
    int64_t begin = 0, end = 0;
    scored_lanes<acc>(block, n, begin, end);
    const acc* a[GEMM_ROWS];
    const int64_t last = block.count - 1;
    for (int64_t i = 0; i < GEMM_ROWS; ++i) a[i] = rows.data + (n + i < last ? n + i : last) * rows.stride;
    gemm_rows(a, 1, lanes_t + begin, lanes, s + n * lanes + begin, lanes, end - begin, width, false);
  }
}

// out[m] += sum_n w[n][m] rows[n]
template <typename acc>
LVRPO_INLINE void add_weighted_keys(const KeyBlock& block, const acc* w, Rows<acc> rows, int64_t width, Lanes lanes,
                                    acc* out) {
  for (int64_t g = 0; g * GEMM_ROWS < lanes.count; ++g) {
    const int64_t begin = block.group_begin[g], depth = block.group_end[g] - begin;
    const acc* a[GEMM_ROWS];
    for (int64_t i = 0; i < GEMM_ROWS; ++i) a[i] = w + begin * lanes.padded + g * GEMM_ROWS + i;
    gemm_rows(a, lanes.padded, rows.data + begin * rows.stride, rows.stride, out + g * GEMM_ROWS * width, width, width,
              depth, true);
  }
}

// sums[key[n] - first_key] += sum_m w[n][m] lanes[m] for every key n that is not frozen; `product` holds a block.
template <typename acc>
LVRPO_INLINE void add_to_keys(const KeyBlock& block, const acc* w, const acc* lane_rows, int64_t width, int64_t lanes,
                              acc* product, acc* sums, int64_t first_key) {
  for (int64_t n = 0; n < block.count; n += GEMM_ROWS) {
    bool frozen = true;
    for (int64_t i = n; i < n + GEMM_ROWS && i < block.count; ++i) frozen &= block.frozen[i];
    if (frozen) continue;
    int64_t begin = 0, end = 0;
    scored_lanes<acc>(block, n, begin, end);
    const acc* a[GEMM_ROWS];
    for (int64_t i = 0; i < GEMM_ROWS; ++i) a[i] = w + (n + i) * lanes + begin;
    gemm_rows(a, 1, lane_rows + begin * width, width, product, width, width, end - begin, false);
    for (int64_t i = n; i < n + GEMM_ROWS && i < block.count; ++i) {
      if (block.frozen[i]) continue;
      acc* sum = sums + (block.key[i] - first_key) * width;
      const acc* row = product + (i - n) * width;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
    }
  }
}

// Score of key n in lane m, ready for exp: cap, and -inf where the lane does not see the key.
template <typename acc>
LVRPO_INLINE void finish_scores(const KeyBlock& block, int64_t n, int64_t begin, int64_t end, acc softcap, acc* s) {
  const acc minus_infinity = -std::numeric_limits<acc>::infinity();
  if (softcap > acc(0))
    for (int64_t m = begin; m < end; ++m) s[m] = softcap * std::tanh(s[m] / softcap);
  for (int64_t m = begin; m < block.lane_begin[n] && m < end; ++m) s[m] = minus_infinity;
  for (int64_t m = block.lane_end[n] > begin ? block.lane_end[n] : begin; m < end; ++m) s[m] = minus_infinity;
}

// Running softmax of the lanes of one tile.
template <typename acc>
struct ForwardState {
  acc *q_t, *s, *out;               // [D, lanes], [BLOCK_KEYS, lanes], [lanes, Dv]
  acc *max, *sum, *shift, *factor;  // [lanes]
};

template <typename acc>
LVRPO_MULTIVERSION void forward_block(const KeyBlock& block, Rows<acc> k, Rows<acc> v, int64_t width, int64_t v_width,
                                      Lanes lanes, acc softcap, const ForwardState<acc>& state) {
  const int64_t count = lanes.padded;
  acc *s = state.s, *max = state.max, *sum = state.sum, *shift = state.shift, *factor = state.factor;
  dot_keys(block, k, state.q_t, width, count, s);
  for (int64_t m = 0; m < count; ++m) shift[m] = max[m];
  int64_t begin = 0, end = 0;
  for (int64_t n = 0; n < block.count; ++n) {
    if (n % GEMM_ROWS == 0) scored_lanes<acc>(block, n, begin, end);
    acc* row = s + n * count;
    finish_scores(block, n, begin, end, softcap, row);
#pragma omp simd
    for (int64_t m = begin; m < end; ++m) shift[m] = row[m] > shift[m] ? row[m] : shift[m];
  }
  bool rescale = false;
  for (int64_t m = 0; m < count; ++m) {
    const acc old = max[m];
    max[m] = shift[m];
    // A lane that has seen no key yet keeps the maximum -inf, and subtracts 0 from its scores of -inf.
    if (shift[m] == -std::numeric_limits<acc>::infinity()) shift[m] = acc(0);
    factor[m] = exp_fast(old - shift[m]);
    sum[m] *= factor[m];
    rescale |= factor[m] != acc(1);
  }
  for (int64_t n = 0; n < block.count; ++n) {
    if (n % GEMM_ROWS == 0) scored_lanes<acc>(block, n, begin, end);
    acc* row = s + n * count;
    for (int64_t m = 0; m < begin; ++m) row[m] = acc(0);
#pragma omp simd
    for (int64_t m = begin; m < end; ++m) {
      row[m] = exp_fast(row[m] - shift[m]);
      sum[m] += row[m];
    }
    for (int64_t m = end; m < count; ++m) row[m] = acc(0);
  }
  const int64_t padded = round_to_vector<acc>(v_width);
  if (rescale) {
    for (int64_t m = 0; m < lanes.count; ++m) {
#pragma omp simd
      for (int64_t i = 0; i < padded; ++i) state.out[m * padded + i] *= factor[m];
    }
  }
  add_weighted_keys(block, s, v, padded, lanes, state.out);
}

// Divides by the sums and leaves the log-sum-exps in `shift`.
template <typename acc>
LVRPO_MULTIVERSION void finish_forward(int64_t v_width, Lanes lanes, const ForwardState<acc>& state) {
  const int64_t padded = round_to_vector<acc>(v_width);
  for (int64_t m = 0; m < lanes.count; ++m) {
    state.shift[m] = state.max[m] + std::log(state.sum[m]);
    const acc inverse = acc(1) / state.sum[m];
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) state.out[m * padded + i] *= inverse;
  }
}

template <typename acc>
struct BackwardState {
  acc *q, *q_t, *dout, *dout_t;  // [lanes, D], [D, lanes], [lanes, Dv], [Dv, lanes]
  acc *p, *ds, *product;         // [BLOCK_KEYS, lanes] x 2, [GEMM_ROWS, D or Dv]
  acc *lse, *delta, *dq;         // [lanes] x 2, [lanes, D]
  acc *dk, *dv;                  // sums from first_key on: [keys, D], [keys, Dv]
  int64_t first_key;
};

template <typename acc>
LVRPO_MULTIVERSION void backward_scores(const KeyBlock& block, Rows<acc> k, Rows<acc> v, int64_t width,
                                        int64_t v_width, Lanes lanes, acc softcap, const BackwardState<acc>& state) {
  const int64_t count = lanes.padded;
  dot_keys(block, k, state.q_t, width, count, state.p);
  dot_keys(block, v, state.dout_t, v_width, count, state.ds);
  int64_t begin = 0, end = 0;
  for (int64_t n = 0; n < block.count; ++n) {
    if (n % GEMM_ROWS == 0) scored_lanes<acc>(block, n, begin, end);
    acc *p = state.p + n * count, *ds = state.ds + n * count;
    finish_scores(block, n, begin, end, softcap, p);
    for (int64_t m = 0; m < begin; ++m) p[m] = ds[m] = acc(0);
    if (softcap > acc(0)) {
      for (int64_t m = begin; m < end; ++m) {
        const acc z = p[m], prob = exp_fast(z - state.lse[m]), t = z / softcap;
        p[m] = prob;
        ds[m] = prob > acc(0) ? prob * (ds[m] - state.delta[m]) * (acc(1) - t) * (acc(1) + t) : acc(0);
      }
    } else {
#pragma omp simd
      for (int64_t m = begin; m < end; ++m) {
        p[m] = exp_fast(p[m] - state.lse[m]);
        ds[m] = p[m] * (ds[m] - state.delta[m]);
      }
    }
    for (int64_t m = end; m < count; ++m) p[m] = ds[m] = acc(0);
  }
}

// The rest of a block, once its p and ds are there.
template <typename acc>
LVRPO_MULTIVERSION void add_gradients(const KeyBlock& block, Rows<acc> k, int64_t width, int64_t v_width, Lanes lanes,
                                      const BackwardState<acc>& state) {
  const int64_t count = lanes.padded;
  const int64_t padded = round_to_vector<acc>(width), v_padded = round_to_vector<acc>(v_width);
  add_weighted_keys(block, state.ds, k, padded, lanes, state.dq);
  add_to_keys(block, state.ds, state.q, padded, count, state.product, state.dk, state.first_key);
  add_to_keys(block, state.p, state.dout, v_padded, count, state.product, state.dv, state.first_key);
}

}  // namespace lvrpo
