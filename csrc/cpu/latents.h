// A batch of latents [N, ...] cut into blocks of one sample each, for the flow ops. The blocks depend on the shape alone,
// so sums over them are the same for any number of threads, and one large image still feeds all of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"

namespace lvrpo {

template <typename acc>
const acc* data(const Tensor& t, const char* name) {
  check_dtype(t, acc_dtype<acc>, name);
  return t.const_data_ptr<acc>();
}

// One number per sample, [N], or [1] for all of them.
template <typename acc>
class PerSample {
 public:
  PerSample(const Tensor& values, int64_t samples, const char* name) : values_(torch::stable::contiguous(values)) {
    LVRPO_CHECK(values.dim() == 1 && (values.size(0) == samples || values.size(0) == 1), name, " must be [", samples,
                "] or [1]");
    pointer_ = data<acc>(values_, name);
    stride_ = values.size(0) == 1 ? 0 : 1;
  }
  acc operator[](int64_t sample) const { return pointer_[sample * stride_]; }

 private:
  Tensor values_;
  const acc* pointer_;
  int64_t stride_;
};

struct Latents {
  static constexpr int64_t BLOCK = 8192;
  int64_t samples, elements, blocks_per_sample;

  explicit Latents(const Tensor& t) {
    LVRPO_CHECK(t.dim() >= 1, "latents must be [N, ...]");
    samples = t.size(0);
    elements = 1;
    for (int64_t dim = 1; dim < t.dim(); ++dim) elements *= t.size(dim);
    blocks_per_sample = (elements + BLOCK - 1) / BLOCK;
  }

  int64_t blocks() const { return samples * blocks_per_sample; }

  Tensor contiguous(const Tensor& t, const char* name) const {
    LVRPO_CHECK(t.dim() >= 1 && t.size(0) == samples && t.numel() == samples * elements, name,
                " must have the shape of velocity");
    return torch::stable::contiguous(t);
  }

  // body(block, sample, first element, number of elements), in parallel.
  template <typename Body>
  void for_each_block(const Body& body) const {
    // A thread is worth starting for about this many elements.
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, std::min(elements, BLOCK)));
    torch::stable::parallel_for(0, blocks(), grain, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t sample = block / blocks_per_sample;
        const int64_t offset = (block - sample * blocks_per_sample) * BLOCK;
        body(block, sample, sample * elements + offset, std::min(BLOCK, elements - offset));
      }
    });
  }

  // A sample's partial results, added in order.
  template <typename T>
  T sum_of(const std::vector<T>& partial, int64_t sample) const {
    T sum{};
    for (int64_t k = 0; k < blocks_per_sample; ++k) sum += partial[sample * blocks_per_sample + k];
    return sum;
  }
};

}  // namespace lvrpo
