"""Advantages of a group of samples of one prompt, from one or several rewards.

B samples, K rewards, P groups. Derivation: docs/ops/normalize_advantages.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.backends import library
from lvrpo.backends.bound import bind
from lvrpo.dtypes import numbers, numbers_by_name
from lvrpo.groups import GroupIds, check_one, group_offsets, group_order
from lvrpo.kept import kept_tensor
from lvrpo.params.advantages import (
    ADVANTAGE_NUMBERS,
    ADVANTAGE_STATS,
    AdvantageParams,
    Advantages,
    AdvantageStats,
)
from lvrpo.reference.normalize_advantages import normalize_advantages as reference_advantages

OP = "normalize_advantages"
_DEFAULT = AdvantageParams()
_CPU = torch.device("cpu")
library.check_table(OP, "numbers", ADVANTAGE_NUMBERS)
library.check_table(OP, "stats", ADVANTAGE_STATS)


def normalize_advantages(
    rewards: Tensor | Sequence[Any],
    groups: Tensor | Sequence[int] | int | None = None,
    *,
    group_ids: GroupIds | None = None,
    weights: Tensor | Sequence[float] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    params: AdvantageParams = _DEFAULT,
    backend: str | None = None,
) -> Advantages:
    """(reward - mean of its group) / (standard deviation + eps), for K rewards at once.

    Statistics run in fp64 and over all groups of the call. `scale="batch"`, `scale="nonzero"` and
    `whiten` couple the samples of a call, so call once per modality: drawings would otherwise set
    the scale of answers. A group of one and a group of equal rewards get advantage 0 exactly,
    before whitening; only `baseline="none"` has no such zeros. The result does not depend on the
    order of groups, or of samples inside a group, beyond fp64 rounding.

    Args:
        rewards: [B] or [B, K], any real dtype, or a list. NaN (None in a list): this reward does
            not apply to this sample; it is left out of the reward's statistics and contributes 0,
            as the group's mean would. A sample to which no reward applies gets advantage 0 and
            counts nowhere: not in its group, nor in the batch, nor in whitening. Treated as data:
            no gradient flows to it.
        groups: [P + 1] offsets of the groups in the batch, any integers, or an int G for equal
            groups; this or `group_ids`.
        group_ids: [B], what the group of each sample is called, for samples in any order: integers
            in a tensor of any integer dtype, or a sequence or array of strings, integers or
            whatever else can be hashed.
        weights: K factors of the rewards; None means 1.
        lengths: [B] tokens of each sample, any integers, for the estimators that count tokens
            (`params.needs_lengths`); the others ignore it.
        params: the estimator.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        Advantages in fp32 (fp64 from fp64 rewards).

    Raises:
        ValueError: shapes or dtypes do not match, G does not divide B, both or neither of `groups`
            and `group_ids` are given, the estimator counts tokens and has no lengths; on a CPU also
            when a reward is infinite, or offsets, weights or lengths are unusable. Where values are
            not read, an infinite reward does not apply, a weight that is not finite is 0, and so is
            a negative length; offsets are clamped to [0, B], and a sample that no group has an
            advantage of 0.
    """
    table, exact = _as_table(rewards, groups, group_ids, weights, lengths)
    factors = _as_weights(weights, table)
    tokens = _as_lengths(lengths, table, params)
    check_one(OP, groups, group_ids)
    by_group = None
    if groups is not None:
        offsets = group_offsets(OP, groups, table.shape[0], table.device)
    else:
        assert group_ids is not None
        by_group = group_order(OP, group_ids, table.shape[0], table.device)
        checks.check_same_device(OP, rewards=table, group_ids=by_group.order)
        offsets, table = by_group.offsets, table[by_group.order]
        tokens = None if tokens is None else tokens[by_group.order]
    checks.check_same_device(OP, rewards=table, groups=offsets, weights=factors, lengths=tokens)
    tensors = (table, offsets, factors, tokens)
    bound = bind((OP, OP), reference_advantages, params, table, backend)
    if bound.functional is not None:
        values, per_reward, *rows, all_zero = bound.functional(*tensors, params=params)
        stats = torch.stack(rows)
    else:
        values, per_reward, stats, all_zero = bound.kernels(*tensors, _numbers(params))
    if by_group is not None:
        values, per_reward = values[by_group.place], per_reward[by_group.place]
    if exact:
        values, per_reward, stats = values.float(), per_reward.float(), stats.float()
    return Advantages(values, per_reward, AdvantageStats(stats, all_zero))


@kept_tensor
def _numbers(params: AdvantageParams) -> Tensor:
    return numbers_by_name(ADVANTAGE_NUMBERS, params.numbers())


@library.register(OP, kernels=OP)
def _fake(
    rewards: Tensor,
    offsets: Tensor,
    weights: Tensor,
    lengths: Tensor | None,
    numbers: Tensor,
    combine: str,
    baseline: str,
    scale: str,
    whiten: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    batch, count = rewards.shape
    shapes: list[tuple[int, ...]] = [(batch,), (batch, count), (len(ADVANTAGE_STATS), count)]
    values, per_reward, stats = (rewards.new_empty(shape, dtype=dtype) for shape in shapes)
    return values, per_reward, stats, rewards.new_empty((), dtype=torch.bool)


def _as_table(rewards: Any, *others: Any) -> tuple[Tensor, bool]:
    """[B, K], and whether it holds integers: as fp64, which keeps them apart, for fp32 results."""
    if not isinstance(rewards, Tensor):
        devices = [x.device for x in others if isinstance(x, Tensor)]
        rewards = checks.as_tensor(OP, "rewards", rewards, devices[0] if devices else _CPU)
    if rewards.is_complex():
        raise ValueError(f"{OP}: rewards is {rewards.dtype}, expected a real dtype")
    if rewards.dim() not in (1, 2):
        raise ValueError(f"{OP}: rewards has shape {tuple(rewards.shape)}, expected [B] or [B, K]")
    # A cheap pass first: where every reward is a finite number, so is their sum.
    if checks.check_values(rewards) and not math.isfinite(rewards.sum().item()):
        expected = "a finite number, or NaN where the reward does not apply"
        checks.refuse_first(OP, "rewards", rewards, rewards.isinf(), expected)
    exact = not rewards.is_floating_point()
    table = rewards.double() if exact else checks.as_data(rewards)
    return (table if table.dim() == 2 else table.unsqueeze(1)), exact


def _as_weights(weights: Tensor | Sequence[float] | None, rewards: Tensor) -> Tensor:
    count = rewards.shape[1]
    if weights is None:
        if rewards.is_cpu:
            return _ones(count)
        return rewards.new_ones(count, dtype=torch.float64)
    if not isinstance(weights, Tensor):
        weights = numbers(*weights).to(rewards.device, non_blocking=True)
    checks.check_shape(OP, "weights", weights, (count,))
    factors = weights.detach().double()
    if not checks.check_values(weights):
        return factors.nan_to_num(0.0, 0.0, 0.0)
    if not bool(factors.isfinite().all()):
        raise ValueError(f"{OP}: weights is {factors.tolist()}, expected finite numbers")
    return factors


@kept_tensor
def _ones(count: int) -> Tensor:
    return numbers(*(1.0,) * count)


def _as_lengths(
    lengths: Tensor | Sequence[int] | None, rewards: Tensor, params: AdvantageParams
) -> Tensor | None:
    if not params.needs_lengths:
        return None
    if lengths is None:
        field = "baseline" if params.baseline == "length" else "whiten"
        raise ValueError(
            f"{OP}: lengths is None, expected [B] numbers of tokens for {field} "
            f"{getattr(params, field)!r}"
        )
    tokens = checks.as_tensor(OP, "lengths", lengths, rewards.device)
    checks.check_shape(OP, "lengths", tokens, (rewards.shape[0],))
    tokens = checks.as_index(OP, "lengths", tokens)
    if not checks.check_values(tokens):
        return tokens.clamp(min=0)
    checks.refuse_first(OP, "lengths", tokens, tokens < 0, ">= 0")
    return tokens
