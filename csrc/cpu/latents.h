// Latents cut into blocks of one sample each. The blocks depend on the shape alone, so sums over them are the same for any
// number of threads, and one large image still feeds all of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/latents.h"

namespace lvrpo {

struct LatentBlocks : Latents {
  static constexpr int64_t BLOCK = 8192;
  int64_t blocks_per_sample;

  explicit LatentBlocks(const Tensor& t) : Latents(t), blocks_per_sample((elements + BLOCK - 1) / BLOCK) {}

  int64_t blocks() const { return samples * blocks_per_sample; }

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
