// One call of packed_attention: its tensors, how its heads share lanes, and how its work is shared out to threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "cpu/packed_attention_tile.h"

namespace lvrpo {

// Scratch of one thread, handed out in steps of 64 bytes.
template <typename acc>
class Arena {
 public:
  explicit Arena(int64_t capacity) : storage_(capacity + VECTOR<acc>) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    next_ = storage_.data() + (64 - address % 64) % 64 / sizeof(acc);
  }
  acc* mark() const { return next_; }
  void rewind(acc* mark) { next_ = mark; }
  acc* take(int64_t count) {
    acc* taken = next_;
    next_ += round_to_vector<acc>(count);
    return taken;
  }

 private:
  std::vector<acc> storage_;
  acc* next_;
};

// [rows, heads, width] with any strides but a contiguous last dimension.
template <typename scalar_t>
struct HeadRows {
  scalar_t* data;
  int64_t row_stride, head_stride, width;
  scalar_t* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

template <typename scalar_t>
HeadRows<const scalar_t> head_rows(const Tensor& t) {
  return {t.const_data_ptr<scalar_t>(), t.stride(0), t.stride(1), t.size(2)};
}

// Of a contiguous result. From its sizes, because torch gives a tensor without elements strides that are not 0.
template <typename scalar_t>
HeadRows<scalar_t> mutable_head_rows(Tensor& t) {
  return {t.mutable_data_ptr<scalar_t>(), t.size(1) * t.size(2), t.size(2), t.size(2)};
}

inline Tensor with_contiguous_heads(const Tensor& t) {
  return t.size(2) > 1 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t;
}

// Query heads per key head, and how they are laid out in lanes.
struct HeadGroups {
  int64_t kv_heads, per_kv, per_tile, rows_per_tile;
};

inline HeadGroups head_groups(const Tensor& q, const Tensor& k) {
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  LVRPO_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q has ", heads, " heads, not a multiple of k's ", kv_heads);
  const int64_t per_kv = heads / kv_heads, per_tile = std::clamp<int64_t>(per_kv, 1, BLOCK_LANES);
  return {kv_heads, per_kv, per_tile, BLOCK_LANES / per_tile};
}

inline void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const SpanLayout& layout) {
  LVRPO_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v must be [rows, heads, width]");
  check_size(q, 0, layout.num_queries, "q");
  check_size(k, 0, layout.length, "k");
  check_size(v, 0, layout.length, "v");
  check_size(v, 1, k.size(1), "v");
  check_size(k, 2, q.size(2), "k");
  check_dtype(k, q.scalar_type(), "k");
  check_dtype(v, q.scalar_type(), "v");
}

// Calls run(job, arena) once for each job = unit * kv_heads + kv_head, on as many threads as there is work for.
template <typename acc, typename Run>
void for_each_job(const TilePlan& plan, int64_t kv_heads, int64_t arena_size, const Run& run) {
  constexpr int64_t PAIRS_PER_THREAD = 1 << 12;
  const int64_t jobs = plan.units.size() * kv_heads;
  int64_t pairs = 0;
  for (const QueryTile& tile : plan.tiles) pairs += tile.pairs * kv_heads;
  const int64_t threads = std::min<int64_t>({jobs, pairs / PAIRS_PER_THREAD + 1, torch::stable::get_num_threads()});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Arena<acc> arena(arena_size);
    for (int64_t job = next++; job < jobs; job = next++) {
      acc* mark = arena.mark();
      run(job, arena);
      arena.rewind(mark);
    }
  });
}

struct Numbers {
  double scale, softcap;
  int64_t window;

  explicit Numbers(const Tensor& numbers) {
    check_dtype(numbers, ScalarType::Double, "numbers");
    check_contiguous(numbers, "numbers");
    check_size(numbers, 0, 3, "numbers");
    const double* values = numbers.const_data_ptr<double>();
    scale = values[0];
    softcap = values[1];
    window = static_cast<int64_t>(values[2]);
  }
};

// What both directions need of one call.
template <typename scalar_t>
struct Attention {
  using acc = acc_t<scalar_t>;
  HeadRows<const scalar_t> q, k, v;
  SpanLayout layout;
  TilePlan plan;
  HeadGroups groups;
  acc scale, softcap;

  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const SpanLayout& layout, const Numbers& numbers)
      : q(head_rows<scalar_t>(q)),
        k(head_rows<scalar_t>(k)),
        v(head_rows<scalar_t>(v)),
        layout(layout),
        groups(head_groups(q, k)),
        scale(static_cast<acc>(numbers.scale)),
        softcap(static_cast<acc>(numbers.softcap)) {
    plan = plan_tiles(layout, groups.rows_per_tile, groups.kv_heads);
  }

  int64_t padded() const { return round_to_vector<acc>(q.width); }
  int64_t v_padded() const { return round_to_vector<acc>(v.width); }

  Lanes lanes(const QueryTile& tile, int64_t first_of_group) const {
    const int64_t rows = tile.row_end - tile.row_begin;
    const int64_t heads = std::min(groups.per_tile, groups.per_kv - first_of_group);
    return {rows, heads, rows * heads, round_to_vector<acc>(rows * heads)};
  }
};

}  // namespace lvrpo
