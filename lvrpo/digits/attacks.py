"""Drawings of digits that are wrong in one way each: what a reward of drawings has to notice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvrpo.data.example import Example, Picture
from lvrpo.digits.pictures import Split, assemble, digit_pools, dissect
from lvrpo.digits.rules import LayoutRule
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.rewards.score import score

Cells = NDArray[np.float32]  # [cells, 8, 8]


def layout_attacks(
    examples: Sequence[Example], rng: np.random.Generator, split: Split = "test"
) -> dict[str, dict[int, Picture]]:
    """Wrong drawings of layouts, made from their right ones and from other source images.

    Args:
        examples: prompts; those whose rule is no layout, or that have no target, are left out.
        rng: chooses cells and source images.
        split: whose source images are put in.

    Returns:
        By name, for the index of every example that can be wrong in this way: [1, H, W] in [0, 1].
    """
    found: dict[str, dict[int, Picture]] = {}
    for index, example in enumerate(examples):
        rule = example.rule
        if not isinstance(rule, LayoutRule) or example.target is None:
            continue
        if not any(digit is not None for digit in rule.digits):  # nothing to draw wrongly
            continue
        right = dissect(example.target, rule.rows, rule.cols)[0]
        for name, cells in _wrong_cells(rule, right, rng, split).items():
            picture = assemble(cells[None].astype(np.float32), rule.rows, rule.cols)[0]
            found.setdefault(name, {})[index] = picture
    return found


def noticed(
    reward: Reward, examples: Sequence[Example], rng: np.random.Generator, split: Split = "test"
) -> dict[str, float]:
    """How often a reward scores a right drawing above one that is wrong.

    Args:
        reward: of drawings.
        examples: prompts with targets; those without a layout are left out.
        rng: see `layout_attacks`.
        split: likewise.

    Returns:
        By name of the wrong drawing, the share of its prompts, in [0, 1].
    """
    shares = {}
    for name, made in layout_attacks(examples, rng, split).items():
        asked = [examples[index] for index in made]
        right = np.stack([cast(Picture, example.target) for example in asked])
        above = _scores(reward, asked, right) > _scores(reward, asked, np.stack([*made.values()]))
        shares[name] = float(above.float().mean())
    return shares


def _scores(reward: Reward, examples: Sequence[Example], pictures: Picture) -> Tensor:
    return score([reward], Samples.of_images(examples, torch.from_numpy(pictures)))[:, 0]


def _wrong_cells(
    rule: LayoutRule, right: Cells, rng: np.random.Generator, split: Split
) -> dict[str, Cells]:
    filled = [i for i, digit in enumerate(rule.digits) if digit is not None]
    empty = [i for i, digit in enumerate(rule.digits) if digit is None]
    one, first = int(rng.choice(filled)), right[filled[0]]
    other = (int(rule.digits[one] or 0) + int(rng.integers(1, 10))) % 10
    found = {
        "a digit missing": _with(right, {one: np.zeros_like(first)}),
        "a digit wrong": _with(right, {one: _image(other, rng, split)}),
        "one digit in every cell": np.stack([first] * len(right)),
        "all ten digits in every cell": np.stack([_all_digits(rng, split) for _ in right]),
    }
    if len(filled) > 1:
        found["one digit alone"] = _with(right, {i: np.zeros_like(first) for i in filled[1:]})
    if empty:
        extra = {i: _image(int(rng.integers(10)), rng, split) for i in empty}
        found["a digit too many"] = _with(right, {empty[0]: extra[empty[0]]})
        found["extra digits everywhere"] = _with(right, extra)
    unequal = [(i, j) for i in filled for j in filled if rule.digits[i] != rule.digits[j]]
    if unequal:
        i, j = unequal[int(rng.integers(len(unequal)))]
        found["two digits swapped"] = _with(right, {i: right[j], j: right[i]})
    return found


def _with(cells: Cells, changed: dict[int, Cells]) -> Cells:
    result = cells.copy()
    for at, cell in changed.items():
        result[at] = cell
    return result


def _image(digit: int, rng: np.random.Generator, split: Split) -> Cells:
    pool = digit_pools()[split]
    at = pool.pick(np.array([digit]), rng.random(1))
    image: Cells = pool.images[at[0]]
    return image


def _all_digits(rng: np.random.Generator, split: Split) -> Cells:
    images = [_image(digit, rng, split) for digit in range(10)]
    darkest: Cells = np.max(images, axis=0)
    return darkest
