"""Tiles of queries and keys under a SpanMask: what they hold, and what they see of each other."""

import triton
import triton.language as tl

from lvrpo.kernels._primitives import LOG2E, as_scalar, tanh
from lvrpo.masks.schedule import TILE as SCHEDULED
from lvrpo.masks.tables import SpanColumn

#: Rows or keys of a tile of the schedule.
TILE = tl.constexpr(SCHEDULED)
SPAN_COLUMNS = tl.constexpr(len(SpanColumn))
START, END, CAUSAL, RUN_BEGIN, RUN_END, ROW_END = (
    tl.constexpr(int(column))
    for column in (
        *(SpanColumn.START, SpanColumn.END, SpanColumn.CAUSAL),
        *(SpanColumn.RUN_BEGIN, SpanColumn.RUN_END, SpanColumn.ROW_END),
    )
)


@triton.jit
def first_after(ends_ptr, stride, low, high, value):
    """The first index of [low, high) whose end is greater than `value`, or high; ends ascend."""
    low, high = as_scalar(low, tl.int32), as_scalar(high, tl.int32)
    while low < high:
        middle = (low + high) // 2
        greater = tl.load(ends_ptr + middle * stride) > value
        high = tl.where(greater, middle, high)
        low = tl.where(greater, low, middle + 1)
    return low


@triton.jit
def load_tile(
    ptr, first, end, stride, MASKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK]: rows of a head from `first`, zero from `end` on and beyond its width."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    # One 64-bit address, and 32-bit offsets that no loop changes, take the fewest registers.
    source = ptr + as_scalar(first, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if MASKED:
        return tl.load(
            source, mask=(first + row < end)[:, None] & (column < WIDTH)[None, :], other=0.0
        )
    if BLOCK != WIDTH:
        return tl.load(source, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(source)


@triton.jit
def scores(a, b, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in bits of the rows of a with the rows of b, [a, b], and tanh of the capped ones."""
    z = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=scale.dtype)
    t = z
    # Scalars are multiplied first: one product for each score.
    if HAS_SOFTCAP:
        t = tanh(z * (scale / softcap))
        z = (softcap * LOG2E) * t
    else:
        z = z * (scale * LOG2E)
    return z, t


@triton.jit
def visible(bounds, first, end, queries, HAS_WINDOW: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K]: whether each row sees the keys from `first`."""
    q_lo_ptr, q_hi_ptr, positions_ptr, window = bounds
    row, position = queries
    key = first + tl.arange(0, BLOCK_K)
    lo = tl.load(q_lo_ptr + key, mask=key < end, other=0)
    hi = tl.load(q_hi_ptr + key, mask=key < end, other=0)
    sees = (lo[None, :] <= row[:, None]) & (row[:, None] < hi[None, :])
    if HAS_WINDOW:
        key_position = tl.load(positions_ptr + key, mask=key < end, other=0)
        sees &= position[:, None] - key_position[None, :] < window
    return sees


@triton.jit
def scheduled_queries(query_tiles_ptr, program, BLOCK_Q: tl.constexpr):
    """Queries (begin, end) of a program and its first and last span; empty beyond its tile."""
    tile_ptr = query_tiles_ptr + 4 * (program // (TILE // BLOCK_Q))
    first = tl.load(tile_ptr) + program % (TILE // BLOCK_Q) * BLOCK_Q
    end = tl.minimum(tl.load(tile_ptr + 1), first + BLOCK_Q)
    return first, end, tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)


@triton.jit
def load_queries(rows_ptr, bounds, index, inside, HAS_WINDOW: tl.constexpr):
    """Of each query: its row of the buffer, -1 beyond the last, and its position, if it matters."""
    _, _, positions_ptr, _ = bounds
    row = tl.load(rows_ptr + index, mask=inside, other=-1)
    position = row
    if HAS_WINDOW:
        position = tl.load(positions_ptr + row, mask=inside, other=0)
    return row, position


@triton.jit
def own_keys(rows_ptr, spans_ptr, first, queries_end, span, last_span):
    """What queries [first, queries_end) see from the first one's span on.

    Returns:
        That span, where its keys begin, where those of the last query end, and where those end that
        all of them see, -1 when the queries are in several spans.
    """
    ends_ptr = spans_ptr + ROW_END
    span = first_after(ends_ptr, SPAN_COLUMNS, span, last_span, first)
    last_span = first_after(ends_ptr, SPAN_COLUMNS, span, last_span, queries_end - 1)
    first_row = tl.load(rows_ptr + first)
    last_row = tl.load(rows_ptr + queries_end - 1)
    start = tl.load(spans_ptr + SPAN_COLUMNS * span + START)
    end = tl.load(spans_ptr + SPAN_COLUMNS * last_span + END)
    causal = tl.load(spans_ptr + SPAN_COLUMNS * last_span + CAUSAL) != 0
    stop = tl.where(causal, tl.minimum(end, last_row + 1), end)
    together = tl.where(causal, first_row + 1, end)
    return span, start, stop, tl.where(span == last_span, together, -1)


@triton.jit
def ancestors(spans_ptr, span):
    """The slice of `runs` that holds the tokens of a span's ancestors."""
    span_ptr = spans_ptr + SPAN_COLUMNS * span
    return tl.load(span_ptr + RUN_BEGIN), tl.load(span_ptr + RUN_END)


@triton.jit
def segment(
    runs_ptr, run, run_end, own, bounds, near, HAS_WINDOW: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The keys of the tile's next range: its first and its end, and whole visible tiles between.

    The ranges of the ancestors come first, and after them the tile's own stretch of the buffer.
    """
    start, stop, together = own
    begin, end, seen_by_all = start, stop, together
    if run < run_end:
        begin = tl.load(runs_ptr + 2 * run)
        end = tl.load(runs_ptr + 2 * run + 1)
        seen_by_all = tl.where(together < 0, begin, end)
    whole = begin
    if HAS_WINDOW:
        _, _, positions_ptr, _ = bounds
        some, all = near
        # Positions count up along a range.
        first = tl.load(positions_ptr + begin)
        near_all = begin + tl.maximum(all - first, 0)
        begin = tl.minimum(begin + tl.maximum(some - first, 0), end)
        whole = begin + tl.cdiv(near_all - begin, BLOCK_K) * BLOCK_K
    whole_end = whole + tl.maximum(seen_by_all - whole, 0) // BLOCK_K * BLOCK_K
    return begin, end, whole, whole_end


@triton.jit
def first_positions(seen_by, bounds, HAS_WINDOW: tl.constexpr):
    """The first positions within the window of some of the queries, and of all of them."""
    row, position = seen_by
    _, _, _, window = bounds
    if HAS_WINDOW:
        lowest = tl.min(tl.where(row < 0, 2147483647, position), axis=0)
        return lowest - window + 1, tl.max(position, axis=0) - window + 1
    return 0, 0


@triton.jit
def score_gradient(z, t, lse, dp, delta, HAS_SOFTCAP: tl.constexpr):
    """Probabilities, and d loss / d score before the cap and the scale."""
    p = tl.exp2(z - lse)
    ds = p * (dp - delta)
    if HAS_SOFTCAP:
        ds = ds * (1.0 - t) * (1.0 + t)
    return p, ds


@triton.jit
def over_keys(
    visit: tl.constexpr,
    state,
    queries,
    seen_by,
    source,
    tables,
    first,
    queries_end,
    spans,
    scale,
    softcap,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The state after `visit` of every tile of keys that a tile of queries sees.

    Args:
        visit: (state, queries, seen_by, key, end, source, scale, softcap, MASKED, ...) -> state.
        queries: what `visit` knows of the queries first, ..., queries_end - 1.
        seen_by: `load_queries` of them.
        source: of the keys: k, its stride, v, its stride, and their bounds: q_lo, q_hi, positions,
            window.
        tables: `rows`, `spans` and `runs` of the SpanMask.
        spans: the first and the last span of the queries; -1 in padding, which sees nothing.
    """
    rows_ptr, spans_ptr, runs_ptr = tables
    _, _, _, _, bounds = source
    span, last_span = spans
    if span >= 0:
        span, start, stop, together = own_keys(
            rows_ptr, spans_ptr, first, queries_end, span, last_span
        )
        near = first_positions(seen_by, bounds, HAS_WINDOW)
        run_begin, run_end = ancestors(spans_ptr, span)
        for run in range(run_begin, run_end + 1):
            begin, end, whole, whole_end = segment(
                runs_ptr, run, run_end, (start, stop, together), bounds, near, HAS_WINDOW, BLOCK_K
            )
            for key in range(whole, whole_end, BLOCK_K):
                state = visit(
                    state, queries, seen_by, key, end, source, scale, softcap, False, HAS_WINDOW,
                    HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
                )  # fmt: skip
            # What is left: after those, and before them where the window begins.
            edges = whole_end
            if HAS_WINDOW:
                edges -= whole - begin
            for edge in range(edges, end, BLOCK_K):
                key = edge
                if HAS_WINDOW:
                    key = tl.where(edge < whole_end, edge - (whole_end - whole), edge)
                state = visit(
                    state, queries, seen_by, key, end, source, scale, softcap, True, HAS_WINDOW,
                    HAS_SOFTCAP, PRECISION, WIDTH, V_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_K,
                )  # fmt: skip
    return state
