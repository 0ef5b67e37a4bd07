from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.layouts import Layout, bagel_packs, forests, paths
from torch import Tensor

from lvrpo import (
    SpanMask,
    bagel_position_ids,
    gather_logprobs,
    mrope_position_ids,
    position_ids,
    target_index,
)

Grids = dict[int, tuple[int, int, int]]


def rows_of(mask: SpanMask, spans: list[int]) -> list[int]:
    offsets = mask.span_offsets
    return [row for span in spans for row in range(offsets[span], offsets[span + 1])]


def bagel_alone(lengths: list[int], modes: list[str]) -> list[int]:
    """The ids of one sequence, counted as it is read."""
    ids, position = [], 0
    for length, mode in zip(lengths, modes, strict=True):
        if mode == "causal":
            ids += range(position, position + length)
            position += length
        else:
            ids += [position] * length
            position += mode == "full"
    return ids


def mrope_alone(lengths: list[int], grids: list[tuple[int, int, int] | None]) -> list[list[int]]:
    """Each part starts one after the largest id so far."""
    ids: list[list[int]] = []
    for length, grid in zip(lengths, grids, strict=True):
        start = max((max(token) for token in ids), default=-1) + 1
        if grid is None:
            ids += [[start + token] * 3 for token in range(length)]
        else:
            frames, height, width = (range(start, start + n) for n in grid)
            ids += [[t, h, w] for t in frames for h in height for w in width]
    return ids


@st.composite
def forests_with_grids(draw: st.DrawFn) -> tuple[Layout, Grids]:
    lengths, parents, modes = draw(forests())
    grids = {}
    for span, length in enumerate(lengths):
        choices = [
            (t, h, length // (t * h))
            for t in range(1, length + 1)
            for h in range(1, length + 1)
            if length % (t * h) == 0
        ]
        if choices and draw(st.booleans()):
            grids[span] = draw(st.sampled_from(choices))
    return (lengths, parents, modes), grids


@given(forests_with_grids())
@settings(max_examples=150, deadline=None)
def test_every_path_has_the_ids_of_a_sequence_of_its_own(drawn):
    (lengths, parents, modes), grids = drawn
    mask = SpanMask.from_spans(lengths, parents, modes)
    plain, bagel = position_ids(mask), bagel_position_ids(mask)
    mrope = mrope_position_ids(mask, grids)
    assert plain.dtype == bagel.dtype == mrope.dtype == torch.int64
    assert mrope.shape == (3, mask.length)
    for path in paths(parents):
        rows, sizes = rows_of(mask, path), [lengths[span] for span in path]
        assert plain[rows].tolist() == list(range(len(rows)))
        assert bagel[rows].tolist() == bagel_alone(sizes, [modes[span] for span in path])
        expected = mrope_alone(sizes, [grids.get(span) for span in path])
        assert mrope[:, rows].T.tolist() == expected


def bagel_pack_ids(pack: tuple[list[int], list[str], list[int]]) -> list[int]:
    """BAGEL's own count: one per sample, on through the splits, but not for noise."""
    lengths, modes, samples = pack
    ids: list[int] = []
    ends = [sum(samples[: i + 1]) for i in range(len(samples))]
    first = 0
    for end in ends:
        last, total = first, sum(lengths[:first])
        while last < len(lengths) and total + lengths[last] <= end:
            total += lengths[last]
            last += 1
        ids += bagel_alone(lengths[first:last], modes[first:last])
        first = last
    return ids


@given(bagel_packs().filter(lambda pack: all(pack[0])))
@settings(max_examples=100, deadline=None)
def test_bagel_ids_of_a_pack(pack):
    assert bagel_position_ids(SpanMask.from_bagel(*pack)).tolist() == bagel_pack_ids(pack)


def test_an_image_that_was_dropped_still_counts():
    mask = SpanMask.from_spans([2, 0, 3], [-1, 0, 1], ["causal", "full", "causal"])
    assert bagel_position_ids(mask).tolist() == [0, 1, 3, 4, 5]


def test_padding_and_selection_keep_the_ids():
    mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")]] * 2)])
    padded = mask.pad_to(9)
    assert position_ids(padded).tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 0]
    assert torch.equal(position_ids(mask.select_spans([2])), position_ids(mask))
    assert mrope_position_ids(padded, {}).shape == (3, 9)


def test_helpers_read_nothing_from_a_device():
    mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")]] * 2)]).to("meta")
    tensors = [
        position_ids(mask),
        bagel_position_ids(mask),
        mrope_position_ids(mask, {1: (1, 1, 2)}),
    ]
    tensors += vars(target_index(mask, [1, 2])).values()
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@given(forests(), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_target_is_predicted_by_the_row_before_it_on_its_path(layout, last_has_row, data):
    lengths, parents, modes = layout
    mask = SpanMask.from_spans(*layout)
    spans = [s for s, mode in enumerate(modes) if mode == "causal" and data.draw(st.booleans())]
    spans = data.draw(st.permutations(spans))
    targets = target_index(mask, spans, last_has_row=last_has_row)
    row_index, token_rows, cu_seqlens = [], [], [0]
    for span in spans:
        path = rows_of(mask, paths(parents)[span])
        if not last_has_row:
            path.append(-1)
        tokens = range(len(path) - lengths[span] - (not last_has_row), len(path))
        row_index += [path[token - 1] for token in tokens if token > 0]
        token_rows += [path[token] for token in tokens if token > 0]
        cu_seqlens.append(len(row_index))
    assert targets.row_index.tolist() == row_index
    assert targets.token_rows.tolist() == token_rows
    assert targets.cu_seqlens.tolist() == cu_seqlens
    assert targets.row_index.dtype == targets.token_rows.dtype == torch.int64


def test_log_probs_of_a_group_are_those_of_its_sequences():
    """One row of logits per buffer row; the prompt's last row serves the whole group."""
    vocabulary, prompt, completions = 11, [3, 1, 4], [[1, 5], [9], [2, 6, 5]]
    mask = SpanMask.from_groups([([(3, "causal")], [[(len(c), "causal")] for c in completions])])
    buffer = torch.tensor([*prompt, *chain.from_iterable(completions)])
    table = torch.randn(vocabulary, vocabulary)  # a bigram model: logits depend on the token alone
    targets = target_index(mask, [1, 2, 3])
    found = gather_logprobs(table[buffer], buffer[targets.token_rows], targets.row_index)
    for completion, logprobs in zip(
        completions, found.split(targets.cu_seqlens.diff().tolist()), strict=True
    ):
        sequence = torch.tensor(prompt + completion)
        alone = gather_logprobs(table[sequence[:-1]], sequence[1:])
        assert torch.equal(logprobs, alone[-len(completion) :])
    # The same without rows for the last tokens, as a trainer lays them out.
    short = SpanMask.from_groups(
        [([(3, "causal")], [[(len(c) - 1, "causal")] for c in completions])]
    )
    rows = torch.tensor([*prompt, *chain.from_iterable(c[:-1] for c in completions)])
    targets = target_index(short, [1, 2, 3], last_has_row=False)
    again: Tensor = gather_logprobs(
        table[rows], torch.tensor([*chain.from_iterable(completions)]), targets.row_index
    )
    assert torch.equal(again, found)


def test_bad_helpers_input():
    mask = SpanMask.from_spans([4, 2], [-1, 0], ["full", "causal"])
    with pytest.raises(ValueError, match="span 0 is full"):
        target_index(mask, [1, 0])
    with pytest.raises(ValueError, match="there is no span 2 among 2"):
        target_index(mask, [2])
    with pytest.raises(ValueError, match="there is no span -1"):
        target_index(mask, [-1])
    with pytest.raises(ValueError, match="grids has span 2, the mask has 2 spans"):
        mrope_position_ids(mask, {2: (1, 1, 1)})
    with pytest.raises(ValueError, match="grid of span 0 is 1 x 2 x 3, the span has 4 tokens"):
        mrope_position_ids(mask, {0: (1, 2, 3)})
    with pytest.raises(ValueError, match="grid of span 0 is -1 x -2 x 2"):
        mrope_position_ids(mask, {0: (-1, -2, 2)})


def test_what_a_rollout_laid_out_serves_a_backward_pass():
    mask = SpanMask.from_groups([([(3, "causal")], [[(2, "causal")]] * 2)])
    with torch.inference_mode():
        ids, targets = position_ids(mask), target_index(mask, [1, 2])
    table = torch.randn(9, 4, requires_grad=True)
    rows = torch.nn.functional.embedding(ids, table)
    rows.index_select(0, targets.row_index).sum().backward()
    assert table.grad.isfinite().all()
