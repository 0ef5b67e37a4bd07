from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lvrpo.masks import SpanMask

Layout = tuple[list[int], list[int], list[str]]


def random_forest(rng: random.Random) -> Layout:
    """Spans in depth-first preorder, to depth 7, with empty and one-token spans."""
    lengths, parents, modes = [], [], []
    path: list[int] = []
    for span in range(rng.randint(0, 14)):
        path = path[: rng.randint(0, min(len(path), 7))]
        lengths.append(rng.choice([0, 1, 1, 2, 3, 6]))
        parents.append(path[-1] if path else -1)
        modes.append(rng.choice(["causal", "full"]))
        path.append(span)
    return lengths, parents, modes


def dense_forest(lengths: list[int], parents: list[int], modes: list[str]) -> Tensor:
    """The definition: the key's span is the query's or its ancestor; causal or full inside."""
    span_of = [s for s, length in enumerate(lengths) for _ in range(length)]
    dense = torch.zeros(len(span_of), len(span_of), dtype=torch.bool)
    for q, query_span in enumerate(span_of):
        path, span = set(), query_span
        while span != -1:
            path.add(span)
            span = parents[span]
        for k, key_span in enumerate(span_of):
            inside = modes[key_span] == "full" or k <= q
            dense[q, k] = key_span in path and (key_span != query_span or inside)
    return dense


def dense_bagel(split_lens: list[int], attn_modes: list[str], sample_lens: list[int]) -> Tensor:
    """BAGEL's own rule, from per-token sample and split labels."""
    sizes = torch.tensor(split_lens)
    split = torch.arange(len(sizes)).repeat_interleave(sizes)
    sample = torch.arange(len(sample_lens)).repeat_interleave(torch.tensor(sample_lens))
    noise = torch.tensor([mode == "noise" for mode in attn_modes])[split]
    block = torch.tensor([mode != "causal" for mode in attn_modes])[split]
    same_split = split[:, None] == split[None, :]
    position = torch.arange(len(split))
    earlier = position[:, None] >= position[None, :]
    return (
        (sample[:, None] == sample[None, :])
        & (earlier | (same_split & block[None, :]))
        & ~(noise[None, :] & ~same_split)
    )


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
    for (start, end, causal, run, run_end, row, row_end), *_ in zip(
        mask.spans.tolist(), strict=True
    ):
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


@pytest.mark.parametrize("seed", range(200))
def test_forest_matches_its_definition(seed):
    layout = random_forest(random.Random(seed))
    mask = SpanMask.from_spans(*layout)
    assert torch.equal(mask.to_dense(), dense_forest(*layout))
    check_tables(mask)


@pytest.mark.parametrize("seed", range(200))
def test_bagel_pack_matches_its_definition(seed):
    rng = random.Random(seed)
    split_lens, attn_modes, sample_lens = [], [], []
    for _ in range(rng.randint(1, 3)):
        # Half the splits are noise, so that consecutive ones are common.
        modes = rng.choices(["causal", "full", "noise", "noise"], k=rng.randint(1, 6))
        lengths = [rng.randint(1, 5) for _ in modes]
        split_lens += lengths
        attn_modes += modes
        sample_lens.append(sum(lengths))
    mask = SpanMask.from_bagel(split_lens, attn_modes, sample_lens)
    assert torch.equal(mask.to_dense(), dense_bagel(split_lens, attn_modes, sample_lens))
    check_tables(mask)


@pytest.mark.parametrize("seed", range(50))
def test_selected_queries_keep_their_rows(seed):
    rng = random.Random(seed)
    mask = SpanMask.from_spans(*random_forest(rng))
    rows = sorted(rng.sample(range(mask.length), rng.randint(0, mask.length)))
    selected = mask.select_queries(rows)
    assert torch.equal(selected.to_dense(), mask.to_dense()[rows])
    assert selected.num_queries == len(rows)
    check_tables(selected)
    spans = sorted(rng.sample(range(mask.num_spans), rng.randint(0, mask.num_spans)))
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
    assert mask.spans[[2, 3, 6, 7], 3:5].tolist() == [[1, 2], [1, 2], [4, 5], [4, 5]]


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
