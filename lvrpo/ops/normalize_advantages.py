"""Advantages of a group of samples of one prompt, from one or several rewards.

B samples, K rewards, P groups. Derivation: docs/ops/normalize_advantages.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lvrpo.ops import _backend, _checks, _library
from lvrpo.reference.normalize_advantages import normalize_advantages as reference_advantages

OP = "normalize_advantages"

Combine = Literal["decoupled", "sum"]
Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none"]


@dataclasses.dataclass(frozen=True)
class AdvantageParams:
    """How rewards become advantages; the defaults are the preset "decoupled".

    Attributes:
        combine: "decoupled" divides every reward by its own spread before the weighted sum (GDPO);
            "sum" adds the rewards up first and divides by the spread of the sum (LVRPO, Eq 3).
        baseline: what is subtracted: the group's mean, or the mean of the group's other samples.
        scale: whose standard deviation divides: the group's, the batch's, or none.
        ddof: 1 divides the sum of squares by n - 1, 0 by n.
        eps: added to every standard deviation.
        std_floor: every divisor is at least this, the whitening's too. Without it a group in which
            the rewards agree up to noise gets full-size advantages made of that noise. In units of
            reward: the default is 1 % of a reward in [0, 1].
        whiten: divide the result by its standard deviation over the batch (its mean is zero).
        clip: bound of the advantage's magnitude, or None.
    """

    combine: Combine = "decoupled"
    baseline: Baseline = "mean"
    scale: Scale = "group"
    ddof: int = 1
    eps: float = 1e-4
    std_floor: float = 0.01
    whiten: bool = True
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("combine", Combine), ("baseline", Baseline), ("scale", Scale)):
            value = getattr(self, name)
            if value not in get_args(choices):
                expected = ", ".join(get_args(choices))
                raise ValueError(
                    f"AdvantageParams: {name} is {value!r}, expected one of {expected}"
                )
        if self.ddof not in (0, 1):
            raise ValueError(f"AdvantageParams: ddof is {self.ddof}, expected 0 or 1")
        for name in ("eps", "std_floor"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"AdvantageParams: {name} is {value}, expected finite and >= 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"AdvantageParams: clip is {self.clip}, expected > 0, or None")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> AdvantageParams:
        """A published estimator by name, with single fields changed by keyword.

        "paper" is LVRPO's Eq 3, "decoupled" GDPO with a floor, "dr_grpo" the group mean alone,
        "rloo" leave-one-out.
        """
        if name not in ADVANTAGE_PRESETS:
            expected = ", ".join(ADVANTAGE_PRESETS)
            raise ValueError(f"AdvantageParams: preset is {name!r}, expected one of {expected}")
        return cls(**ADVANTAGE_PRESETS[name] | changes)


ADVANTAGE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"combine": "sum", "std_floor": 0.0, "whiten": False},
    "decoupled": {},
    "dr_grpo": {"combine": "sum", "scale": "none", "whiten": False},
    "rloo": {"combine": "sum", "baseline": "leave_one_out", "scale": "none", "whiten": False},
}

_DEFAULT = AdvantageParams()


@dataclasses.dataclass(frozen=True)
class AdvantageStats:
    """What each of the K rewards did; [K] tensors, NaN for a reward that applied to no sample.

    Attributes:
        share: part of the advantages' variance that comes from the reward: the covariance of its
            contribution with the advantage over the variance of the advantage. Sums to 1, or is 0
            throughout when every advantage is. Negative where a reward opposes the others.
        constant_groups: fraction of the groups it applied to in which it did not vary.
        mean: of the raw reward over the samples it applied to.
        std: likewise.
        applicable: fraction of the samples it applied to; never NaN unless the batch is empty.
        all_zero: bool scalar, every advantage is zero and the batch teaches nothing.
    """

    share: Tensor
    constant_groups: Tensor
    mean: Tensor
    std: Tensor
    applicable: Tensor
    all_zero: Tensor


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Result of `normalize_advantages`.

    Attributes:
        values: [B], the advantage of every sample.
        per_reward: [B, K], what each reward contributed; its rows add up to `values`.
        stats: per-reward diagnostics of the batch.
    """

    values: Tensor
    per_reward: Tensor
    stats: AdvantageStats


def normalize_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    *,
    weights: Tensor | Sequence[float] | None = None,
    params: AdvantageParams = _DEFAULT,
    backend: str | None = None,
) -> Advantages:
    """(reward - mean of its group) / (standard deviation + eps), for K rewards at once.

    Statistics run in fp64 and over all groups of the call. `scale="batch"` and `whiten` couple the
    samples of a call, so call once per modality: drawings would otherwise set the scale of answers.
    A group of one and a group of equal rewards get advantage 0 exactly. The result does not depend
    on the order of groups, or of samples inside a group, beyond fp64 rounding.

    Args:
        rewards: [B] or [B, K], any floating dtype. NaN: this reward does not apply to this sample;
            it is left out of the reward's statistics and contributes 0, as the group's mean would.
            Treated as data: no gradient flows to it.
        groups: [P + 1] int64 offsets of the groups in the batch, or an int G for equal groups.
        weights: K factors of the rewards; None means 1.
        params: the estimator.
        backend: "cpp", "torch", or None for the first that can run.

    Returns:
        Advantages in fp32 (fp64 from fp64 rewards).

    Raises:
        ValueError: shapes or dtypes do not match, G does not divide B; on a CPU also when a reward
            is infinite, a sample has no reward that applies, or offsets or weights are unusable.
    """
    _checks.check_floating(OP, "rewards", rewards)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"{OP}: rewards has shape {tuple(rewards.shape)}, expected [B] or [B, K]")
    table = rewards.detach() if rewards.dim() == 2 else rewards.detach()[:, None]
    offsets = _as_offsets(groups, table)
    factors = _as_weights(weights, table)
    _checks.check_same_device(OP, rewards=table, groups=offsets, weights=factors)
    if _checks.check_values(table):
        _check_rewards(table, rewards.dim())
    if _backend.resolve(OP, (table, offsets, factors), backend) == "torch":
        values, per_reward, *stats = reference_advantages(table, offsets, factors, params=params)
    else:
        values, per_reward, *stats = torch.ops.lvrpo.normalize_advantages(
            table,
            offsets,
            factors,
            params.combine == "decoupled",
            params.baseline == "leave_one_out",
            get_args(Scale).index(params.scale),
            params.ddof,
            float(params.eps),
            float(params.std_floor),
            params.whiten,
            math.inf if params.clip is None else float(params.clip),
        )
    return Advantages(values, per_reward, AdvantageStats(*stats))


@_library.register("normalize_advantages")
def _fake(rewards: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    batch, count = rewards.shape
    shapes: list[tuple[int, ...]] = [(batch,), (batch, count), *[(count,)] * 5]
    outputs = [rewards.new_empty(shape, dtype=dtype) for shape in shapes]
    return (*outputs, rewards.new_empty((), dtype=torch.bool))


def _as_offsets(groups: Tensor | int, rewards: Tensor) -> Tensor:
    batch = rewards.shape[0]
    if isinstance(groups, Tensor):
        _checks.check_offsets(OP, "groups", groups, batch)
        return groups
    if groups < 1 or batch % groups != 0:
        raise ValueError(f"{OP}: groups is {groups}, expected a size >= 1 that divides B = {batch}")
    return torch.arange(0, batch + 1, groups, device=rewards.device)


def _as_weights(weights: Tensor | Sequence[float] | None, rewards: Tensor) -> Tensor:
    count = rewards.shape[1]
    if weights is None:
        return rewards.new_ones(count, dtype=torch.float64)
    if not isinstance(weights, Tensor):
        weights = torch.tensor(list(weights), dtype=torch.float64, device=rewards.device)
    _checks.check_shape(OP, "weights", weights, (count,))
    if _checks.check_values(weights) and not bool(weights.isfinite().all()):
        raise ValueError(f"{OP}: weights is {weights.tolist()}, expected finite numbers")
    return weights.detach().double()


def _check_rewards(rewards: Tensor, dim: int) -> None:
    infinite = rewards.isinf()
    if bool(infinite.any()):
        sample, reward = infinite.nonzero()[0].tolist()
        at = f"{sample}, {reward}" if dim == 2 else f"{sample}"
        raise ValueError(
            f"{OP}: rewards[{at}] is {float(rewards[sample, reward])} (sample {sample}, reward "
            f"{reward}), expected a finite number, or NaN where the reward does not apply"
        )
    nowhere = rewards.isnan().all(dim=1)
    if bool(nowhere.any()):
        sample = int(nowhere.nonzero()[0])
        raise ValueError(
            f"{OP}: rewards[{sample}] is {rewards[sample].tolist()}: no reward applies to sample "
            f"{sample}, expected at least one number"
        )
