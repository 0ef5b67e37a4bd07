// Passes over latents [N, ...], for the flow ops: a block takes a slice of one sample, a thread a chunk of it at a time.
// Slices and chunks begin at the sample's own first element, so that the order of a sum depends on the shape alone.
#pragma once

#include <cstdint>

#include "common/latents.h"
#include "cuda/device.cuh"

namespace lvrpo {

// Threads of a block that has a slice: eight of them fill an SM, and a reduction joins eight warps.
inline constexpr int SLICE_THREADS = 256;
// Elements of a slice: enough for every thread to have 16, so that a reduction costs little.
inline constexpr int SLICE = 16 * SLICE_THREADS;
// Chunks of each array that a thread asks for before it waits for the first: with three or four arrays, 64 KB an SM of
// half its threads, where 3.4 TB/s need 25.
inline constexpr int CHUNKS_IN_FLIGHT = 2;

// All of a chunk, and the address is a multiple of 16.
struct Whole {};
// Its elements [low, high), at any address.
struct Part {
  int low, high;
};

// SIZE elements next to each other; those that are left out are 0.
template <typename T, int SIZE>
struct Chunk {
  static constexpr int PER_PACK = Pack<T>::SIZE, PACKS = SIZE / PER_PACK;
  static_assert(SIZE % PER_PACK == 0);
  Pack<T> packs[PACKS];

  __device__ __forceinline__ acc_t<T> operator[](int i) const { return packs[i / PER_PACK][i % PER_PACK]; }
  __device__ __forceinline__ void set(int i, acc_t<T> value) { packs[i / PER_PACK].set(i % PER_PACK, value); }

  __device__ __forceinline__ void read(const T* from, Whole) {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) packs[i].read(from + i * PER_PACK);
  }
  __device__ __forceinline__ void read(const T* from, Part part) {
    if (part.low == 0 && part.high == SIZE) {
#pragma unroll
      for (int i = 0; i < PACKS; ++i) packs[i].read_unaligned(from + i * PER_PACK);
      return;
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) set(i, i >= part.low && i < part.high ? load(from + i) : acc_t<T>(0));
  }

  __device__ __forceinline__ void write(T* to, Whole) const {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) packs[i].write(to + i * PER_PACK);
  }
  __device__ __forceinline__ void write(T* to, Part part) const {
    if (part.low == 0 && part.high == SIZE && is_aligned(to)) return write(to, Whole{});
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (i >= part.low && i < part.high) store(to + i, (*this)[i]);
  }
};

inline int64_t slices_of(const Latents& size) { return (size.elements + SLICE - 1) / SLICE; }

// The slice of this block.
struct Slice {
  int64_t sample, begin;  // its first element in the batch
  int size;

  __device__ __forceinline__ Slice(int64_t elements, int64_t slices) {
    // A launch has fewer than 2^31 blocks, and a division of 32 bits is short.
    const unsigned of = static_cast<unsigned>(slices), index = blockIdx.x % of;
    sample = blockIdx.x / of;
    begin = sample * elements + static_cast<int64_t>(index) * SLICE;
    const int64_t rest = elements - static_cast<int64_t>(index) * SLICE;
    size = rest < SLICE ? static_cast<int>(rest) : SLICE;
  }

  // body(Whole or Part, first element) of this thread's chunks of SIZE elements. `aligned`: at `begin` all arrays have an
  // address that is a multiple of 16. The first chunk begins `ahead` elements before the slice and leaves them out.
  template <int SIZE, int IN_FLIGHT = CHUNKS_IN_FLIGHT, typename Body>
  __device__ __forceinline__ void for_each_chunk(bool aligned, const Body& body, int ahead = 0) const {
    if (aligned && size == SLICE && ahead == 0) {
      constexpr int CHUNKS = SLICE / (SIZE * SLICE_THREADS);
#pragma unroll IN_FLIGHT
      for (int i = 0; i < CHUNKS; ++i) body(Whole{}, begin + (i * SLICE_THREADS + static_cast<int>(threadIdx.x)) * SIZE);
      return;
    }
    for (int at = static_cast<int>(threadIdx.x) * SIZE - ahead; at < size; at += SLICE_THREADS * SIZE)
      body(Part{at < 0 ? -at : 0, size - at < SIZE ? size - at : SIZE}, begin + at);
  }
};

// How many elements ahead of its slice the first chunk begins so that stores to `first`, that of the slice, are of 16 bytes;
// where no sum depends on it.
template <typename T>
__device__ __forceinline__ int ahead_of(const T* first) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(T));
}

// Lanes that share a sample where its slices are added: each adds about four, next to each other in time.
inline int lanes_of(int64_t slices) {
  int lanes = 1;
  while (lanes < WARP && lanes * 4 < slices) lanes *= 2;
  return lanes;
}

// The sum over a sample's slices in each of its `lanes`, which stand side by side. All lanes of the warp take part.
template <typename T>
__device__ __forceinline__ T over_slices(const T* parts, int64_t slices, int lanes, bool counts) {
  T sum{};
  if (counts)
    for (int64_t i = lane() % lanes; i < slices; i += lanes) sum = sum + parts[i];
  return over_warp(sum, Add{}, 1, lanes);
}

}  // namespace lvrpo
