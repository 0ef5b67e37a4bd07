// C += A B for tiles that live in the first cache levels. B and C are row-major with rows of whole vectors; A is four
// pointers and a step, so that a matrix and its transpose are the same call. Call it from LVRPO_MULTIVERSION functions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace lvrpo {

inline constexpr int64_t GEMM_ROWS = 4;

// Rows of B and C are multiples of this, whatever the machine.
template <typename acc>
inline constexpr int64_t VECTOR = 64 / sizeof(acc);

template <typename acc>
constexpr int64_t round_to_vector(int64_t n) {
  return (n + VECTOR<acc> - 1) / VECTOR<acc> * VECTOR<acc>;
}

// Bytes of a vector register under the instruction set that LVRPO_MULTIVERSION picks here.
inline int64_t register_bytes() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 64;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
  return 16;
}

inline const int64_t REGISTER_BYTES = register_bytes();

// C[i][0 : registers] (+)= sum_k A[i][k] B[k][0 : registers] with A[i][k] = a[i][k * a_step], for GEMM_ROWS rows i. The
// vector type is the compiler's, because GCC keeps no array of sums in registers, and exactly a register wide, because
// it splits wider ones through memory (60 times slower).
template <int bytes, int registers, typename acc>
LVRPO_INLINE void gemm_tile(const acc* const (&a)[GEMM_ROWS], int64_t a_step, const acc* b, int64_t b_stride, acc* c,
                            int64_t c_stride, int64_t depth, bool accumulate) {
  typedef acc vec __attribute__((vector_size(bytes), aligned(alignof(acc)), may_alias));
  constexpr int64_t width = bytes / sizeof(acc);
  vec sum[GEMM_ROWS][registers];
  for (int i = 0; i < GEMM_ROWS; ++i)
    for (int j = 0; j < registers; ++j)
      sum[i][j] = accumulate ? *reinterpret_cast<const vec*>(c + i * c_stride + j * width) : vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const vec* b_row = reinterpret_cast<const vec*>(b + k * b_stride);
    for (int i = 0; i < GEMM_ROWS; ++i) {
      const acc x = a[i][k * a_step];
      for (int j = 0; j < registers; ++j) sum[i][j] += x * b_row[j];
    }
  }
  for (int i = 0; i < GEMM_ROWS; ++i)
    for (int j = 0; j < registers; ++j) *reinterpret_cast<vec*>(c + i * c_stride + j * width) = sum[i][j];
}

template <int bytes, typename acc>
LVRPO_INLINE void gemm_columns(const acc* const (&a)[GEMM_ROWS], int64_t a_step, const acc* b, int64_t b_stride, acc* c,
                               int64_t c_stride, int64_t columns, int64_t depth, bool accumulate) {
  constexpr int64_t width = bytes / sizeof(acc);
  int64_t column = 0;
  for (; column + 2 * width <= columns; column += 2 * width)
    gemm_tile<bytes, 2>(a, a_step, b + column, b_stride, c + column, c_stride, depth, accumulate);
  if (column < columns) gemm_tile<bytes, 1>(a, a_step, b + column, b_stride, c + column, c_stride, depth, accumulate);
}

// The same over `columns`, a multiple of VECTOR.
template <typename acc>
LVRPO_INLINE void gemm_rows(const acc* const (&a)[GEMM_ROWS], int64_t a_step, const acc* b, int64_t b_stride, acc* c,
                            int64_t c_stride, int64_t columns, int64_t depth, bool accumulate) {
  if (REGISTER_BYTES == 64) {
    gemm_columns<64>(a, a_step, b, b_stride, c, c_stride, columns, depth, accumulate);
  } else if (REGISTER_BYTES == 32) {
    gemm_columns<32>(a, a_step, b, b_stride, c, c_stride, columns, depth, accumulate);
  } else {
    gemm_columns<16>(a, a_step, b, b_stride, c, c_stride, columns, depth, accumulate);
  }
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
