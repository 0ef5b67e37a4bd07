"""The definitions tell every mutant from the right one, on layouts that anybody could have."""

from __future__ import annotations

import pytest
import torch
from masks.layouts import dense_bagel, dense_forest, dense_window
from masks.mutants import BUILDERS, GROUP_BUILDERS, POSITIONS, TARGETS, TILES, WINDOWS, bagel
from masks.test_exports import tiles_of
from masks.test_positions import bagel_pack_ids

from lvrpo import SpanMask, bagel_position_ids, target_index

#: Clean image, question, noisy image and its clean copy, answer, dropped image; a second sample.
SAMPLES = [
    [(6, "full"), (3, "causal"), (6, "noise"), (6, "full"), (2, "causal"), (0, "full")],
    [(4, "causal"), (5, "noise")],
]
PACK = (
    [6, 3, 6, 6, 2, 0, 4, 5],
    ["full", "causal", "noise", "full", "causal", "full", "causal", "noise"],
    [23, 9],
)
GROUPS = [
    ([(5, "full"), (3, "causal")], [[(4, "causal")], [(2, "causal")], [(3, "full")]]),
    ([(2, "causal")], [[(4, "full")]] * 2),
]
LAYOUT = (
    [5, 3, 4, 2, 3, 2, 4, 4],
    [-1, 0, 1, 1, 1, -1, 5, 5],
    ["full", "causal", "causal", "causal", "full", "causal", "full", "full"],
)
BLOCKS = [(1, 1), (2, 3), (4, 2), (8, 8)]


def test_right_ones_pass():
    assert torch.equal(bagel(PACK).to_dense(), dense_bagel(*PACK))
    assert torch.equal(SpanMask.from_groups(GROUPS).to_dense(), dense_forest(*LAYOUT))
    assert bagel_position_ids(bagel(PACK)).tolist() == bagel_pack_ids(SAMPLES)
    mask = SpanMask.from_spans(*LAYOUT).pad_to(31)
    for block in BLOCKS:
        assert torch.equal(mask.tiles(block), tiles_of(mask.to_dense(), block))


@pytest.mark.parametrize("mutant", BUILDERS.values(), ids=BUILDERS.keys())
def test_pack_mutant_is_rejected(mutant):
    assert not torch.equal(mutant(PACK).to_dense(), dense_bagel(*PACK))


@pytest.mark.parametrize("mutant", GROUP_BUILDERS.values(), ids=GROUP_BUILDERS.keys())
def test_group_mutant_is_rejected(mutant):
    assert not torch.equal(mutant(GROUPS).to_dense(), dense_forest(*LAYOUT))


@pytest.mark.parametrize("mutant", TILES.values(), ids=TILES.keys())
def test_tile_mutant_is_rejected(mutant):
    mask = SpanMask.from_spans(*LAYOUT).pad_to(31)
    assert not all(
        torch.equal(mutant(mask, block).to(torch.int8), tiles_of(mask.to_dense(), block))
        for block in BLOCKS
    )


@pytest.mark.parametrize("mutant", POSITIONS.values(), ids=POSITIONS.keys())
def test_position_mutant_is_rejected(mutant):
    assert mutant(bagel(PACK)).tolist() != bagel_pack_ids(SAMPLES)


@pytest.mark.parametrize("mutant", WINDOWS.values(), ids=WINDOWS.keys())
def test_window_mutant_is_rejected(mutant):
    mask = SpanMask.from_groups(GROUPS)
    assert torch.equal(mask.with_window(4).to_dense(), dense_window(*LAYOUT, 4))
    assert not torch.equal(mutant(mask, 4), dense_window(*LAYOUT, 4))


@pytest.mark.parametrize("mutant", TARGETS.values(), ids=TARGETS.keys())
def test_target_mutant_is_rejected(mutant):
    mask = SpanMask.from_groups(GROUPS)
    assert target_index(mask, [2, 3]).row_index.tolist() == [7, 8, 9, 10, 7, 12]
    assert mutant(mask, [2, 3]).tolist() != [7, 8, 9, 10, 7, 12]
