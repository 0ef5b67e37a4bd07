// C += A B for tiles that live in the first cache levels. B and C are row-major with rows of whole vectors; A is four
// pointers and a step, so that a matrix and its transpose are the same call. Call it from LVRPO_MULTIVERSION functions.
#pragma once

#include <cstdint>

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

}  // namespace lvrpo
