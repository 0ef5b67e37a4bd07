"""Deliberately broken versions of normalize_advantages; the rule must reject every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lvrpo.reference import normalize_advantages as module
from lvrpo.reference.normalize_advantages import normalize_advantages as reference

Mutant = Callable[..., tuple[Tensor, ...]]


def with_params(**changes: Any) -> Mutant:
    def mutant(rewards, groups, weights, lengths, params):
        changed = dataclasses.replace(params, **changes)
        return reference(rewards, groups, weights, lengths, params=changed)

    return mutant


def with_arguments(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Mutant:
    def mutant(rewards, groups, weights, lengths, params):
        return reference(*change(rewards, groups, weights), lengths, params=params)

    return mutant


def with_lengths(change: Callable[[Tensor], Tensor]) -> Mutant:
    def mutant(rewards, groups, weights, lengths, params):
        return reference(rewards, groups, weights, change(lengths), params=params)

    return mutant


def with_output(index: int, change: Callable[..., Tensor]) -> Mutant:
    def mutant(rewards, groups, weights, lengths, params):
        outputs = list(reference(rewards, groups, weights, lengths, params=params))
        outputs[index] = change(outputs)
        return tuple(outputs)

    return mutant


def with_squares_of_others(squares_of_others: Callable[..., Tensor]) -> Mutant:
    def mutant(rewards, groups, weights, lengths, params):
        with mock.patch.object(module, "_squares_of_others", squares_of_others):
            return reference(rewards, groups, weights, lengths, params=params)

    return mutant


def total_minus_own(groups, column, counted, *_):
    count, squares = groups.sum(counted), groups.sum(column.square())
    left = squares - column.square() * count / (count - 1).clamp(min=1)
    return left.where(left > module.ROUNDING * squares, 0.0)


def unscored_as_mean(r: Tensor, offsets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """A sample that no reward scored counts as if it had the mean of the batch."""
    return r.where(~r.isnan().all(1, keepdim=True), r.nanmean(0)), offsets, weights


def variance_share(outputs: list[Tensor]) -> Tensor:
    variance = outputs[1].square().sum(0)
    return variance / variance.sum()


MUTANTS: dict[str, Mutant] = {
    "advantage of the neighbour": with_output(0, lambda out: out[0].roll(1)),
    "sign flipped": with_output(0, lambda out: -out[0]),
    "scaled by 2 %": with_output(0, lambda out: out[0] * 1.02),
    "groups off by one": with_arguments(
        lambda r, o, w: (r, torch.cat([o[:1], o[1:-1] + 1, o[-1:]]), w)
    ),
    "one group": with_arguments(lambda r, o, w: (r, o[[0, -1]], w)),
    "population standard deviation": with_params(ddof=0),
    "standard deviation without eps": with_params(eps=0.0),
    "standard deviation without floor": with_params(std_floor=0.0),
    "standard deviation of the batch": with_params(scale="batch"),
    "no scale": with_params(scale="none"),
    "leave-one-out baseline": with_params(baseline="leave_one_out"),
    "summed before normalising": with_params(combine="sum"),
    "spread of the others": with_params(scale="leave_one_out"),
    "fraction of nonzero rewards": with_params(scale="nonzero"),
    "length-weighted baseline": with_params(baseline="length"),
    "not whitened": with_params(whiten="none"),
    "whitened by tokens": with_params(whiten="token"),
    "not clipped": with_params(clip=None),
    "weights ignored": with_arguments(lambda r, o, w: (r, o, torch.ones_like(w))),
    "weights of the neighbour": with_arguments(lambda r, o, w: (r, o, w.roll(1))),
    "a missing reward is zero": with_arguments(lambda r, o, w: (r.nan_to_num(nan=0.0), o, w)),
    "a sample without rewards counts": with_arguments(unscored_as_mean),
    "parts before weights": with_output(1, lambda out: out[1].flip(1)),
    "share of variance, not covariance": with_output(2, variance_share),
    "constant groups miscounted": with_output(3, lambda out: 1 - out[3]),
    "sum for mean": with_output(4, lambda out: out[4] * len(out[0])),
}

#: For an estimator that counts tokens.
LENGTH_MUTANTS: dict[str, Mutant] = {
    "lengths ignored": with_lengths(torch.ones_like),
    "lengths of the neighbour": with_lengths(lambda lengths: lengths.roll(1)),
    "plain baseline": with_params(baseline="mean"),
    "whitened by samples": with_params(whiten="sequence"),
}
#: For a spread of the sample's others.
OTHERS_MUTANTS: dict[str, Mutant] = {
    "what its own squares leave of the total": with_squares_of_others(total_minus_own),
    "its own square is in": with_squares_of_others(
        lambda groups, column, *_: groups.sum(column.square())
    ),
    "the others do not agree": with_squares_of_others(
        lambda groups, column, *_: groups.sum(column.square()).clamp(min=1e-20)
    ),
}
#: For the best sample alone.
BEST_MUTANTS: dict[str, Mutant] = {
    "everybody against the mean": with_params(baseline="mean"),
    "the best against the mean": with_output(0, lambda out: out[0] * 1.3),
    "not divided": with_params(scale="none"),
}
