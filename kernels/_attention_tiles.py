"""Tiles of queries and keys under a SpanMask: what they hold, and what they see of each other."""

import triton
import triton.language as tl

from lvrpo.kernels._primitives import LOG2E, as_scalar, tanh


@triton.jit
def first_after(ends_ptr, stride, count, value):
    """The first index whose end is greater than `value`, or `count`; ends never decrease."""
    low = tl.full([], 0, tl.int32)
    high = low + count
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
    z = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=scale.dtype) * scale
    t = z
    if HAS_SOFTCAP:
        t = tanh(z / softcap)
        z = softcap * t
    return z * LOG2E, t


@triton.jit
def visible(q_lo_ptr, q_hi_ptr, first, end, row, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K]: whether each row sees the keys from `first`."""
    key = first + tl.arange(0, BLOCK_K)
    lo = tl.load(q_lo_ptr + key, mask=key < end, other=0)
    hi = tl.load(q_hi_ptr + key, mask=key < end, other=0)
    return (lo[None, :] <= row[:, None]) & (row[:, None] < hi[None, :])


@triton.jit
def row_tile(rows_ptr, spans_ptr, queries, num_spans, first, BLOCK_Q: tl.constexpr):
    """Of the query tile at `first`: its span, its first and last buffer row, the end of its keys.

    Also how many of its own span's keys all rows of the tile see, -1 when it spans several spans.
    """
    last = tl.minimum(first + BLOCK_Q, queries) - 1
    # Columns of a span: first token, end, causal, begin and end in `runs`, begin and end in `rows`.
    span = first_after(spans_ptr + 6, 7, num_spans, first)
    last_span = tl.minimum(first_after(spans_ptr + 6, 7, num_spans, last), num_spans - 1)
    first_row = tl.load(rows_ptr + first)
    last_row = tl.load(rows_ptr + last)
    start = tl.load(spans_ptr + 7 * tl.minimum(span, num_spans - 1))
    end = tl.load(spans_ptr + 7 * last_span + 1)
    causal = tl.load(spans_ptr + 7 * last_span + 2) != 0
    stop = tl.where(causal, tl.minimum(end, last_row + 1), end)
    together = tl.where(causal, first_row + 1, end)
    return span, start, stop, tl.where(span == last_span, together, -1)


@triton.jit
def segment(runs_ptr, run, run_end, start, stop, together, BLOCK_K: tl.constexpr):
    """The keys of the tile's next range: its first, where whole visible tiles end, its end.

    The ranges of the ancestors come first, and after them the tile's own stretch of the buffer.
    """
    begin, end, seen_by_all = start, stop, together
    if run < run_end:
        begin = tl.load(runs_ptr + 2 * run)
        end = tl.load(runs_ptr + 2 * run + 1)
        seen_by_all = tl.where(together < 0, begin, end)
    whole = begin + tl.maximum(seen_by_all - begin, 0) // BLOCK_K * BLOCK_K
    return begin, whole, end


@triton.jit
def score_gradient(z, t, lse, dp, delta, HAS_SOFTCAP: tl.constexpr):
    """Probabilities, and d loss / d score before the cap and the scale."""
    p = tl.exp2(z - lse)
    ds = p * (dp - delta)
    if HAS_SOFTCAP:
        ds = ds * (1.0 - t) * (1.0 + t)
    return p, ds
