// A SpanMask cut into query tiles, each with exactly the keys that one of its rows sees. Rules: docs/masks.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/names.h"

namespace lvrpo {

struct TokenRange {
  int32_t begin, end;
};

// One row of SpanMask.spans.
LVRPO_TABLE(Span, int32_t, start, end, causal, run_begin, run_end, row_begin, row_end, frozen, invariant);

struct SpanLayout {
  int64_t length, num_queries, num_spans, num_runs;
  const int32_t* q_lo;      // [length]
  const int32_t* q_hi;      // [length]
  const int32_t* rows;      // [num_queries] buffer row of each query, ascending
  const Span* spans;        // [num_spans]
  const TokenRange* runs;   // [num_runs]
  const int32_t* positions; // [length], only with a window
  int64_t window;           // how many positions up to its own a row sees; 0: all

  // The first token of [begin, end), along which positions count up, that is within the window of a row.
  int32_t first_within(int32_t begin, int32_t end, int32_t row) const {
    if (window == 0) return begin;
    const int64_t lowest = positions[row] - window + 1;
    return std::clamp<int64_t>(begin + lowest - positions[begin], begin, end);
  }
};

// Query rows [row_begin, row_end) of one document, and the keys they see: ranges [range_begin, range_end).
struct QueryTile {
  int64_t row_begin, row_end, range_begin, range_end;
  int64_t pairs;  // rows times keys
};

// Tokens that see nothing outside themselves, and their tiles.
struct Document {
  int64_t key_begin, key_end, tile_begin, tile_end;
};

// Tiles of one document that one thread walks in order, and the keys from the first to the last that they see; a unit
// that is the whole document has all of its keys.
struct WorkUnit {
  int64_t document, nth, tile_begin, tile_end, key_begin, key_end;
  bool whole, last;
};

struct TilePlan {
  std::vector<uint8_t> frozen;  // [length], keys without a gradient; empty: none
  std::vector<QueryTile> tiles;
  std::vector<TokenRange> ranges;
  std::vector<Document> documents;
  std::vector<WorkUnit> units;
};

inline const int32_t* int32_table(const Tensor& t, int64_t columns, const char* name) {
  check_dtype(t, ScalarType::Int, name);
  check_contiguous(t, name);
  LVRPO_CHECK(columns == 0 ? t.dim() == 1 : t.dim() == 2 && t.size(1) == columns, name, " has the wrong shape");
  return t.const_data_ptr<int32_t>();
}

inline SpanLayout span_layout(const Tensor& q_lo, const Tensor& q_hi, const Tensor& rows, const Tensor& spans,
                              const Tensor& runs, const std::optional<Tensor>& positions, int64_t window) {
  LVRPO_CHECK(window >= 0 && positions.has_value() == (window > 0), "a window needs positions, and they a window");
  SpanLayout layout{q_lo.size(0),
                    rows.size(0),
                    spans.size(0),
                    runs.size(0),
                    int32_table(q_lo, 0, "q_lo"),
                    int32_table(q_hi, 0, "q_hi"),
                    int32_table(rows, 0, "rows"),
                    reinterpret_cast<const Span*>(int32_table(spans, COLUMNS_OF<Span>, "spans")),
                    reinterpret_cast<const TokenRange*>(int32_table(runs, 2, "runs")),
                    positions ? int32_table(*positions, 0, "positions") : nullptr,
                    window};
  check_size(q_hi, 0, layout.length, "q_hi");
  if (positions) check_size(*positions, 0, layout.length, "positions");
  // What follows trusts these; a table made by SpanMask passes.
  for (int64_t i = 0; i < layout.num_queries; ++i)
    LVRPO_CHECK(layout.rows[i] >= 0 && layout.rows[i] < layout.length, "rows[", i, "] is outside the buffer");
  for (int64_t i = 0; i < layout.num_runs; ++i)
    LVRPO_CHECK(layout.runs[i].begin >= 0 && layout.runs[i].end <= layout.length, "runs[", i,
                "] is outside the buffer");
  int64_t token = 0, row = 0;
  for (int64_t s = 0; s < layout.num_spans; ++s) {
    const Span& span = layout.spans[s];
    LVRPO_CHECK(span.start == token && span.end >= token && span.end <= layout.length && span.row_begin == row &&
                    span.row_end >= row && span.row_end <= layout.num_queries && span.run_begin >= 0 &&
                    span.run_begin <= span.run_end && span.run_end <= layout.num_runs,
                "row ", s, " of spans does not continue the row before it");
    token = span.end;
    row = span.row_end;
  }
  return layout;
}

inline void append_range(std::vector<TokenRange>& ranges, int64_t first, int32_t begin, int32_t end) {
  if (begin >= end) return;
  if (static_cast<int64_t>(ranges.size()) > first && ranges.back().end == begin) {
    ranges.back().end = end;
  } else {
    ranges.push_back({begin, end});
  }
}

// What a tile sees lies among the ancestors of its first row's span, or between that span's start and the last row.
inline void append_visible_keys(const SpanLayout& layout, int64_t first_span, QueryTile& tile,
                                std::vector<TokenRange>& ranges) {
  tile.range_begin = ranges.size();
  const Span& first = layout.spans[first_span];
  const int32_t* rows = layout.rows + tile.row_begin;
  const auto append_near = [&](int32_t begin, int32_t end) {
    if (begin < end) append_range(ranges, tile.range_begin, layout.first_within(begin, end, rows[0]), end);
  };
  for (int32_t r = first.run_begin; r < first.run_end; ++r) append_near(layout.runs[r].begin, layout.runs[r].end);
  const int32_t* rows_end = layout.rows + tile.row_end;
  for (int64_t s = first_span; s < layout.num_spans && layout.spans[s].row_begin < tile.row_end; ++s) {
    const Span& span = layout.spans[s];
    if (span.start == span.end) continue;
    const int32_t* beyond = std::lower_bound(rows, rows_end, layout.q_hi[span.start]);
    if (beyond == rows || beyond[-1] < span.start) continue;
    append_near(span.start, span.causal ? std::min(span.end, beyond[-1] + 1) : span.end);
  }
  tile.range_end = ranges.size();
  int64_t keys = 0;
  for (int64_t r = tile.range_begin; r < tile.range_end; ++r) keys += ranges[r].end - ranges[r].begin;
  tile.pairs = keys * (tile.row_end - tile.row_begin);
}

// Rows from `row` on that are a tile, at most up to `limit`. Under a window they are on one path, and next to each other as
// far as it goes: the rows that see a key, and the keys of a range that a row sees, are then consecutive.
inline int64_t tile_end(const SpanLayout& layout, int64_t row, int64_t limit) {
  if (layout.window == 0) return limit;
  while (++row < limit) {
    const int32_t before = layout.rows[row - 1], token = layout.rows[row];
    if (token >= layout.q_hi[before] || layout.positions[token] - layout.positions[before] > layout.window) break;
  }
  return row;
}

// Cuts long documents so that no unit is much more than 1/32 of the work. It depends on the layout only, never on the
// number of threads, and so do the sums.
inline void append_units(TilePlan& plan, int64_t kv_heads) {
  constexpr int64_t MIN_PAIRS = 1 << 18;
  int64_t total = 0;
  for (const QueryTile& tile : plan.tiles) total += tile.pairs;
  const int64_t target = std::max(MIN_PAIRS, total * kv_heads / 32);
  for (int64_t d = 0; d < static_cast<int64_t>(plan.documents.size()); ++d) {
    const Document& document = plan.documents[d];
    int64_t pairs = 0, begin = document.tile_begin, nth = 0;
    int64_t key_begin = document.key_end, key_end = document.key_begin;
    for (int64_t t = document.tile_begin; t < document.tile_end; ++t) {
      pairs += plan.tiles[t].pairs;
      key_begin = std::min<int64_t>(key_begin, plan.ranges[plan.tiles[t].range_begin].begin);
      key_end = std::max<int64_t>(key_end, plan.ranges[plan.tiles[t].range_end - 1].end);
      const bool last = t + 1 == document.tile_end;
      if (pairs < target && !last) continue;
      const bool whole = begin == document.tile_begin && last;
      if (whole) key_begin = document.key_begin, key_end = document.key_end;
      plan.units.push_back({d, nth++, begin, t + 1, key_begin, key_end, whole, last});
      begin = t + 1;
      pairs = 0;
      key_begin = document.key_end, key_end = document.key_begin;
    }
  }
}

inline std::vector<uint8_t> frozen_keys(const SpanLayout& layout) {
  std::vector<uint8_t> frozen;
  for (int64_t s = 0; s < layout.num_spans; ++s) {
    const Span& span = layout.spans[s];
    if (!span.frozen) continue;
    frozen.resize(layout.length);
    std::fill(frozen.begin() + span.start, frozen.begin() + span.end, uint8_t(1));
  }
  return frozen;
}

inline TilePlan plan_tiles(const SpanLayout& layout, int64_t rows_per_tile, int64_t kv_heads) {
  TilePlan plan;
  plan.frozen = frozen_keys(layout);
  int64_t s = 0;
  while (s < layout.num_spans) {
    const int64_t root = s;
    Document document{layout.spans[s].start, layout.spans[s].end, static_cast<int64_t>(plan.tiles.size()), 0};
    // A span with ancestors continues the document; an empty span may say so of none.
    for (++s; s < layout.num_spans; ++s) {
      const Span& span = layout.spans[s];
      if (span.run_begin == span.run_end && span.start < span.end) break;
      document.key_end = span.end;
    }
    const int64_t row_end = layout.spans[s - 1].row_end;
    int64_t first_span = root;
    for (int64_t row = layout.spans[root].row_begin; row < row_end;) {
      while (layout.spans[first_span].row_end <= row) ++first_span;
      const int64_t limit = layout.spans[first_span].invariant ? layout.spans[first_span].row_end : row_end;
      QueryTile tile{row, tile_end(layout, row, std::min(row + rows_per_tile, limit)), 0, 0, 0};
      row = tile.row_end;
      append_visible_keys(layout, first_span, tile, plan.ranges);
      LVRPO_CHECK(tile.range_begin < tile.range_end, "rows of span ", first_span, " see no key");
      int64_t seen = document.key_begin;
      for (int64_t r = tile.range_begin; r < tile.range_end; ++r) {
        LVRPO_CHECK(plan.ranges[r].begin >= seen && plan.ranges[r].end <= document.key_end, "runs of span ", first_span,
                    " do not ascend inside its document");
        seen = plan.ranges[r].end;
      }
      plan.tiles.push_back(tile);
    }
    document.tile_end = plan.tiles.size();
    plan.documents.push_back(document);
  }
  append_units(plan, kv_heads);
  return plan;
}

}  // namespace lvrpo
