// C += A B for tiles that live in the first cache levels. B and C are row-major with rows of whole vectors; A is four
// pointers and a step, so that a matrix and its transpose are the same call. Call it from LVRPO_MULTIVERSION functions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/simd.h"

namespace lvrpo {

// 64 bytes: one AVX-512 register; GCC and Clang split it into two or four on narrower machines. A compiler vector type and
// not a loop, because GCC does not keep a [4][16] array of sums in registers.
template <typename acc>
struct Vector {
  typedef acc type __attribute__((vector_size(64), aligned(alignof(acc)), may_alias));
  static constexpr int64_t width = 64 / sizeof(acc);
};

inline constexpr int64_t GEMM_ROWS = 4;

template <typename acc>
constexpr int64_t round_to_vector(int64_t n) {
  return (n + Vector<acc>::width - 1) / Vector<acc>::width * Vector<acc>::width;
}

// C[i][0 : vectors] (+)= sum_k A[i][k] B[k][0 : vectors] with A[i][k] = a[i][k * a_step], for GEMM_ROWS rows i.
template <int vectors, typename acc>
LVRPO_INLINE void gemm_tile(const acc* const (&a)[GEMM_ROWS], int64_t a_step, const acc* b, int64_t b_stride, acc* c,
                            int64_t c_stride, int64_t depth, bool accumulate) {
  using vec = typename Vector<acc>::type;
  constexpr int64_t width = Vector<acc>::width;
  vec sum[GEMM_ROWS][vectors];
  for (int i = 0; i < GEMM_ROWS; ++i)
    for (int j = 0; j < vectors; ++j)
      sum[i][j] = accumulate ? *reinterpret_cast<const vec*>(c + i * c_stride + j * width) : vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const vec* b_row = reinterpret_cast<const vec*>(b + k * b_stride);
    for (int i = 0; i < GEMM_ROWS; ++i) {
      const acc x = a[i][k * a_step];
      for (int j = 0; j < vectors; ++j) sum[i][j] += x * b_row[j];
    }
  }
  for (int i = 0; i < GEMM_ROWS; ++i)
    for (int j = 0; j < vectors; ++j) *reinterpret_cast<vec*>(c + i * c_stride + j * width) = sum[i][j];
}

// The same over `columns`, a multiple of the vector width.
template <typename acc>
LVRPO_INLINE void gemm_rows(const acc* const (&a)[GEMM_ROWS], int64_t a_step, const acc* b, int64_t b_stride, acc* c,
                            int64_t c_stride, int64_t columns, int64_t depth, bool accumulate) {
  constexpr int64_t width = Vector<acc>::width;
  int64_t column = 0;
  for (; column + 2 * width <= columns; column += 2 * width)
    gemm_tile<2>(a, a_step, b + column, b_stride, c + column, c_stride, depth, accumulate);
  if (column < columns) gemm_tile<1>(a, a_step, b + column, b_stride, c + column, c_stride, depth, accumulate);
}

#if defined(__GNUC__) && !defined(__clang__)

// A square of 32-byte rows: small enough that AVX2 has every shuffle.
template <typename acc, typename index>
struct Square {
  static constexpr int64_t size = 32 / sizeof(acc);
  typedef acc row __attribute__((vector_size(32), aligned(alignof(acc)), may_alias));
  typedef index lanes __attribute__((vector_size(32)));

  // Swaps the off-diagonal halves of every 2 step by 2 step square.
  template <int step>
  static LVRPO_INLINE void exchange(row (&x)[size]) {
    lanes low, high;
    for (int i = 0; i < size; ++i) {
      low[i] = i & step ? size + i - step : i;
      high[i] = i & step ? size + i : i + step;
    }
    for (int i = 0; i < size; ++i) {
      if (i & step) continue;
      const row upper = x[i], lower = x[i + step];
      x[i] = __builtin_shuffle(upper, lower, low);
      x[i + step] = __builtin_shuffle(upper, lower, high);
    }
  }
};

// out[column][row] = x[row][column] for one square.
template <typename acc>
LVRPO_INLINE void transpose_square(const acc* x, int64_t stride, acc* out, int64_t out_stride) {
  using S = Square<acc, std::conditional_t<sizeof(acc) == 8, int64_t, int32_t>>;
  typename S::row rows[S::size];
  for (int i = 0; i < S::size; ++i) rows[i] = *reinterpret_cast<const typename S::row*>(x + i * stride);
  S::template exchange<1>(rows);
  S::template exchange<2>(rows);
  if constexpr (S::size > 4) S::template exchange<4>(rows);
  for (int i = 0; i < S::size; ++i) *reinterpret_cast<typename S::row*>(out + i * out_stride) = rows[i];
}

#else

template <typename acc>
LVRPO_INLINE void transpose_square(const acc* x, int64_t stride, acc* out, int64_t out_stride) {
  for (int64_t i = 0; i < 32 / static_cast<int64_t>(sizeof(acc)); ++i)
    for (int64_t j = 0; j < 32 / static_cast<int64_t>(sizeof(acc)); ++j) out[i * out_stride + j] = x[j * stride + i];
}

#endif

// out[columns][rows] = transpose of x[rows][columns]; both sizes are multiples of the vector width.
template <typename acc>
LVRPO_INLINE void transpose(const acc* x, int64_t rows, int64_t columns, acc* out) {
  constexpr int64_t size = 32 / sizeof(acc);
  for (int64_t column = 0; column < columns; column += size)
    for (int64_t row = 0; row < rows; row += size)
      transpose_square(x + row * columns + column, columns, out + column * rows + row, rows);
}

}  // namespace lvrpo
