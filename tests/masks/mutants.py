"""Wrong builders, exporters and helpers; the checks of test_mutants.py must tell each from ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from masks.layouts import BagelPack
from torch import Tensor

import lvrpo
from lvrpo.masks import Group, SpanMask, Tile

BUILDERS = {
    "image span leaks into text": lambda pack: bagel(pack, noise_is_a_leaf=False),
    "noise is causal": lambda pack: bagel(pack, noise_mode="causal"),
    "samples see each other": lambda pack: bagel((pack[0], pack[1], [sum(pack[0])])),
}


def bagel(pack: BagelPack, noise_is_a_leaf: bool = True, noise_mode: str = "noise") -> SpanMask:
    lengths, modes, samples = pack
    noise = noise_mode if noise_is_a_leaf else "full"
    return SpanMask.from_bagel(
        lengths, [noise if mode == "noise" else mode for mode in modes], samples
    )


def child_sees_its_sibling(groups: list[Group]) -> SpanMask:
    return SpanMask.from_groups(
        (prompt, [[span for completion in completions for span in completion]])
        for prompt, completions in groups
    )


def child_forgets_its_prompt(groups: list[Group]) -> SpanMask:
    return SpanMask.from_groups(
        (chain, []) for prompt, completions in groups for chain in (prompt, *completions)
    )


GROUP_BUILDERS = {
    "child sees its sibling": child_sees_its_sibling,
    "child forgets its prompt": child_forgets_its_prompt,
}


def bounds_moved(column: int, by: int) -> Any:
    """Tile decisions from bounds that are off by one, as from a wrong comparison."""

    def tiles(mask: SpanMask, block: tuple[int, int]) -> Tensor:
        bounds = mask.tile_bounds(block[1])
        bounds[:, column] += by
        lo_min, lo_max, hi_min, hi_max = bounds.unbind(1)
        begin = torch.arange(0, mask.num_queries, block[0])[:, None]
        end = (begin + block[0]).clamp(max=mask.num_queries)
        skip = begin.maximum(lo_min) >= end.minimum(hi_max)
        full = (begin >= lo_max) & (end <= hi_min)
        return torch.where(skip, Tile.SKIP, torch.where(full, Tile.FULL, Tile.PARTIAL))

    return tiles


def padding_counted(mask: SpanMask, block: tuple[int, int]) -> Tensor:
    """A key that nobody sees is taken for one with a range."""
    return dataclasses.replace(mask, q_hi=mask.q_hi.maximum(mask.q_lo + 1)).tiles(block)


TILES = {
    "first row skipped": bounds_moved(0, 1),
    "full too early": bounds_moved(1, -1),
    "full too late": bounds_moved(2, 1),
    "row after the last": bounds_moved(3, 1),
    "padding counted": padding_counted,
}


def flat_positions(mask: SpanMask) -> Tensor:
    return torch.arange(mask.length)


def noise_advances(mask: SpanMask) -> Tensor:
    """As when the tree is forgotten: each span continues the one before it."""
    chain = tuple(range(-1, mask.num_spans - 1))
    return lvrpo.bagel_position_ids(dataclasses.replace(mask, parents=chain))


def dropped_image_moves_on(mask: SpanMask) -> Tensor:
    """An image that was dropped from the end of a sample counts in the next one."""
    parents = list(mask.parents)
    for span in range(1, mask.num_spans):
        if parents[span] == -1 and mask.span_offsets[span - 1] == mask.span_offsets[span]:
            parents[span - 1 : span + 1] = -1, span - 1
    return lvrpo.bagel_position_ids(dataclasses.replace(mask, parents=tuple(parents)))


POSITIONS = {
    "dropped image moves on": dropped_image_moves_on,
    "flat numbering": flat_positions,
    "image counts its tokens": lvrpo.position_ids,
    "noise advances": noise_advances,
}


def window_of_rows(mask: SpanMask, window: int) -> Tensor:
    """As if the buffer were one sequence: completions after the first lose their prompt."""
    row = torch.arange(mask.length)
    return mask.to_dense() & (row[:, None] - row < window)


def window_of(ids: Any, distance: Any = lambda behind: behind, more: int = 0) -> Any:
    def dense(mask: SpanMask, window: int) -> Tensor:
        position = ids(mask)
        return mask.to_dense() & (distance(position[:, None] - position) < window + more)

    return dense


WINDOWS = {
    "rows, not positions": window_of_rows,
    "an image is one position": window_of(lvrpo.bagel_position_ids),
    "both ways": window_of(lvrpo.position_ids, abs),
    "one more": window_of(lvrpo.position_ids, more=1),
    "one less": window_of(lvrpo.position_ids, more=-1),
}


def shifted_rows(mask: SpanMask, spans: list[int]) -> Tensor:
    """The row before in the buffer, whoever's it is."""
    return lvrpo.target_index(mask, spans).token_rows - 1


def own_rows(mask: SpanMask, spans: list[int]) -> Tensor:
    return lvrpo.target_index(mask, spans).token_rows


TARGETS = {"sibling's last row predicts": shifted_rows, "a token predicts itself": own_rows}
