// The noise of one sample, chunk by chunk: as it is stored, or drawn from the stream of the sample.
#pragma once

#include <cstdint>

#include "common/noise.h"
#include "cuda/latents.cuh"

namespace lvrpo {

// Where noise comes from. Chunks of it in flight: the fp64 that draws one fills a thread's registers and its time.
struct Stored {
  static constexpr int IN_FLIGHT = CHUNKS_IN_FLIGHT;
};
struct Drawn {
  static constexpr int IN_FLIGHT = 1;
};

template <typename Source, typename acc>
struct SampleNoise {
  const acc* stored;  // [N, elements]

  __device__ __forceinline__ SampleNoise(const Noise<acc>& noise, int64_t, int64_t) : stored(noise.stored) {}

  __device__ __forceinline__ bool is_aligned_at(int64_t at) const { return is_aligned(stored + at); }
  template <int SIZE, typename Range>
  __device__ __forceinline__ void read(Chunk<acc, SIZE>& z, Range range, int64_t at) const {
    z.read(stored + at, range);
  }
};

// Chunks have to begin at a multiple of their size from the sample's first element, as those of a slice do that has none
// ahead of it.
template <typename acc>
struct SampleNoise<Drawn, acc> {
  philox::Stream stream;
  int64_t first;  // element of the sample in the batch

  __device__ __forceinline__ SampleNoise(const Noise<acc>& noise, int64_t sample, int64_t elements)
      : stream(noise.stream(sample)), first(sample * elements) {}

  __device__ __forceinline__ bool is_aligned_at(int64_t) const { return true; }

  template <int SIZE>
  __device__ __forceinline__ void read(Chunk<acc, SIZE>& z, Whole, int64_t at) const {
    const uint64_t element = static_cast<uint64_t>(at - first);
    acc four[4];
    if constexpr (SIZE % 4 == 0) {
#pragma unroll
      for (int i = 0; i < SIZE; i += 4) {
        stream.draw(element / 4 + i / 4, four);
#pragma unroll
        for (int j = 0; j < 4; ++j) z.set(i + j, four[j]);
      }
    } else {
      static_assert(SIZE == 2);
      stream.draw(element / 4, four);
      z.set(0, element % 4 == 0 ? four[0] : four[2]);
      z.set(1, element % 4 == 0 ? four[1] : four[3]);
    }
  }
  template <int SIZE>
  __device__ __forceinline__ void read(Chunk<acc, SIZE>& z, Part part, int64_t at) const {
    read(z, Whole{}, at);
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (i < part.low || i >= part.high) z.set(i, acc(0));
  }
};

}  // namespace lvrpo
