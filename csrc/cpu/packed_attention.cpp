// Attention over a SpanMask. A unit is a run of query tiles of one document and one key head; threads take units from a
// counter, in order, and the keys' gradients of a document cut into several units are added in that order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/packed_attention_call.h"
#include "cpu/packed_attention_careful.h"

namespace lvrpo {
namespace {

using std::optional;

const DeclareNames DECLARE("packed_attention", {}, {{"spans", Span::NAMES}});

template <typename scalar_t, typename acc>
void forward_tile(const Attention<scalar_t>& at, const QueryTile& tile, int64_t kv_head, int64_t first_of_group,
                  HeadRows<scalar_t> out, acc* lse, Arena<acc>& arena) {
  const Lanes lanes = at.lanes(tile, first_of_group);
  const int64_t head = kv_head * at.groups.per_kv + first_of_group, heads = at.groups.kv_heads * at.groups.per_kv;
  acc *q_rows = arena.take(lanes.padded * at.padded()), *k_copy = arena.take(BLOCK_KEYS * at.padded());
  acc* v_copy = arena.take(BLOCK_KEYS * at.v_padded());
  ForwardState<acc> state{arena.take(at.padded() * lanes.padded), arena.take(BLOCK_KEYS * lanes.padded),
                          arena.take(lanes.padded * at.v_padded()), arena.take(lanes.padded), arena.take(lanes.padded),
                          arena.take(lanes.padded), arena.take(lanes.padded)};
  load_lanes<scalar_t, acc>(at.q.at(tile.row_begin, head), at.q.row_stride, at.q.head_stride, lanes, at.q.width,
                            at.scale, q_rows, state.q_t);
  for (const bool careful : {false, true}) {
    std::fill_n(state.out, lanes.padded * at.v_padded(), acc(0));
    std::fill_n(state.max, lanes.padded, -std::numeric_limits<acc>::infinity());
    std::fill_n(state.sum, lanes.padded, acc(0));
    KeyBlock block;
    KeyCursor cursor(at.layout, at.plan, tile, lanes);
    while (cursor.next(block)) {
      const Rows<acc> k = key_rows(at.k.at(0, kv_head), at.k.row_stride, block, at.k.width, false, k_copy);
      Rows<acc> v = key_rows(at.v.at(0, kv_head), at.v.row_stride, block, at.v.width, true, v_copy);
      bool broken[BLOCK_KEYS] = {};
      if (careful) v = finite_rows(block, v, at.v.width, v_copy, broken);
      forward_block(block, k, v, at.q.width, at.v.width, lanes, at.softcap, state);
      if (careful) spoil_lanes(block, broken, at.v_padded(), state.out);
    }
    finish_forward(at.v.width, lanes, state);
    if (all_finite(state.out, lanes.count * at.v_padded())) break;
  }
  store_lanes<scalar_t, acc>(state.out, acc(1), lanes, at.v.width, out.at(tile.row_begin, head), out.row_stride,
                             out.head_stride);
  for (int64_t m = 0; m < lanes.count; ++m)
    lse[(tile.row_begin + m / lanes.heads) * heads + head + m % lanes.heads] = state.shift[m];
}

// Rows of documents come first; what is left is padding.
int64_t rows_of_documents(const SpanLayout& layout) {
  return layout.num_spans ? layout.spans[layout.num_spans - 1].row_end : 0;
}

std::tuple<Tensor, Tensor> packed_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor q_lo, Tensor q_hi, Tensor rows,
                                                Tensor spans, Tensor runs, optional<Tensor> positions,
                                                optional<Tensor>, Tensor numbers_tensor) {
  const Numbers numbers(numbers_tensor);
  const SpanLayout layout = span_layout(q_lo, q_hi, rows, spans, runs, positions, numbers.window);
  check_inputs(q, k, v, layout);
  q = with_contiguous_heads(q);
  k = with_contiguous_heads(k);
  v = with_contiguous_heads(v);
  const int64_t heads = q.size(1), v_width = v.size(2);
  Tensor out = torch::stable::new_empty(q, {q.size(0), heads, v_width});
  const ScalarType lse_dtype = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor lse = torch::stable::new_empty(q, {q.size(0), heads}, lse_dtype);

  LVRPO_DISPATCH_FLOATING(q.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const Attention<scalar_t> at(q, k, v, layout, numbers);
    const HeadRows<scalar_t> out_rows = mutable_head_rows<scalar_t>(out);
    acc* lse_data = lse.mutable_data_ptr<acc>();
    const int64_t padding = rows_of_documents(layout);
    std::fill(out_rows.at(padding, 0), out_rows.at(q.size(0), 0), scalar_t(0));
    std::fill(lse_data + padding * heads, lse_data + q.size(0) * heads, -std::numeric_limits<acc>::infinity());
    const int64_t arena_size = BLOCK_LANES * (3 * at.padded() + 2 * at.v_padded() + BLOCK_KEYS + 4) + 256;
    for_each_job<acc>(at.plan, at.groups.kv_heads, arena_size, [&](int64_t job, Arena<acc>& arena) {
      const WorkUnit& unit = at.plan.units[job / at.groups.kv_heads];
      acc* mark = arena.mark();
      for (int64_t t = unit.tile_begin; t < unit.tile_end; ++t) {
        for (int64_t first = 0; first < at.groups.per_kv; first += at.groups.per_tile) {
          arena.rewind(mark);
          forward_tile<scalar_t, acc>(at, at.plan.tiles[t], job % at.groups.kv_heads, first, out_rows, lse_data, arena);
        }
      }
    });
  });
  return {out, lse};
}

template <typename scalar_t>
struct Upstream {
  using acc = acc_t<scalar_t>;
  HeadRows<const scalar_t> dout, out;
  const acc *dlse, *lse;  // [Lq, Hq]; dlse may be null
};

// Whether dq is finite.
template <typename scalar_t, typename acc>
bool backward_tile(const Attention<scalar_t>& at, const Upstream<scalar_t>& up, const QueryTile& tile, int64_t kv_head,
                   int64_t first_of_group, HeadRows<scalar_t> dq, acc* dk, acc* dv, int64_t first_key,
                   bool careful, Arena<acc>& arena) {
  const Lanes lanes = at.lanes(tile, first_of_group);
  const int64_t head = kv_head * at.groups.per_kv + first_of_group, heads = at.groups.kv_heads * at.groups.per_kv;
  acc *k_copy = arena.take(BLOCK_KEYS * at.padded()), *v_copy = arena.take(BLOCK_KEYS * at.v_padded());
  BackwardState<acc> state{arena.take(lanes.padded * at.padded()),
                           arena.take(at.padded() * lanes.padded),
                           arena.take(lanes.padded * at.v_padded()),
                           arena.take(at.v_padded() * lanes.padded),
                           arena.take(BLOCK_KEYS * lanes.padded),
                           arena.take(BLOCK_KEYS * lanes.padded),
                           arena.take(GEMM_ROWS * std::max(at.padded(), at.v_padded())),
                           arena.take(lanes.padded),
                           arena.take(lanes.padded),
                           arena.take(lanes.padded * at.padded()),
                           dk,
                           dv,
                           first_key};
  load_lanes<scalar_t, acc>(at.q.at(tile.row_begin, head), at.q.row_stride, at.q.head_stride, lanes, at.q.width,
                            at.scale, state.q, state.q_t);
  load_lanes<scalar_t, acc>(up.dout.at(tile.row_begin, head), up.dout.row_stride, up.dout.head_stride, lanes,
                            at.v.width, acc(1), state.dout, state.dout_t);
  std::fill_n(state.dq, lanes.padded * at.padded(), acc(0));
  std::fill_n(state.lse, lanes.padded, acc(0));
  std::fill_n(state.delta, lanes.padded, acc(0));
  for (int64_t m = 0; m < lanes.count; ++m) {
    const int64_t row = tile.row_begin + m / lanes.heads, column = head + m % lanes.heads;
    state.lse[m] = up.lse[row * heads + column];
    state.delta[m] = row_dot<scalar_t, acc>(state.dout + m * at.v_padded(), up.out.at(row, column), at.v.width) -
                     (up.dlse ? up.dlse[row * heads + column] : acc(0));
  }

  Care care;
  if (careful) {
    acc dlse[BLOCK_LANES] = {};
    for (int64_t m = 0; up.dlse && m < lanes.count; ++m)
      dlse[m] = up.dlse[(tile.row_begin + m / lanes.heads) * heads + head + m % lanes.heads];
    care.sort_lanes(lanes, at.padded(), at.v_padded(), dlse, state.q, state.dout, state.lse, state.delta);
    transpose(state.q, lanes.padded, at.padded(), state.q_t);
    transpose(state.dout, lanes.padded, at.v_padded(), state.dout_t);
  }

  KeyBlock block;
  KeyCursor cursor(at.layout, at.plan, tile, lanes);
  while (cursor.next(block)) {
    Rows<acc> k = key_rows(at.k.at(0, kv_head), at.k.row_stride, block, at.k.width, true, k_copy);
    Rows<acc> v = key_rows(at.v.at(0, kv_head), at.v.row_stride, block, at.v.width, false, v_copy);
    if (careful) {
      std::fill_n(care.broken, BLOCK_KEYS, false);
      k = finite_rows(block, k, at.k.width, k_copy, care.broken);
      v = finite_rows(block, v, at.v.width, v_copy, care.broken);
    }
    backward_scores(block, k, v, at.q.width, at.v.width, lanes, at.softcap, state);
    if (careful) care.finish(block, lanes, state.p, state.ds);
    add_gradients(block, k, at.q.width, at.v.width, lanes, state);
  }
  store_lanes<scalar_t, acc>(state.dq, at.scale, lanes, at.q.width, dq.at(tile.row_begin, head), dq.row_stride,
                             dq.head_stride);
  return all_finite(state.dq, lanes.count * at.padded());
}

// Zeroes rows [begin, end) of a contiguous gradient.
template <typename scalar_t>
void zero_rows(HeadRows<scalar_t> x, int64_t begin, int64_t end) {
  std::fill(x.at(begin, 0), x.at(end, 0), scalar_t(0));
}

// Sums over a unit's queries for its keys: dk [keys, D], then dv [keys, Dv].
template <typename scalar_t>
struct KeyGradients {
  using acc = acc_t<scalar_t>;
  HeadRows<scalar_t> dk, dv;
  int64_t padded, v_padded;

  void store(const acc* sums, int64_t keys, int64_t first_key, int64_t kv_head) const {
    const Lanes lanes{keys, 1, keys, keys};
    store_lanes<scalar_t, acc>(sums, acc(1), lanes, dk.width, dk.at(first_key, kv_head), dk.row_stride, 0);
    store_lanes<scalar_t, acc>(sums + keys * padded, acc(1), lanes, dv.width, dv.at(first_key, kv_head), dv.row_stride,
                               0);
  }
};

// The sums over all units of one document and key head. Units are added in order, each waiting for its turn, so that the
// bits do not depend on who is first, and a thread keeps no more than the sums it works on. Threads take units in order,
// too: the one whose turn it is has a thread.
template <typename acc>
class OrderedSum {
 public:
  // Before the threads begin: one that fails here would leave the others waiting.
  void allocate(int64_t size) { total_.resize(size); }

  // Calls add(total) once everything before the nth unit has been added; zeros at first.
  template <typename Add>
  void add(const WorkUnit& unit, const Add& add) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return next_ == unit.nth; });
    lock.unlock();
    add(total_.data());
    if (unit.last) std::vector<acc>().swap(total_);
    lock.lock();
    ++next_;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t next_ = 0;
  std::vector<acc> total_;
};

template <typename scalar_t>
void backward(const Attention<scalar_t>& at, const Upstream<scalar_t>& up, HeadRows<scalar_t> dq, HeadRows<scalar_t> dk,
              HeadRows<scalar_t> dv) {
  using acc = acc_t<scalar_t>;
  const TilePlan& plan = at.plan;
  const int64_t kv_heads = at.groups.kv_heads;
  const KeyGradients<scalar_t> gradients{dk, dv, at.padded(), at.v_padded()};
  const int64_t width = gradients.padded + gradients.v_padded;
  int64_t last_key = 0;
  for (const Document& document : plan.documents) {
    if (document.tile_begin == document.tile_end) {
      zero_rows(dk, document.key_begin, document.key_end);
      zero_rows(dv, document.key_begin, document.key_end);
    }
    last_key = document.key_end;
  }
  zero_rows(dk, last_key, at.layout.length);
  zero_rows(dv, last_key, at.layout.length);
  zero_rows(dq, rows_of_documents(at.layout), at.layout.num_queries);
  int64_t most_keys = 0;
  const auto totals = std::make_unique<OrderedSum<acc>[]>(plan.documents.size() * kv_heads);
  for (const WorkUnit& unit : plan.units) {
    const Document& document = plan.documents[unit.document];
    most_keys = std::max(most_keys, unit.key_end - unit.key_begin);
    for (int64_t h = 0; !unit.whole && unit.nth == 0 && h < kv_heads; ++h)
      totals[unit.document * kv_heads + h].allocate((document.key_end - document.key_begin) * width);
  }
  const int64_t arena_size = most_keys * width + BLOCK_LANES * (5 * width + 2 * BLOCK_KEYS) + 512;
  for_each_job<acc>(plan, kv_heads, arena_size, [&](int64_t job, Arena<acc>& arena) {
    const WorkUnit& unit = plan.units[job / kv_heads];
    const Document& document = plan.documents[unit.document];
    const int64_t kv_head = job % kv_heads, keys = unit.key_end - unit.key_begin;
    acc* dk_sums = arena.take(keys * width);
    acc* dv_sums = dk_sums + keys * gradients.padded;
    acc* mark = arena.mark();
    for (const bool careful : {false, true}) {
      std::fill_n(dk_sums, keys * width, acc(0));
      bool finite = true;
      for (int64_t t = unit.tile_begin; t < unit.tile_end; ++t) {
        for (int64_t first = 0; first < at.groups.per_kv; first += at.groups.per_tile) {
          arena.rewind(mark);
          finite &= backward_tile<scalar_t, acc>(at, up, plan.tiles[t], kv_head, first, dq, dk_sums, dv_sums,
                                                 unit.key_begin, careful, arena);
        }
      }
      if (finite && all_finite(dk_sums, keys * width)) break;
    }
    if (unit.whole) {
      gradients.store(dk_sums, keys, document.key_begin, kv_head);
      return;
    }
    const int64_t all_keys = document.key_end - document.key_begin, first = unit.key_begin - document.key_begin;
    totals[unit.document * kv_heads + kv_head].add(unit, [&](acc* total) {
      acc *dk_total = total + first * gradients.padded, *dv_total = total + all_keys * gradients.padded;
      add_values(dk_total, dk_sums, keys * gradients.padded);
      add_values(dv_total + first * gradients.v_padded, dv_sums, keys * gradients.v_padded);
      if (unit.last) gradients.store(total, all_keys, document.key_begin, kv_head);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_bwd(Tensor dout, optional<Tensor> dlse, Tensor q, Tensor k,
                                                        Tensor v, Tensor out, Tensor lse, Tensor q_lo, Tensor q_hi,
                                                        Tensor rows, Tensor spans, Tensor runs,
                                                        optional<Tensor> positions, optional<Tensor>, optional<Tensor>,
                                                        optional<Tensor>, optional<Tensor>, Tensor numbers_tensor) {
  const Numbers numbers(numbers_tensor);
  const SpanLayout layout = span_layout(q_lo, q_hi, rows, spans, runs, positions, numbers.window);
  check_inputs(q, k, v, layout);
  q = with_contiguous_heads(q);
  k = with_contiguous_heads(k);
  v = with_contiguous_heads(v);
  for (const Tensor* t : {&dout, &out}) {
    LVRPO_CHECK(t->dim() == 3, "dout and out must be [Lq, Hq, Dv]");
    check_dtype(*t, q.scalar_type(), "dout or out");
    check_size(*t, 0, q.size(0), "dout or out");
    check_size(*t, 1, q.size(1), "dout or out");
    check_size(*t, 2, v.size(2), "dout or out");
  }
  check_size(lse, 0, q.size(0), "lse");
  check_size(lse, 1, q.size(1), "lse");
  if (dlse) {
    check_dtype(*dlse, lse.scalar_type(), "dlse");
    check_size(*dlse, 0, q.size(0), "dlse");
    check_size(*dlse, 1, q.size(1), "dlse");
  }
  dout = with_contiguous_heads(dout);
  out = with_contiguous_heads(out);
  lse = torch::stable::contiguous(lse);
  if (dlse) dlse = torch::stable::contiguous(*dlse);
  Tensor dq = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor dv = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});

  LVRPO_DISPATCH_FLOATING(q.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const Attention<scalar_t> at(q, k, v, layout, numbers);
    const Upstream<scalar_t> up{head_rows<scalar_t>(dout), head_rows<scalar_t>(out),
                                dlse ? dlse->const_data_ptr<acc>() : nullptr, lse.const_data_ptr<acc>()};
    backward(at, up, mutable_head_rows<scalar_t>(dq), mutable_head_rows<scalar_t>(dk), mutable_head_rows<scalar_t>(dv));
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) {
  m.impl("packed_attention_fwd", TORCH_BOX(&lvrpo::packed_attention_fwd));
  m.impl("packed_attention_bwd", TORCH_BOX(&lvrpo::packed_attention_bwd));
}
