from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.layouts import bagel_packs, dense_bagel, dense_forest, forests

from lvrpo.masks import SpanMask
from lvrpo.masks.tables import SpanColumn


def check_tables(mask: SpanMask) -> None:
    """Everything the kernels read agrees with the dense mask."""
    dense = mask.to_dense()
    full = dense if mask.num_queries == mask.length else None
    if full is not None:
        row = torch.arange(mask.length)[:, None]
        assert torch.equal(full, (mask.q_lo <= row) & (row < mask.q_hi))
        assert bool((mask.q_lo.diff() >= 0).all())
        assert bool(full.diagonal().all())
    assert mask.q_lo.dtype == mask.rows.dtype == mask.spans.dtype == mask.runs.dtype == torch.int32
    for begin, end in zip(mask.documents, mask.documents[1:], strict=False):
        inside = (mask.rows >= begin) & (mask.rows < end)
        assert not dense[inside, :begin].any()
        assert not dense[inside, end:].any()
    for start, end, causal, run, run_end, row, row_end, *_ in mask.spans.tolist():
        seen = torch.zeros(mask.length, dtype=torch.bool)
        for first, last in mask.runs[run:run_end].tolist():
            assert first < last
            assert not seen[max(0, first - 1) : last].any(), "runs overlap or are not merged"
            seen[first:last] = True
        assert not seen[start:].any()
        for query in range(row, row_end):
            position = int(mask.rows[query])
            assert start <= position < end
            own = seen.clone()
            own[start : position + 1 if causal else end] = True
            assert torch.equal(dense[query], own)


@given(forests())
@settings(max_examples=200, deadline=None)
def test_forest_matches_its_definition(layout):
    mask = SpanMask.from_spans(*layout)
    assert torch.equal(mask.to_dense(), dense_forest(*layout))
    assert (mask.parents, mask.modes) == (tuple(layout[1]), tuple(layout[2]))
    check_tables(mask)


@given(bagel_packs())
@settings(max_examples=200, deadline=None)
def test_bagel_pack_matches_its_definition(pack):
    mask = SpanMask.from_bagel(*pack)
    assert torch.equal(mask.to_dense(), dense_bagel(*pack))
    check_tables(mask)


@given(forests(), st.data())
@settings(max_examples=50, deadline=None)
def test_selected_queries_keep_their_rows(layout, data):
    mask = SpanMask.from_spans(*layout)
    rows = [row for row in range(mask.length) if data.draw(st.booleans())]
    selected = mask.select_queries(rows)
    assert torch.equal(selected.to_dense(), mask.to_dense()[rows])
    assert selected.num_queries == len(rows)
    check_tables(selected)
    spans = [span for span in range(mask.num_spans) if data.draw(st.booleans())]
    offsets = mask.span_offsets
    rows = [row for span in spans for row in range(offsets[span], offsets[span + 1])]
    again = selected.select_spans(spans)
    assert torch.equal(again.to_dense(), mask.to_dense()[rows])


def test_groups_share_their_prompt_and_nothing_else():
    question = ([(3, "full"), (2, "causal")], [[(2, "causal")], [], [(1, "causal"), (2, "full")]])
    drawing = ([(2, "causal")], [[(4, "full")], [(4, "full")]])
    mask = SpanMask.from_groups([question, drawing])
    lengths = [3, 2, 2, 1, 2, 2, 4, 4]
    parents = [-1, 0, 1, 1, 3, -1, 5, 5]
    modes = ["full", "causal", "causal", "causal", "full", "causal", "full", "full"]
    assert torch.equal(mask.to_dense(), dense_forest(lengths, parents, modes))
    assert mask.span_offsets == (0, 3, 5, 7, 8, 10, 12, 16, 20)
    assert mask.documents == (0, 10, 20)
    # The completions of a group share one list of ranges; touching ranges are merged.
    assert mask.runs.tolist() == [[0, 3], [0, 5], [0, 5], [7, 8], [10, 12]]
    assert mask.spans[[2, 3, 6, 7], SpanColumn.RUN_BEGIN].tolist() == [1, 1, 4, 4]
    assert mask.spans[[2, 3, 6, 7], SpanColumn.RUN_END].tolist() == [2, 2, 5, 5]


def test_cu_seqlens():
    causal = SpanMask.from_cu_seqlens(torch.tensor([0, 2, 2, 5]))
    assert torch.equal(causal.to_dense(), dense_forest([2, 0, 3], [-1] * 3, ["causal"] * 3))
    full = SpanMask.from_cu_seqlens([0, 2, 5], causal=False)
    assert torch.equal(full.to_dense(), dense_forest([2, 3], [-1] * 2, ["full"] * 2))


def test_padding_sees_nothing():
    mask = SpanMask.from_cu_seqlens([0, 2, 5])
    padded = mask.pad_to(9)
    assert torch.equal(padded.to_dense()[:5, :5], mask.to_dense())
    assert not padded.to_dense()[5:].any()
    assert not padded.to_dense()[:, 5:].any()
    assert bool((padded.q_lo.diff() >= 0).all())
    assert padded.documents == (0, 2, 5, 9)
    assert mask.pad_to(5) is mask


def test_to_moves_every_tensor():
    moved = SpanMask.from_cu_seqlens([0, 3]).to("meta")
    tensors = (moved.q_lo, moved.q_hi, moved.rows, moved.spans, moved.runs)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.length == moved.num_queries == 3


BAD = {
    "one parent short": (([1, 2], [-1], ["full"] * 2), "2 lengths, 1 parents and 2 modes"),
    "negative length": (([1, -2], [-1, 0], ["full"] * 2), "span 1 has length -2"),
    "unknown mode": (([1, 1], [-1, 0], ["full", "noise"]), "span 1 has mode 'noise'"),
    "own parent": (([1, 1], [-1, 1], ["full"] * 2), "span 1 has parent 1"),
    "later parent": (([1, 1], [-1, 5], ["full"] * 2), "span 1 has parent 5"),
    "parent below -1": (([1, 1], [-1, -2], ["full"] * 2), "span 1 has parent -2"),
    "not in preorder": (([1] * 4, [-1, 0, 0, 1], ["full"] * 4), "span 3 has parent 1.*preorder"),
    "fraction": (([1, 1.5], [-1, 0], ["full"] * 2), r"lengths\[1\] is 1.5"),
    "parent is a name": (([1], ["root"], ["full"]), r"parents\[0\] is 'root'"),
    "more than int32": (([1 << 30] * 2, [-1, 0], ["full"] * 2), "add up to 2147483648 tokens"),
    "finished document": (([1] * 3, [-1, -1, 0], ["full"] * 3), "span 2 has parent 0.*preorder"),
}


@pytest.mark.parametrize(("layout", "message"), BAD.values(), ids=BAD.keys())
def test_bad_spans_are_named(layout, message):
    with pytest.raises(ValueError, match=message):
        SpanMask.from_spans(*layout)


def test_bad_builders_and_selections():
    with pytest.raises(ValueError, match=r"cu_seqlens starts with \[1\]"):
        SpanMask.from_cu_seqlens([1, 4])
    with pytest.raises(ValueError, match="span 1 has length -1"):
        SpanMask.from_cu_seqlens([0, 4, 3])
    with pytest.raises(ValueError, match="split 1 ends at 6, beyond its sample 0, which ends at 5"):
        SpanMask.from_bagel([3, 3], ["causal", "full"], [5, 1])
    with pytest.raises(ValueError, match="splits add up to 6 tokens, the samples to 5"):
        SpanMask.from_bagel([3, 2, 1], ["causal"] * 3, [5])
    with pytest.raises(ValueError, match="3 split_lens, 2 attn_modes"):
        SpanMask.from_bagel([3, 2, 1], ["causal"] * 2, [6])
    with pytest.raises(ValueError, match="span 0 has mode 'casual'"):
        SpanMask.from_bagel([3], ["casual"], [3])
    mask = SpanMask.from_cu_seqlens([0, 4])
    with pytest.raises(ValueError, match="rows must be strictly ascending"):
        mask.select_queries([2, 1])
    with pytest.raises(ValueError, match=r"rows go from 1 to 4, expected \[0, 4\)"):
        mask.select_queries([1, 4])
    with pytest.raises(ValueError, match="cannot pad 4 rows to 3"):
        mask.pad_to(3)
    with pytest.raises(ValueError, match="pad the mask before"):
        mask.select_queries([1]).pad_to(6)
    with pytest.raises(ValueError, match="export the mask before"):
        mask.select_queries([1]).to_flashmask()
    with pytest.raises(ValueError, match=r"rows is torch.int64 of shape \(1, 1\)"):
        mask.select_queries(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="rows is on meta"):
        mask.select_queries(torch.tensor([1], device="meta"))
