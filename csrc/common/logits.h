// The arguments of ops on logits [R, V], checked as far as that reads no values.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "common/check.h"
#include "common/math.h"

namespace lvrpo {

// What a step may change, in the order of the schema.
struct SoftmaxNumbers {
  explicit SoftmaxNumbers(const Tensor& numbers) {
    check_dtype(numbers, ScalarType::Double, "numbers");
    check_size(numbers, 0, 3, "numbers");
    check_contiguous(numbers, "numbers");
    const double* given = numbers.const_data_ptr<double>();
    temperature = given[0];
    softcap = given[1];
    ignore_index = static_cast<int64_t>(given[2]);
  }
  double temperature, softcap;
  int64_t ignore_index;
};

// The columns a row's softmax runs over, as they were given.
struct Columns {
  const int64_t* ranges;  // [R, 2] or null
  int64_t stride_row, stride_side, vocab;
  LVRPO_INLINE int64_t low(int64_t row) const { return ranges ? ranges[row * stride_row] : 0; }
  LVRPO_INLINE int64_t high(int64_t row) const { return ranges ? ranges[row * stride_row + stride_side] : vocab; }
};

inline Columns columns_of(const std::optional<Tensor>& vocab_range, int64_t rows, int64_t vocab) {
  if (!vocab_range) return {nullptr, 0, 0, vocab};
  check_dtype(*vocab_range, ScalarType::Long, "vocab_range");
  check_size(*vocab_range, 0, rows, "vocab_range");
  check_size(*vocab_range, 1, 2, "vocab_range");
  return {vocab_range->const_data_ptr<int64_t>(), vocab_range->stride(0), vocab_range->stride(1), vocab};
}

inline bool has_unit_columns(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1; }

// The gradient may take the place of the logits, element for element; any other overlap would overwrite a logit that
// is still to be read.
inline void check_memory(const Tensor& dlogits, const Tensor& logits) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_size(dlogits, 0, rows, "dlogits");
  check_size(dlogits, 1, vocab, "dlogits");
  LVRPO_CHECK(has_unit_columns(dlogits), "the columns of dlogits must be adjacent");
  LVRPO_CHECK(rows <= 1 || dlogits.stride(0) >= vocab, "rows of dlogits overlap");
  if (rows == 0 || vocab == 0) return;
  const auto range = [&](const Tensor& t) {
    const char* begin = static_cast<const char*>(t.data_ptr());
    const int64_t last = (rows - 1) * t.stride(0) + (vocab - 1) * t.stride(1);
    return std::pair(begin, begin + (last + 1) * t.element_size());
  };
  const auto [out_begin, out_end] = range(dlogits);
  const auto [in_begin, in_end] = range(logits);
  const bool apart = out_end <= in_begin || in_end <= out_begin;
  const bool same = out_begin == in_begin && dlogits.scalar_type() == logits.scalar_type() &&
                    (rows == 1 || dlogits.stride(0) == logits.stride(0)) && has_unit_columns(logits);
  LVRPO_CHECK(apart || same, "dlogits overlaps logits; it may be the same tensor or share no memory");
}

}  // namespace lvrpo
