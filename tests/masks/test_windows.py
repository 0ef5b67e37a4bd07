"""Sliding windows: positions along the path, with every change and in every form of a mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.layouts import bagel_packs, dense_bagel, dense_token_types, dense_window, forests, masks

from lvrpo.masks import SpanMask, position_ids

WINDOW = st.integers(1, 12)


@given(forests(), WINDOW)
@settings(max_examples=200, deadline=None)
def test_window_matches_its_definition(layout, window):
    mask = SpanMask.from_spans(*layout)
    windowed = mask.with_window(window)
    assert torch.equal(windowed.to_dense(), dense_window(*layout, window))
    # What no path is longer than hides nothing, and costs nothing.
    longest = int(position_ids(mask).max()) + 1 if mask.length else 0
    assert windowed.window == (window if window < longest else None)
    assert (windowed is mask) == (window >= longest)


@given(st.lists(st.lists(st.sampled_from([0, 0, 1, 1, 2]), max_size=9), max_size=4), WINDOW)
@settings(max_examples=100, deadline=None)
def test_layers_of_gemma_3(documents, window):
    """transformers: less than a window behind, and (causal or of the same image)."""
    cu_seqlens = [0]
    for document in documents:
        cu_seqlens.append(cu_seqlens[-1] + len(document))
    types = [kind for document in documents for kind in document]
    row = torch.arange(len(types))
    expected = dense_token_types(types, cu_seqlens) & (row > row[:, None] - window)
    mask = SpanMask.from_token_types(types, cu_seqlens).with_window(window)
    assert torch.equal(mask.to_dense(), expected)


@given(bagel_packs(), WINDOW)
@settings(max_examples=100, deadline=None)
def test_packs_of_bagel(pack, window):
    """A noisy image has no place on the paths of what follows it."""
    mask = SpanMask.from_bagel(*pack)
    position = position_ids(mask)
    expected = dense_bagel(*pack) & (position[:, None] - position < window)
    assert torch.equal(mask.with_window(window).to_dense(), expected)


def test_a_completion_has_the_window_that_it_has_alone():
    prompt, lengths, window = 10, [7, 1, 12], 6
    group = SpanMask.from_groups([([(prompt, "causal")], [[(n, "causal")] for n in lengths])])
    dense, start = group.with_window(window).to_dense(), prompt
    for length in lengths:
        rows = [*range(prompt), *range(start, start + length)]
        alone = torch.ones(len(rows), len(rows)).bool().tril().triu(1 - window)
        assert torch.equal(dense[rows][:, rows], alone)
        start += length


@given(masks(), WINDOW, st.data())
@settings(max_examples=100, deadline=None)
def test_changes_compose(mask, window, data):
    """In any order, there and back."""
    spans = sorted(data.draw(st.sets(st.integers(0, mask.num_spans - 1)))) if mask.num_spans else []
    last, first = (
        mask.with_window(window).freeze(spans).packing_invariant(),
        mask.freeze(spans).packing_invariant().with_window(window),
    )
    moved = mask.to("meta").with_window(window).freeze(spans).packing_invariant().to("cpu")
    for found in (first, moved):
        for field in dataclasses.fields(SpanMask):
            ours, expected = getattr(found, field.name), getattr(last, field.name)
            same = torch.equal if isinstance(expected, torch.Tensor) else type(expected).__eq__
            assert same(ours, expected) or ours is expected is None, field.name
    without = last.with_window(None)
    assert torch.equal(without.to_dense(), mask.to_dense())
    assert without.window is without.positions is None


@given(forests(), WINDOW)
def test_padding_and_selection_keep_the_window(layout, window):
    mask, dense = SpanMask.from_spans(*layout).with_window(window), dense_window(*layout, window)
    rows = list(range(0, mask.length, 3))
    assert torch.equal(mask.select_queries(rows).to_dense(), dense[rows])
    padded = mask.pad_to(mask.length + 4)
    assert torch.equal(padded.to_dense()[: mask.length, : mask.length], dense)
    assert padded.to_dense().sum() == dense.sum()


@given(masks(windows=True).filter(lambda mask: mask.num_queries == mask.length and mask.window))
@settings(max_examples=200, deadline=None)
def test_flashmask_has_the_windows_that_it_can_express(mask):
    dense = mask.to_dense()
    row = torch.arange(mask.length)[:, None]
    q_lo, q_hi = row.where(dense, mask.length).amin(0), (row + 1).where(dense, 0).amax(0)
    if bool((dense.sum(0) < (q_hi - q_lo).clamp(min=0)).any()):
        with pytest.raises(ValueError, match=r"under the window of \d+, key \d+ is seen by rows"):
            mask.to_flashmask()
    else:
        hi, lo = mask.to_flashmask()[0, 0].unbind(-1)
        assert torch.equal((lo <= row) & (row < hi), dense)


def test_tile_bounds_have_no_windows():
    mask = SpanMask.from_cu_seqlens([0, 9]).with_window(3)
    with pytest.raises(ValueError, match=r"under the window of 3 .*ask `tiles`"):
        mask.tile_bounds(4)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (0, "window is 0, expected >= 1, or None"),
        (-1, "window is -1"),
        (2.5, r"window\[0\] is 2.5"),
        (True, r"window\[0\] is True"),
        ((3, 0), r"window\[0\] is \(3, 0\)"),
    ],
    ids=str,
)
def test_bad_windows(window, message):
    with pytest.raises(ValueError, match=message):
        SpanMask.from_cu_seqlens([0, 9]).with_window(window)
