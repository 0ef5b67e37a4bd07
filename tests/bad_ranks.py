"""Calls in which ranks differ, or one of them refuses. To be run in every rank of a group."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed

from lvrpo import LossParams, distributed

VOCAB, WIDTH, ROWS = 8, 4, 6


def inputs(size: int) -> dict[str, Any]:
    """Of `linear_grpo_loss`, right as they are: equal parts."""
    rank = torch.distributed.get_rank()
    columns = VOCAB // size
    weight = torch.randn(VOCAB, WIDTH)
    cuts = tuple((i * columns, (i + 1) * columns) for i in range(size))
    return {
        "hidden": torch.randn(ROWS, WIDTH),
        "weight": weight[rank * columns : (rank + 1) * columns],
        "token_ids": torch.arange(ROWS) % VOCAB,
        "old_logprobs": -torch.ones(ROWS),
        "advantages": torch.tensor([1.0, -1.0]),
        "cu_seqlens": torch.tensor([0, 2, ROWS]),
        "shards": distributed.VocabShards(cuts),
    }


def _more_rows(x: dict[str, Any]) -> None:
    x |= {"hidden": torch.randn(7, WIDTH), "token_ids": torch.arange(7), "cu_seqlens": [0, 2, 7]}
    x["old_logprobs"] = -torch.ones(7)


def _wider_dtype(x: dict[str, Any]) -> None:
    for name in ("hidden", "weight"):
        x[name] = x[name].double()


#: By what rank 1 does: how, and what every rank says of it.
DIFFERENT = {
    "more rows": (_more_rows, "ranks disagree: rows is .6,. on rank 0 .* .7,. on rank 1"),
    "another dtype": (_wider_dtype, "ranks disagree: dtype is torch.float32 on rank 0"),
    "another temperature": (
        lambda x: x.update(temperature=0.5),
        "ranks disagree: temperature is 1.0 on rank 0 of the group, but 0.5 on rank 1",
    ),
    "its own tokens": (
        lambda x: x.update(token_ids=x["token_ids"].flip(0) // 2),
        "ranks disagree: the sum of token_ids",
    ),
    "another loss": (
        lambda x: x.update(params=LossParams(clip_high=0.3)),
        "ranks disagree: params",
    ),
    "another share of the entropies": (
        lambda x: x.update(top_entropy=0.3),
        "ranks disagree: top_entropy is None on rank 0 of the group, but 0.3 on rank 1",
    ),
    "a sampler": (
        lambda x: x.update(off_policy_threshold=0.1, sampler_logprobs=x["old_logprobs"]),
        "ranks disagree: off_policy_threshold",
    ),
    "advantages of 0": (
        lambda x: x.update(advantages=torch.zeros(2)),
        "ranks disagree: the number of advantages that are not 0 is 2 on rank 0",
    ),
    "a token that is not there": (
        lambda x: x.update(token_ids=x["token_ids"] + 3),
        r"token_ids\[5\] is 8, expected \[0, 8\)",
    ),
    "another part": (
        lambda x: x.update(weight=x["weight"][:-1]),
        "weight has . columns of the vocabulary, but shards has .* for this rank",
    ),
    "another budget": (
        lambda x: x.update(memory_budget=1),
        "memory_budget is 1 bytes",
    ),
    "frozen hidden states": (
        lambda x: x.update(hidden=x["hidden"].detach()),
        "ranks disagree: needs a gradient is True on rank 0",
    ),
}


def differ(name: str) -> None:
    """Rank 1 does."""
    given = inputs(torch.distributed.get_world_size())
    given["hidden"].requires_grad_()
    if torch.distributed.get_rank() == 1:
        DIFFERENT[name][0](given)
    distributed.linear_grpo_loss(**given)


def agree() -> None:
    """Nobody does: what came before has left nothing behind."""
    given = inputs(torch.distributed.get_world_size())
    given["hidden"].requires_grad_()
    distributed.linear_grpo_loss(**given).loss.backward()


def shards(
    columns: list[int], firsts: list[int] | None, sizes: list[Any], dtypes: list[str]
) -> Any:
    """What the ranks that have so many columns, from there on, make of them."""
    rank = torch.distributed.get_rank()
    weight = torch.zeros(columns[rank], WIDTH, dtype=getattr(torch, dtypes[rank]))
    first = None if firsts is None else firsts[rank]
    return distributed.VocabShards.of(weight, first, vocab_size=sizes[rank]).ranges


def not_a_number() -> None:
    """Rank 1 has one among its rows of the weight."""
    given = inputs(torch.distributed.get_world_size())
    if torch.distributed.get_rank() == 1:
        given["weight"] = given["weight"].clone()
        given["weight"][1] = torch.nan
    distributed.linear_grpo_loss(**given)


def far_apart(scale: float) -> None:
    """Logits of this size."""
    given = inputs(torch.distributed.get_world_size())
    hidden, weight = torch.full((ROWS, WIDTH), scale / WIDTH), torch.ones_like(given["weight"])
    distributed.linear_logprobs(hidden, weight, given["token_ids"], shards=given["shards"])


def die_before_the_others() -> None:
    """The last rank does, as if it had been killed, while the others wait for it."""
    given = inputs(torch.distributed.get_world_size())
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        os._exit(9)
    distributed.linear_grpo_loss(**given)


def stand_still() -> None:
    """The last rank never calls."""
    given = inputs(torch.distributed.get_world_size())
    if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
        distributed.linear_grpo_loss(**given)
