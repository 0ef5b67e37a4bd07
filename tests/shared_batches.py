"""A batch whose samples are dealt to ranks, against one process. To be run in every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import loss_inputs
import torch
import torch.distributed
from torch import Tensor

import lvrpo
from lvrpo import AdvantageParams, LossParams, distributed

#: Completions of the groups, and their tokens.
GROUPS = [4, 1, 3, 0, 4]
LENGTHS = [5, 1, 0, 7, 3, 2, 9, 4, 1, 6, 2, 3]


def here(counts: Sequence[int]) -> slice:
    """This rank's samples, by how many each has."""
    rank = torch.distributed.get_rank()
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def check_advantages(counts: Sequence[int], params: AdvantageParams, named: bool) -> None:
    """The samples of GROUPS, whose groups ranks cut anywhere; named, in another order too."""
    made = torch.Generator(device="cpu").manual_seed(3)
    batch = sum(GROUPS)
    rewards = torch.randn(batch, 2, generator=made, device="cpu").round(decimals=1)
    rewards[2, 1] = math.nan
    lengths = torch.tensor(LENGTHS)
    rewards, weights = rewards.to(lengths.device), [1.0, 0.5]
    group = torch.repeat_interleave(torch.arange(len(GROUPS)), torch.tensor(GROUPS))
    offsets = torch.tensor([0, *GROUPS]).cumsum(0)
    one = lvrpo.normalize_advantages(
        rewards, offsets, weights=weights, lengths=lengths, params=params
    )
    order = torch.randperm(batch, generator=made, device="cpu") if named else torch.arange(batch)
    mine = order.to(rewards.device)[here(counts)]
    names = [f"prompt {i}" for i in group[mine].tolist()]
    many = distributed.normalize_advantages(
        rewards[mine],
        None if named else offsets,
        group_ids=names if named else None,
        weights=weights,
        lengths=lengths[mine],
        params=params,
    )
    torch.testing.assert_close(many.values, one.values[mine])
    torch.testing.assert_close(many.per_reward, one.per_reward[mine])
    for name in ("share", "constant_groups", "mean", "std", "applicable", "all_zero"):
        torch.testing.assert_close(getattr(many.stats, name), getattr(one.stats, name))


def advantages(rewards: Sequence[Any], given: Sequence[dict[str, Any]]) -> Tensor:
    rank = torch.distributed.get_rank()
    return distributed.normalize_advantages(rewards[rank], **given[rank]).values


def check_loss(counts: Sequence[int], params: LossParams) -> None:
    """Losses and metrics of the ranks' samples are put together to those of all."""
    inputs = loss_inputs.make_inputs(LENGTHS, torch.float64)
    inputs["logprobs"].requires_grad_()
    one = lvrpo.grpo_loss(**inputs, params=params)
    one.loss.backward()

    offsets, mine = inputs["cu_seqlens"], here(counts)
    first, last = int(offsets[mine.start]), int(offsets[mine.stop])
    own = {name: x.detach()[first:last] for name, x in inputs.items()}
    own["advantages"] = inputs["advantages"][mine]
    own["cu_seqlens"] = offsets[mine.start : mine.stop + 1] - first
    own["logprobs"].requires_grad_()
    denominator = distributed.global_denominator(own["mask"], own["cu_seqlens"], params=params)
    many = lvrpo.grpo_loss(**own, params=params, denominator=denominator)
    many.loss.backward()

    total = many.loss.detach().clone()
    torch.distributed.all_reduce(total)
    torch.testing.assert_close(total, one.loss.detach())
    expected = inputs["logprobs"].grad
    assert expected is not None
    torch.testing.assert_close(own["logprobs"].grad, expected[first:last])
    found, whole = many.metrics.all_reduce().as_dict(), one.metrics.as_dict()
    for name, value in whole.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def denominators(mask: Any, cu_seqlens: Any, params: Sequence[LossParams]) -> list[float]:
    return [float(distributed.global_denominator(mask, cu_seqlens, params=p)) for p in params]


def check_threshold(counts: Sequence[int], fraction: float) -> None:
    made = torch.Generator(device="cpu").manual_seed(5)
    entropy = torch.rand(sum(counts), generator=made, device="cpu").to(torch.empty(0).device)
    mask = torch.arange(len(entropy)) % 3 != 1
    entropy[1] = math.nan
    mine = here(counts)
    found = distributed.top_entropy_threshold(entropy[mine], fraction=fraction, mask=mask[mine])
    expected = lvrpo.top_entropy_threshold(entropy, fraction=fraction, mask=mask)
    assert torch.equal(found, expected)


def threshold(fractions: Sequence[float], entropy: float) -> Tensor:
    fraction = fractions[torch.distributed.get_rank()]
    return distributed.top_entropy_threshold(torch.full((2,), entropy), fraction=fraction)
