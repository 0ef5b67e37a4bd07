// Tiles of attention whose results were not finite, once more with care: 0 * NaN is NaN, so that a product over a tile
// carries a NaN or an infinity to rows that see nothing of it. Formulas: docs/ops/packed_attention.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/packed_attention_tile.h"

namespace lvrpo {

template <typename acc>
LVRPO_MULTIVERSION bool all_finite(const acc* x, int64_t count) {
  acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * acc(0);
  return sum == acc(0);
}

// A copy of a block's rows without those that are not finite, which are marked.
template <typename acc>
Rows<acc> finite_rows(const KeyBlock& block, Rows<acc> rows, int64_t width, acc* copy, bool* broken) {
  const int64_t padded = round_to_vector<acc>(width);
  for (int64_t n = 0; n < block.count; ++n) {
    const acc* row = rows.data + n * rows.stride;
    acc* out = copy + n * padded;
    if (all_finite(row, width)) {
      if (row != out) std::copy_n(row, width, out);
    } else {
      broken[n] = true;
      std::fill_n(out, width, acc(0));
    }
    std::fill_n(out + width, padded - width, acc(0));
  }
  return {copy, padded};
}

// Results of the lanes that see a broken key.
template <typename acc>
void spoil_lanes(const KeyBlock& block, const bool* broken, int64_t padded, acc* out) {
  for (int64_t n = 0; n < block.count; ++n) {
    if (!broken[n]) continue;
    for (int64_t m = block.lane_begin[n]; m < block.lane_end[n]; ++m)
      std::fill_n(out + m * padded, padded, std::numeric_limits<acc>::quiet_NaN());
  }
}

// What a backward tile does with lanes and keys that are not finite, and with lanes whose results nobody uses.
struct Care {
  bool unused[BLOCK_LANES] = {}, lost[BLOCK_LANES] = {}, broken[BLOCK_KEYS] = {};

  // Lanes without an upstream gradient contribute nothing, whatever they hold; lost ones contribute NaN.
  template <typename acc>
  void sort_lanes(Lanes lanes, int64_t padded, int64_t v_padded, const acc* dlse, acc* q, acc* dout, acc* lse,
                  acc* delta) {
    for (int64_t m = 0; m < lanes.count; ++m) {
      acc *q_row = q + m * padded, *dout_row = dout + m * v_padded;
      unused[m] = dlse[m] == acc(0) && std::all_of(dout_row, dout_row + v_padded, [](acc x) { return x == acc(0); });
      lost[m] = !unused[m] && !(all_finite(q_row, padded) && all_finite(dout_row, v_padded) && std::isfinite(lse[m]) &&
                                std::isfinite(delta[m]));
      if (!unused[m] && !lost[m]) continue;
      std::fill_n(q_row, padded, acc(0));
      std::fill_n(dout_row, v_padded, acc(0));
      lse[m] = delta[m] = acc(0);
    }
  }

  // Probabilities and d loss / d score of a block.
  template <typename acc>
  void finish(const KeyBlock& block, Lanes lanes, acc* p, acc* ds) const {
    for (int64_t n = 0; n < block.count; ++n) {
      for (int64_t m = 0; m < lanes.count; ++m) {
        acc &prob = p[n * lanes.padded + m], &slope = ds[n * lanes.padded + m];
        const bool sees = block.lane_begin[n] <= m && m < block.lane_end[n];
        if (!sees || unused[m])
          prob = slope = acc(0);
        else if (lost[m] || broken[n])
          prob = slope = std::numeric_limits<acc>::quiet_NaN();
      }
    }
  }
};

}  // namespace lvrpo
