// The keys of a query tile, 64 at a time, and the lanes (query row, head) that see each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/span_layout.h"
#include "cpu/tile_gemm.h"

namespace lvrpo {

inline constexpr int64_t BLOCK_LANES = 64;
inline constexpr int64_t BLOCK_KEYS = 64;
inline constexpr int64_t BLOCK_GROUPS = BLOCK_LANES / GEMM_ROWS;

// Rows of a tile times query heads of one key head; lane = row * heads + head, padded with zeros to whole vectors.
struct Lanes {
  int64_t rows, heads, count, padded;
};

// Up to BLOCK_KEYS keys, and for each the lanes that see it.
struct KeyBlock {
  int64_t count;
  bool contiguous;
  int32_t key[BLOCK_KEYS];
  int32_t lane_begin[BLOCK_KEYS], lane_end[BLOCK_KEYS];
  // Per GEMM_ROWS lanes: from the first to the last key that one of them sees.
  int32_t group_begin[BLOCK_GROUPS], group_end[BLOCK_GROUPS];
  bool frozen[BLOCK_KEYS];  // without a gradient
};

// Walks the key ranges of a tile block by block.
class KeyCursor {
 public:
  KeyCursor(const SpanLayout& layout, const TilePlan& plan, const QueryTile& tile, const Lanes& lanes)
      : layout_(layout), plan_(plan), tile_(tile), lanes_(lanes), range_(tile.range_begin) {
    if (range_ < tile.range_end) key_ = plan.ranges[range_].begin;
    const int32_t* rows = layout.rows + tile.row_begin;
    dense_ = rows[lanes.rows - 1] - rows[0] + 1 == lanes.rows;
  }

  bool next(KeyBlock& block) {
    block.count = 0;
    while (block.count < BLOCK_KEYS && range_ < tile_.range_end) {
      const int32_t end = plan_.ranges[range_].end;
      while (block.count < BLOCK_KEYS && key_ < end) block.key[block.count++] = key_++;
      if (key_ == end && ++range_ < tile_.range_end) key_ = plan_.ranges[range_].begin;
    }
    if (block.count == 0) return false;
    block.contiguous = block.key[block.count - 1] - block.key[0] + 1 == block.count;
    for (int64_t n = 0; n < block.count; ++n) block.frozen[n] = !plan_.frozen.empty() && plan_.frozen[block.key[n]];
    find_lanes(block);
    return true;
  }

 private:
  // First row of the tile at or after a buffer row.
  int32_t row_at(int32_t token) const {
    const int32_t* rows = layout_.rows + tile_.row_begin;
    if (dense_) return std::clamp<int32_t>(token - rows[0], 0, lanes_.rows);
    return std::lower_bound(rows, rows + lanes_.rows, token) - rows;
  }

  // First row of the tile that a key is too far behind.
  int32_t row_beyond(int32_t key) const {
    if (layout_.window == 0) return lanes_.rows;
    const int32_t *rows = layout_.rows + tile_.row_begin, *positions = layout_.positions;
    const int64_t beyond = positions[key] + layout_.window;
    // The rows of a tile are then on one path.
    if (dense_) return std::clamp<int64_t>(beyond - positions[rows[0]], 0, lanes_.rows);
    const auto is_near = [&](int32_t row, int64_t limit) { return positions[row] < limit; };
    return std::lower_bound(rows, rows + lanes_.rows, beyond, is_near) - rows;
  }

  void find_lanes(KeyBlock& block) const {
    std::fill_n(block.group_begin, BLOCK_GROUPS, 0);
    std::fill_n(block.group_end, BLOCK_GROUPS, 0);
    bool all = true;
    const int32_t heads = lanes_.heads, count = lanes_.count;
    for (int64_t n = 0; n < block.count; ++n) {
      block.lane_begin[n] = row_at(layout_.q_lo[block.key[n]]) * heads;
      block.lane_end[n] = std::min(row_at(layout_.q_hi[block.key[n]]), row_beyond(block.key[n])) * heads;
      all &= block.lane_begin[n] == 0 && block.lane_end[n] == count;
    }
    const int32_t groups = (count + GEMM_ROWS - 1) / GEMM_ROWS;
    if (all) {
      std::fill_n(block.group_end, groups, static_cast<int32_t>(block.count));
      return;
    }
    for (int64_t n = block.count - 1; n >= 0; --n) {
      if (block.lane_begin[n] >= block.lane_end[n]) continue;
      const int32_t last = (block.lane_end[n] - 1) / GEMM_ROWS;
      for (int32_t g = block.lane_begin[n] / GEMM_ROWS; g <= last; ++g) {
        block.group_begin[g] = n;
        block.group_end[g] = std::max<int32_t>(block.group_end[g], n + 1);
      }
    }
  }

  const SpanLayout& layout_;
  const TilePlan& plan_;
  const QueryTile& tile_;
  const Lanes& lanes_;
  int64_t range_;
  int32_t key_ = 0;
  bool dense_;
};

}  // namespace lvrpo
