from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.layouts import masks
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lvrpo.masks import SpanMask, Tile
from lvrpo.ops.packed_attention import packed_attention
from lvrpo.testing import check_against_plain

SIDES = (1, 2, 3, 8, 128)
SHAPES = st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES))


def tiles_of(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """By looking at every pair; only those that exist count."""
    beyond = [n for side in (1, 0) for n in (0, -dense.shape[side] % block[side])]
    counts = [-(-n // side) for n, side in zip(dense.shape, block, strict=True)]

    def cut(filler: bool) -> Tensor:
        whole = torch.nn.functional.pad(dense, beyond, value=filler)
        return whole.view(counts[0], block[0], counts[1], block[1]).transpose(1, 2).flatten(2)

    return cut(False).any(2).to(torch.int8) + cut(True).all(2).to(torch.int8)


@given(masks() | masks(windows=True), SHAPES)
@settings(max_examples=200, deadline=None)
def test_tile_decisions_are_exact(mask, block):
    assert torch.equal(mask.tiles(block), tiles_of(mask.to_dense(), block))
    assert (Tile.SKIP, Tile.PARTIAL, Tile.FULL) == (0, 1, 2)


@given(masks(), st.sampled_from(SIDES))
@settings(max_examples=100, deadline=None)
def test_four_numbers_say_who_sees_a_tile(mask, block):
    bounds = mask.tile_bounds(block)
    assert bounds.dtype == torch.int32
    assert bounds.shape == (-(-mask.length // block), 4)
    queries = torch.arange(mask.num_queries)
    for tile, (lo_min, lo_max, hi_min, hi_max) in enumerate(bounds.tolist()):
        seen = mask.to_dense()[:, tile * block : (tile + 1) * block]
        assert torch.equal((lo_min <= queries) & (queries < hi_max), seen.any(1))
        assert torch.equal((lo_max <= queries) & (queries < hi_min), seen.all(1))


def lists(counts: Tensor | None, indices: Tensor | None) -> list[list[int]]:
    assert counts is not None
    assert indices is not None
    rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return [row[:count] for count, row in rows]


@given((masks() | masks(windows=True)).filter(lambda mask: mask.num_queries > 0), SHAPES)
@settings(max_examples=30, deadline=None)
def test_block_mask_is_torchs_own(mask, block):
    dense = mask.to_dense()
    ours = mask.to_block_mask(block)
    theirs = create_block_mask(
        lambda b, h, q, k: dense[q, k], None, None, *dense.shape, device="cpu", BLOCK_SIZE=block
    )
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for side in ("kv", "q"):
        for kind in ("", "full_"):
            names = f"{kind}{side}_num_blocks", f"{kind}{side}_indices"
            found, expected = ([getattr(m, name) for name in names] for m in (ours, theirs))
            assert [x.dtype for x in found] == [x.dtype for x in expected]
            assert [x.shape for x in found] == [x.shape for x in expected]
            assert lists(*found) == lists(*expected)
    # A kernel evaluates whole tiles: beyond the buffer there is nobody, and no wild read.
    sizes = [-(-n // b) * b for n, b in zip(dense.shape, block, strict=True)]
    query, key = torch.arange(sizes[0])[:, None], torch.arange(sizes[1])
    seen = ours.mask_mod(query[:0], key[:0], query, key)
    assert torch.equal(seen[: dense.shape[0], : dense.shape[1]], dense)
    assert not seen[dense.shape[0] :].any()
    assert not seen[:, dense.shape[1] :].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_same_output():
    question = ([(30, "full"), (20, "causal")], [[(11, "causal")], [(17, "full")]])
    mask = SpanMask.from_groups([question, question])
    q, k, v = (torch.randn(mask.length, 2, 16) for _ in range(3))

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex_attention(*heads_first, block_mask=mask.to_block_mask())[0].transpose(0, 1)

    plain = packed_attention(q, k, v, mask, backend="torch")
    gold = packed_attention(q.double(), k.double(), v.double(), mask, backend="torch")
    check_against_plain(flex(q, k, v), gold, plain, scale=1.0)


def keys_of(intervals: Tensor, length: int) -> Tensor:
    keys = torch.arange(length)
    begin, end = intervals.unbind(-1)
    return ((begin[..., None] <= keys) & (keys < end[..., None])).any(1)


@given(masks() | masks(windows=True))
@settings(max_examples=200, deadline=None)
def test_row_intervals_are_what_each_query_sees(mask):
    intervals = mask.to_row_intervals()
    assert intervals.dtype == torch.int32
    assert intervals.shape[0] == mask.num_queries
    assert torch.equal(keys_of(intervals, mask.length), mask.to_dense())
    flat = intervals.flatten(1)
    assert bool((flat.diff() >= 0).all())
    gaps = intervals[:, 1:, 0] - intervals[:, :-1, 1]
    used = intervals[:, 1:, 0] < intervals[:, 1:, 1]
    assert bool((gaps[used] > 0).all()), "ranges touch"
    most = (intervals[..., 0] < intervals[..., 1]).sum(1)
    selected = mask.num_queries < mask.length and mask.window is None
    assert selected or intervals.shape[1] == max([1, *most.tolist()])


@given(masks().filter(lambda mask: mask.num_queries == mask.length))
@settings(max_examples=100, deadline=None)
def test_row_intervals_to_flashmask_and_back(mask):
    """The mask again, through the rows that see each key."""
    seen = keys_of(mask.to_row_intervals(), mask.length)
    rows = torch.arange(mask.length)[:, None]
    until = torch.where(seen, rows + 1, 0).amax(0) if mask.length else torch.zeros(0)
    since = torch.where(seen, rows, mask.length).amin(0) if mask.length else torch.zeros(0)
    again = SpanMask.from_flashmask(torch.stack([until, since], dim=1).long()[None, None])
    assert torch.equal(again.to_dense(), mask.to_dense())


@pytest.mark.parametrize("block", [0, -1, (8, 0)])
def test_bad_blocks(block):
    mask = SpanMask.from_cu_seqlens([0, 4])
    with pytest.raises(ValueError, match=r"block is .*, expected >= 1"):
        mask.tiles(block)
    with pytest.raises(ValueError, match=r"block is .*, expected >= 1"):
        mask.to_block_mask(block)


def test_exports_read_nothing_from_a_device():
    mask = SpanMask.from_groups([([(3, "full")], [[(2, "causal")]] * 2)]).pad_to(9).to("meta")
    assert mask.to_row_intervals().shape == (9, 2, 2)
    assert mask.tiles((2, 4)).shape == (5, 3)
    assert mask.to_block_mask(4).kv_indices.shape == (1, 1, 3, 3)
    assert mask.to_flashmask().device.type == "meta"
