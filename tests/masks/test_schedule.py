"""Every query is in one tile, every pair of a live key and a row that sees it in one work item."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masks.layouts import masks

from lvrpo.masks import SpanMask
from lvrpo.masks import schedule as _mask_schedule
from lvrpo.masks.positions import position_ids, target_index
from lvrpo.masks.tables import SpanColumn


def small(tile: int, rows: int = 1 << 20, parts: int = 1 << 20):
    """Limits that small masks reach."""
    return patch.multiple(_mask_schedule, TILE=tile, ROWS=rows, PARTS=parts)


@given(masks() | masks(windows=True), st.sampled_from([1, 3, 4, 128]), st.booleans())
def test_query_tiles(mask, tile, invariant):
    mask = mask.packing_invariant() if invariant else mask
    with small(tile):
        tiles = _mask_schedule.schedule(mask).query_tiles
    assert tiles.dtype == torch.int32
    rows = sorted(row for begin, end, *_ in tiles.tolist() for row in range(begin, end))
    assert rows == list(range(mask.num_queries))
    dense, offsets = mask.to_dense(), list(pairwise(mask.span_offsets))
    for begin, end, first, last in tiles.tolist():
        assert 0 < end - begin <= tile
        assert all(not begin < edge < end for edge in mask.document_rows)
        for row, span in ((begin, first), (end - 1, last)):
            buffer_row = int(mask.rows[row])
            if span < 0:
                assert buffer_row >= mask.span_offsets[-1]
            else:
                assert offsets[span][0] <= buffer_row < offsets[span][1]
        assert first == last or not invariant
    # Keys that the first row's ancestors and the buffer up to the last one hold.
    seen = [int(dense[begin:end].any(0).sum()) for begin, end, *_ in tiles.tolist()]
    if tile == 1:
        assert seen == sorted(seen, reverse=True)


@given(
    masks() | masks(windows=True),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([1, 2, 5, 1000]),
    st.data(),
)
def test_key_work(mask, tile, rows, data):
    spans = st.sets(st.integers(0, mask.num_spans - 1)) if mask.num_spans else st.just(set())
    mask = mask.freeze(sorted(data.draw(spans)))
    with small(tile, rows):
        schedule = _mask_schedule.schedule(mask)
    work = schedule.key_work.tolist()
    covered = torch.zeros(mask.num_queries, mask.length, dtype=torch.int64)
    near = torch.ones(mask.num_queries, mask.length, dtype=torch.bool)
    if mask.window:
        near = mask.positions[mask.rows][:, None] - mask.positions < mask.window
    slices: list[tuple[int, list[list[int]]]] = []
    for begin, end, first, last, _, _ in work:
        assert 0 < end - begin <= tile
        assert all(not begin < edge < end for edge in mask.documents)
        ranges = schedule.key_rows[first:last].tolist()
        slices.append((begin, ranges))
        assert 0 < sum(row_end - row_begin for row_begin, row_end, _ in ranges) <= rows
        for row_begin, row_end, near_end in ranges:
            assert row_begin < row_end
            covered[row_begin:row_end, begin:end] += 1
            assert near[row_begin : min(row_end, near_end), begin:end].all()
            # All of a document's rows do, which no window cuts.
            assert mask.window or near_end >= row_end
    assert sum(len(ranges) for _, ranges in slices) == len(schedule.key_rows)
    live = mask.to_dense() & ~mask.frozen_keys()
    assert (covered[live] == 1).all()
    assert (covered <= 1).all()
    assert not covered[:, mask.frozen_keys()].any()
    # Parts of a tile follow one another, before all that are whole.
    parts = [row for row in work if row[5] > 1]
    assert schedule.key_parts.tolist() == parts == work[: len(parts)]
    for row, after in pairwise(work):
        if row[4] + 1 < row[5]:
            assert after[:2] == row[:2]
            assert after[4:] == [row[4] + 1, row[5]]
        else:
            assert after[4] == 0


def test_the_heaviest_come_first():
    """A prompt's keys, which all completions see; and the rows of the longest completion."""
    mask = SpanMask.from_groups([([(200, "full")], [[(300, "causal")], [(500, "causal")]])])
    schedule = _mask_schedule.schedule(mask)
    assert schedule.key_work[0].tolist() == [0, 128, 0, 1, 0, 1]
    assert schedule.key_rows[0].tolist() == [0, 1000, 1000]
    rows = schedule.key_rows[:, 1] - schedule.key_rows[:, 0]
    assert (rows.diff() <= 0).all()
    assert schedule.query_tiles[0, :2].tolist() == [896, 1000]


def test_a_long_document_is_not_cut_into_more_and_more_parts():
    lengths = [1 << power for power in range(12, 18)]
    parts = [
        len(_mask_schedule.schedule(SpanMask.from_cu_seqlens([0, length])).key_parts)
        for length in lengths
    ]
    assert max(parts) <= 2 * _mask_schedule.PARTS
    assert parts[-1] == 0


def test_a_moved_mask_has_the_schedule_of_the_mask_on_the_host():
    mask = SpanMask.from_groups([([(9, "causal")], [[(4, "full")]] * 3)])
    moved = mask.to("meta").freeze([1]).select_spans([1, 3]).packing_invariant()
    expected = mask.freeze([1]).select_spans([1, 3]).packing_invariant()
    assert moved.frozen == expected.frozen == (1,)
    assert moved.invariant
    for ours, table in zip(moved.schedule, _mask_schedule.schedule(expected), strict=True):
        assert ours.is_meta
        assert ours.shape == table.shape
    for name in ("q_lo", "q_hi", "rows", "spans", "runs"):
        assert torch.equal(getattr(moved.to("cpu"), name), getattr(expected, name))
        assert getattr(moved, name).shape == getattr(expected, name).shape


def test_a_mask_is_laid_out_on_the_host_whatever_the_default_device():
    with torch.device("meta"):
        mask = SpanMask.from_groups([([(9, "causal")], [[(4, "full")]] * 3)])
        changed = mask.freeze([1]).select_spans([1, 3])
        types = SpanMask.from_token_types([0, 0, 1, 1], [0, 4])
        schedule = _mask_schedule.schedule(mask)
        helpers = position_ids(mask), target_index(mask, [0]).row_index, mask.to_row_intervals()
    assert all(not helper.is_meta for helper in helpers)
    for found in (mask, changed, types):
        assert found.spans.device.type == found.rows.device.type == "cpu"
    assert schedule.key_work.device.type == "cpu"


MASK = SpanMask.from_groups([([(9, "causal")], [[(4, "full")]] * 3)])


@pytest.mark.parametrize("spans", [torch.tensor([0, 2]), (span for span in (2, 0)), [2, 0, 0]])
def test_spans_to_freeze_come_in_any_form(spans):
    mask = MASK.freeze(spans)
    assert mask.frozen == (0, 2)
    assert mask.spans[:, SpanColumn.FROZEN].tolist() == [1, 0, 1, 0]


BAD = {
    "no such span": (lambda: MASK.freeze([0, 4]), "there is no span 4 among 4"),
    "negative span": (lambda: MASK.freeze([-1]), "there is no span -1 among 4"),
    "a bool": (lambda: MASK.freeze([True]), r"spans\[0\] is True, expected an integer"),
    "a name": (lambda: MASK.freeze(["a"]), r"spans\[0\] is 'a', expected an integer"),
    "not a sequence": (lambda: MASK.select_spans(1), "spans is 1, expected integers"),
    "half a span": (lambda: MASK.select_spans([1.5]), r"spans\[0\] is 1.5, expected an integer"),
    "selected span": (lambda: MASK.select_spans([7]), "there is no span 7 among 4"),
    "half a row": (lambda: MASK.select_queries([0.5]), r"rows\[0\] is 0.5, expected an integer"),
    "rows as a mask": (
        lambda: MASK.select_queries(torch.ones(21, dtype=torch.bool)),
        "rows is torch.bool",
    ),
    "half a token": (lambda: MASK.pad_to(30.5), r"length\[0\] is 30.5, expected an integer"),
    "negative sample": (
        lambda: SpanMask.from_bagel([2, 2], ["causal", "causal"], [5, -1]),
        "sample 1 has length -1",
    ),
    "a number for a chain": (
        lambda: SpanMask.from_groups([(8, [])]),
        "the prompt of group 0 is 8, expected",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_read_back_from_a_device():
    mask = SpanMask.from_groups([([(9, "causal")], [[(4, "full")]] * 3)]).to("meta")
    changed = mask.freeze([0]).select_queries([2, 11]).packing_invariant()
    assert changed.schedule.query_tiles.device.type == changed.spans.device.type == "meta"
    assert mask.pad_to(40).length == 40
