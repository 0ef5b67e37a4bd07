// The loops of gather_logprobs over a run of columns of one row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/convert.h"
#include "common/softmax_row.h"
#include "cpu/simd.h"

namespace lvrpo {

// Columns between two looks at the maximum; they stay in L1.
inline constexpr int64_t BLOCK_V = 1024;

template <typename acc>
LVRPO_INLINE acc largest(const acc* y, int64_t n) {
  acc max = -std::numeric_limits<acc>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = y[i] > max ? y[i] : max;
  return max;
}

// Sums of one block by a given reference; returns the block's largest y.
template <Summed which, typename acc>
LVRPO_INLINE acc block_sums(const acc* y, int64_t n, acc reference, const LogitScale<acc>& scale,
                            SoftmaxSums<acc>& sums) {
  acc max = -std::numeric_limits<acc>::infinity(), sum_e = 0, sum_e_d = 0, sum_e_e = 0;
#pragma omp simd reduction(max : max) reduction(+ : sum_e, sum_e_d, sum_e_e)
  for (int64_t i = 0; i < n; ++i) {
    max = y[i] > max ? y[i] : max;
    const acc d = scale.distance(y[i], reference);
    const acc e = exp_bounded(d);
    sum_e += e;
    if constexpr (which != PLAIN_SUM) sum_e_d += e * d;
    if constexpr (which == WITH_SQUARES) sum_e_e += e * e;
  }
  sums = {reference, sum_e, sum_e_d, sum_e_e};
  return max;
}

// One pass: a block is summed by the maximum of the blocks before it, while its own is found. Only a block that rises
// far above what came before is summed again.
template <Summed which, typename acc>
LVRPO_INLINE void add_block(const acc* y, int64_t n, const LogitScale<acc>& scale, SoftmaxSums<acc>& sums) {
  constexpr acc rise = 12;  // e up to 160,000: far from overflow, and no digit of a sum depends on its scale
  const acc none = -std::numeric_limits<acc>::infinity();
  SoftmaxSums<acc> block;
  acc reference = sums.empty() ? largest(y, n) : sums.reference;
  if (reference == none) reference = acc(0);
  acc max = block_sums<which>(y, n, reference, scale, block);
  if ((max - reference) * scale.inv_temperature > rise) max = block_sums<which>(y, n, max, scale, block);
  if (max == none) block.reference = none;
  add_sums(sums, block, scale.inv_temperature);
  if (max > sums.reference) move_reference(sums, max, scale.inv_temperature);
}

template <Summed which, typename scalar_t, typename acc>
LVRPO_MULTIVERSION SoftmaxSums<acc> softmax_sums_of(const scalar_t* x, int64_t n, LogitScale<acc> scale) {
  SoftmaxSums<acc> sums;
  acc y[BLOCK_V];
  for (int64_t begin = 0; begin < n; begin += BLOCK_V) {
    const int64_t size = n - begin < BLOCK_V ? n - begin : BLOCK_V;
    const scalar_t* from = x + begin;
    prefetch(from + BLOCK_V, BLOCK_V);
    if (scale.capped()) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) y[i] = scale.softcap * tanh_fast(load(from + i) * scale.inv_softcap);
      add_block<which>(y, size, scale, sums);
    } else if constexpr (std::is_same_v<scalar_t, acc>) {
      add_block<which>(from, size, scale, sums);
    } else {
      // Apart from the sums: GCC gives a loop with a reduction the narrow vectors of the baseline for 16-bit loads.
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) y[i] = load(from + i);
      add_block<which>(y, size, scale, sums);
    }
  }
  return sums;
}

template <typename scalar_t, typename acc>
SoftmaxSums<acc> softmax_sums(Summed which, const scalar_t* x, int64_t n, const LogitScale<acc>& scale) {
  if (which == PLAIN_SUM) return softmax_sums_of<PLAIN_SUM, scalar_t, acc>(x, n, scale);
  if (which == WITH_ENTROPY) return softmax_sums_of<WITH_ENTROPY, scalar_t, acc>(x, n, scale);
  return softmax_sums_of<WITH_SQUARES, scalar_t, acc>(x, n, scale);
}

// dx of one block, x and dx the same memory or apart.
template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void block_gradient(const scalar_t* x, acc* dx, int64_t n, LogitScale<acc> scale,
                                       RowGradient<acc> row) {
  if (scale.capped()) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const acc tanh = tanh_fast(load(x + i) * scale.inv_softcap);
      dx[i] = row(scale.softcap * tanh - row.shift, acc(0), scale) * ((acc(1) - tanh) * (acc(1) + tanh));
    }
  } else if (row.shift != acc(0)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = row(load(x + i) - row.shift, acc(0), scale);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = row(load(x + i), acc(0), scale);
  }
}

template <typename acc, typename grad_t>
LVRPO_MULTIVERSION void round_block(const acc* from, grad_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
}

template <typename scalar_t, typename grad_t, typename acc>
void columns_gradient(const scalar_t* x, grad_t* dx, int64_t n, const LogitScale<acc>& scale,
                      const RowGradient<acc>& row) {
  for (int64_t begin = 0; begin < n; begin += BLOCK_V) {
    const int64_t size = std::min(n - begin, BLOCK_V);
    if constexpr (std::is_same_v<grad_t, acc>) {
      block_gradient<scalar_t, acc>(x + begin, dx + begin, size, scale, row);
    } else {
      acc block[BLOCK_V];
      block_gradient<scalar_t, acc>(x + begin, block, size, scale, row);
      round_block<acc, grad_t>(block, dx + begin, size);
    }
  }
}

}  // namespace lvrpo
