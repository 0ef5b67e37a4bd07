// Packed tokens in slices of sequences, a warp for each, and the tokens that a lane has at once.
#pragma once

#include <cstdint>

#include "common/grpo_loss.h"
#include "cuda/device.cuh"

namespace lvrpo::grpo {

// Tokens of a lane whose loads are under way at once. A sequence begins anywhere, so that loads are of one number: a
// warp's are a line of the cache all the same, and a token is dozens of instructions. More would not fit in registers.
template <typename acc>
inline constexpr int AT_ONCE = sizeof(acc) == sizeof(float) ? 4 : 1;
template <typename acc>
inline constexpr int STEP = WARP * AT_ONCE<acc>;
// 16 tokens of a lane, next to which the sums of a slice, 120 bytes, and their shuffles cost little; and 128 warps for
// 65,536 tokens, which is a cluster of 8 blocks.
inline constexpr int LOG_SLICE = 9;
inline constexpr int64_t SLICE = 1 << LOG_SLICE;

// ---- Slices ----

// Sequences have numbers from 1 here; 0 and B + 1 are what lies in front of them and behind. A sequence that begins at
// `offset` has slot (offset >> LOG_SLICE) + number for its first slice and the next ones for the others: no two slices
// share a slot, every number has one, and few stand for nothing.
struct Slice {
  int64_t number, first_slot, slot, slices;
  int64_t begin, end;  // of its tokens

  __device__ __forceinline__ bool holds_tokens(int64_t sequences) const {
    return number > 0 && number <= sequences && begin < end;
  }
};

// Bisection that bounds every offset by those it has passed: all slots see the same offsets, which do not decrease
// whatever the memory holds, so that the slices are [0, T] once.
__device__ __forceinline__ Slice slice_of(const int64_t* cu_seqlens, int64_t sequences, int64_t tokens, int64_t slot) {
  int64_t low = 0, high = sequences + 2, begin = 0, end = tokens;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2, offset = clamp(cu_seqlens[middle - 1], begin, end);
    if ((offset >> LOG_SLICE) + middle <= slot) {
      low = middle, begin = offset;
    } else {
      high = middle, end = offset;
    }
  }
  const int64_t first = (begin >> LOG_SLICE) + low, from = begin + ((slot - first) << LOG_SLICE);
  return {low, first, slot, (end - begin + SLICE - 1) >> LOG_SLICE, from < end ? from : end,
          from + SLICE < end ? from + SLICE : end};
}

inline int64_t slots_of(int64_t tokens, int64_t sequences) { return (tokens >> LOG_SLICE) + sequences + 2; }

// ---- Tokens of a lane ----

template <typename acc>
using Few = acc[AT_ONCE<acc>];

template <typename acc>
struct Loaded {
  Few<acc> logp, old, ref, entropy, weight, advantage;
  bool asked[AT_ONCE<acc>], active[AT_ONCE<acc>];
};

template <typename acc>
__device__ __forceinline__ void read(const acc* from, const Few<acc>& otherwise, int64_t first, int64_t end,
                                     Few<acc>& to) {
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    const int64_t t = first + i * WARP;
    to[i] = from && t < end ? from[t] : otherwise[i];
  }
}

// Tokens first, first + WARP, ... of a slice; an absent input is stood in for as is_usable says.
template <typename acc>
__device__ __forceinline__ void load_tokens(const Tokens<acc>& in, acc advantage, int64_t first, int64_t end,
                                            Loaded<acc>& x) {
  Few<acc> nothing, of_sequence;
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    const int64_t t = first + i * WARP;
    nothing[i] = acc(0), of_sequence[i] = advantage;
    x.asked[i] = t < end && (in.mask == nullptr || in.mask[t]);
  }
  read(in.logp, nothing, first, end, x.logp);
  read(in.old, x.logp, first, end, x.old);
  read(in.ref, x.logp, first, end, x.ref);
  read(in.entropy, x.logp, first, end, x.entropy);
  read(in.weight, x.logp, first, end, x.weight);
  read(in.advantage_per_token ? in.advantage : nullptr, of_sequence, first, end, x.advantage);
#pragma unroll
  for (int i = 0; i < AT_ONCE<acc>; ++i) {
    const acc zero_advantage = x.advantage[i] - x.advantage[i];
    x.active[i] = x.asked[i] && is_usable(x.logp[i], x.old[i], x.ref[i], x.entropy[i], x.weight[i],
                                          in.weight != nullptr, zero_advantage);
    if (in.weight == nullptr) x.weight[i] = acc(1);
  }
}

}  // namespace lvrpo::grpo
