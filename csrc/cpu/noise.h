// The noise of latents, block by block: as it is stored, or drawn from the stream of its sample.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/noise.h"
#include "common/philox.h"
#include "cpu/latents.h"
#include "cpu/simd.h"

namespace lvrpo {

// Elements [4 first, 4 (first + count)) of a stream.
template <typename acc>
LVRPO_MULTIVERSION void draw_normals(philox::Stream stream, int64_t first, int64_t count, acc* z) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) stream.draw<acc>(static_cast<uint64_t>(first + i), z + 4 * i);
}

// Memory for a block of a thread; only what is drawn touches it.
template <typename acc>
struct DrawnBlock {
  acc z[LatentBlocks::BLOCK];
};

// Elements [begin, begin + n) of the batch, all of one sample and from one of its blocks.
template <typename acc>
const acc* block_of(const Noise<acc>& noise, const LatentBlocks& size, int64_t sample, int64_t begin, int64_t n,
                    DrawnBlock<acc>& drawn) {
  if (!noise.is_drawn()) return noise.stored + begin;
  static_assert(LatentBlocks::BLOCK % 4 == 0, "a block ends where four numbers do");
  draw_normals<acc>(noise.stream(sample), (begin - sample * size.elements) / 4, (n + 3) / 4, drawn.z);
  return drawn.z;
}

}  // namespace lvrpo
