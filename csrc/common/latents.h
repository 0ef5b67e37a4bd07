// A batch of latents [N, ...] and the numbers that belong to its samples, for the flow ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/math.h"
#include "common/tensors.h"

namespace lvrpo {

template <typename acc>
const acc* data(const Tensor& t, const char* name) {
  check_dtype(t, acc_dtype<acc>, name);
  return t.const_data_ptr<acc>();
}

// The numbers of a PerSample, while that lives.
template <typename acc>
struct SampleNumbers {
  const acc* numbers;
  int64_t stride;
  LVRPO_INLINE acc operator[](int64_t sample) const { return numbers[sample * stride]; }
};

// One number per sample, [N], or [1] for all of them.
template <typename acc>
class PerSample {
 public:
  PerSample(const Tensor& values, int64_t samples, const char* name) : values_(dense(values)) {
    LVRPO_CHECK(values.dim() == 1 && (values.size(0) == samples || values.size(0) == 1), name, " must be [", samples,
                "] or [1]");
    numbers_ = {data<acc>(values_, name), values.size(0) == 1 ? 0 : 1};
  }
  acc operator[](int64_t sample) const { return numbers_[sample]; }
  SampleNumbers<acc> numbers() const { return numbers_; }

 private:
  Tensor values_;
  SampleNumbers<acc> numbers_;
};

struct Latents {
  int64_t samples, elements;

  explicit Latents(const Tensor& t) {
    LVRPO_CHECK(t.dim() >= 1, "latents must be [N, ...]");
    samples = t.size(0);
    elements = 1;
    for (int64_t dim = 1; dim < t.dim(); ++dim) elements *= t.size(dim);
  }

  Tensor contiguous(const Tensor& t, const char* name) const {
    LVRPO_CHECK(t.dim() >= 1 && t.size(0) == samples && t.numel() == samples * elements, name,
                " must have the shape of velocity");
    return dense(t);
  }
};

}  // namespace lvrpo
