"""What the ranks of a group that have samples of their own need of each other's.

B samples of this rank, K rewards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lvrpo import checks
from lvrpo.distributed.ranks import Group, add_up, agreement, all_there, check_same, gather
from lvrpo.groups import GroupIds
from lvrpo.ops.head.loss_inputs import Numbers
from lvrpo.ops.head.targets import any_of
from lvrpo.ops.normalize_advantages import normalize_advantages as of_all_samples
from lvrpo.params.advantages import AdvantageParams, Advantages
from lvrpo.params.policy_loss import LossParams
from lvrpo.sampler_correction import top_entropy_threshold as of_all_tokens
from lvrpo.token_layout import sequences_of, token_layout

_ADVANTAGES, _DENOMINATOR = "distributed.normalize_advantages", "distributed.global_denominator"
_THRESHOLD = "distributed.top_entropy_threshold"
_DEFAULT = AdvantageParams()


def normalize_advantages(
    rewards: Tensor | Sequence[Any],
    groups: Tensor | Sequence[int] | int | None = None,
    *,
    group_ids: GroupIds | None = None,
    weights: Tensor | Sequence[float] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    params: AdvantageParams = _DEFAULT,
    group: Group = None,
    backend: str | None = None,
) -> Advantages:
    """`lvrpo.normalize_advantages` of the samples of all ranks, of which each rank gets its own.

    Groups may be split over ranks, which may have different numbers of samples, or none. All
    rewards go to every rank, in one message that the host waits for, and every rank computes the
    statistics of all: a few numbers a sample.

    Args:
        rewards: [B] or [B, K] of this rank's samples.
        groups: as `lvrpo.normalize_advantages` takes them, of all samples in the order of the
            ranks: an int, or offsets that are the same on every rank.
        group_ids: [B], what the group of each of this rank's samples is called, on every rank
            alike; this or `groups`.
        weights: K factors of the rewards, the same on every rank.
        lengths: [B] tokens of this rank's samples.
        params: the estimator.
        group: the ranks; None for all.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        Advantages whose `values` and `per_reward` are of this rank's samples, and whose `stats` are
        of all.

    Raises:
        ValueError: on every rank: as `lvrpo.normalize_advantages`, or ranks disagree about the
            dtype of the rewards, their number, or what else is given.
        RuntimeError: a rank does not answer.
    """
    found = _exchange(group, lambda: _Samples.of(rewards, group_ids, lengths, groups, weights))
    own = found[torch.distributed.get_rank(group)]
    device = rewards.device if isinstance(rewards, Tensor) else torch.device("cpu")
    ids, tokens = ([getattr(x, name) for x in found] for name in ("group_ids", "lengths"))
    result = of_all_samples(
        torch.cat([x.rewards for x in found]).to(device),
        groups,
        group_ids=None if own.group_ids is None else list(itertools.chain(*ids)),
        weights=weights,
        lengths=None if own.lengths is None else torch.cat(tokens).to(device),
        params=params,
        backend=backend,
    )
    begin = sum(len(x.rewards) for x in found[: torch.distributed.get_rank(group)])
    mine = slice(begin, begin + len(own.rewards))
    return Advantages(result.values[mine], result.per_reward[mine], result.stats)


@dataclasses.dataclass(frozen=True)
class _Samples:
    """Of one rank, on the host.

    Attributes:
        rewards: [B] or [B, K].
        group_ids: [B] or None.
        lengths: [B] or None.
        alike: what all ranks have to have.
    """

    rewards: Tensor
    group_ids: list[Any] | None
    lengths: Tensor | None
    alike: dict[str, str]

    @classmethod
    def of(cls, rewards: Any, group_ids: Any, lengths: Any, groups: Any, weights: Any) -> _Samples:
        """Checked as far as one rank can.

        Raises:
            ValueError: the rewards are no tensor, or the others are not one for each sample.
        """
        cpu = torch.device("cpu")
        table = checks.as_tensor(_ADVANTAGES, "rewards", rewards, cpu).detach().cpu()
        if table.dim() not in (1, 2):
            shape = tuple(table.shape)
            raise ValueError(f"{_ADVANTAGES}: rewards has shape {shape}, expected [B] or [B, K]")
        ids = group_ids.tolist() if hasattr(group_ids, "tolist") else group_ids
        ids = None if ids is None else list(ids)
        tokens = None
        if lengths is not None:
            tokens = checks.as_tensor(_ADVANTAGES, "lengths", lengths, cpu).detach().cpu()
        for name, given in (("group_ids", ids), ("lengths", tokens)):
            if given is not None and len(given) != len(table):
                raise ValueError(
                    f"{_ADVANTAGES}: {name} has {len(given)} entries for {len(table)} samples"
                )
        alike = {
            "dtype of rewards": str(table.dtype),
            "rewards of a sample": str(list(table.shape[1:])),
            "group_ids is given": str(ids is not None),
            "lengths is given": str(tokens is not None),
            "groups": str(groups.tolist() if isinstance(groups, Tensor) else groups),
            "weights": str(weights.tolist() if isinstance(weights, Tensor) else weights),
        }
        return cls(table, ids, tokens, alike)


def _exchange(group: Group, prepare: Callable[[], _Samples]) -> list[_Samples]:
    """What all ranks prepared.

    Raises:
        ValueError: on every rank, if one raised it, or they are not alike.
    """
    own: _Samples | str
    try:
        own = prepare()
    except ValueError as error:
        own = str(error)
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    with all_there(_ADVANTAGES):
        torch.distributed.all_gather_object(found, own, group=group)
    for rank, other in enumerate(found):
        if isinstance(other, str):
            raise ValueError(f"{other} (rank {rank} of the group)")
    for rank, other in enumerate(found):
        check_same(_ADVANTAGES, found[0].alike, other.alike, rank)
    return found


def global_denominator(
    mask: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    params: LossParams,
    group: Group = None,
) -> Tensor:
    """What the outer mean of a loss divides by, counted over the samples of all ranks.

    For `denominator=`: the losses of the ranks then add up to the loss of all samples. One number
    is added up over ranks; nothing waits for it. DDP and FSDP divide gradients by the number of
    ranks: multiply the loss by it.

    Args:
        mask: [T] or [B, C] as the loss takes it, of this rank's samples.
        cu_seqlens: [B + 1] offsets of packed sequences; None for padded ones.
        params: the loss.
        group: the ranks that have samples of their own; None for all.

    Returns:
        [] fp64: active tokens for "token_mean", 1 for "token_sum", else the sequences that count.

    Raises:
        ValueError: the mask and the offsets do not fit.
        RuntimeError: a rank does not answer.
    """
    cpu = torch.device("cpu")
    given = checks.as_tensor(_DENOMINATOR, "mask", mask, cpu)
    layout = token_layout(_DENOMINATOR, "mask", given, cu_seqlens)
    active = checks.as_mask(_DENOMINATOR, "mask", layout.flatten("mask", given))
    if params.aggregation == "token_sum":
        return torch.ones((), dtype=torch.float64, device=given.device)
    if params.aggregation == "token_mean":
        count = (active & layout.held()).sum()
    elif params.count_empty:
        count = torch.full_like(active.sum(), layout.sequences)
    else:
        sequence = sequences_of(layout.offsets, layout.tokens)
        count = any_of(active, sequence, layout.sequences).sum()
    total = count.double()
    add_up(_DENOMINATOR, total, group)
    return total


def top_entropy_threshold(
    entropy: Tensor, *, fraction: float, mask: Numbers | None = None, group: Group = None
) -> Tensor:
    """`lvrpo.top_entropy_threshold` of the tokens of all ranks, for `entropy_threshold=` of a loss.

    All entropies go to every rank, after their numbers, which the host waits for.

    Args:
        entropy: of any shape, nats, of this rank's tokens; ranks may have different numbers.
        fraction: of the active tokens of all ranks, in [0, 1].
        mask: in the shape of `entropy`: what counts.
        group: the ranks that have samples of their own; None for all.

    Returns:
        As `lvrpo.top_entropy_threshold`, of the same bits on every rank.

    Raises:
        ValueError: as `lvrpo.top_entropy_threshold`, or ranks disagree about fraction or dtype; on
            a CPU, and with LVRPO_CHECK=1 on a GPU, on all ranks.
        RuntimeError: a rank does not answer.
    """
    with agreement(_THRESHOLD, group, entropy) as facts:
        of_all_tokens(entropy, fraction=fraction, mask=mask)  # refuses what it does not take
        values = entropy.detach().reshape(-1)
        active = torch.ones_like(values)
        if mask is not None:
            given = checks.as_tensor(_THRESHOLD, "mask", mask, values.device).reshape(-1)
            active = checks.as_mask(_THRESHOLD, "mask", given).to(values)
        facts |= {"fraction": fraction, "dtype": values.dtype}
    counts = gather(_THRESHOLD, torch.tensor([len(values)], device=values.device), group)
    padded = values.new_zeros(2, int(counts.max()))
    padded[0, : len(values)], padded[1, : len(values)] = values, active
    every = gather(_THRESHOLD, padded, group)
    return of_all_tokens(every[:, 0], fraction=fraction, mask=every[:, 1])
