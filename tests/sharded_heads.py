"""Ops on a vocabulary that ranks share, called like those of one process: with whole factors.

To be run in every rank of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from linear_inputs import (
    gradient_scales,
    logit_scale,
    loss_scales,
    make_head,
    make_loss_inputs,
    ranges,
    run_reference,
    with_statistics,
)
from mutants._distributed import MUTANTS
from torch import Tensor

from lvrpo import distributed
from lvrpo.reference.gather_logprobs import gather_logprobs
from lvrpo.reference.linear_logprobs import linear_logprobs
from lvrpo.testing import check_op

#: What a rank's columns are: by rank, first and one past the last.
Cuts = Sequence[tuple[int, int]]


class Part(torch.autograd.Function):
    """The rank's rows of a whole weight, whose gradient is put together from all ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, low: int, high: int) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.rows = whole.shape, slice(low, high)
        return whole[low:high].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = gradient.new_zeros(ctx.shape)
        whole[ctx.rows] = gradient
        torch.distributed.all_reduce(whole)
        return whole, None, None


def shards_of(cuts: Cuts) -> distributed.VocabShards:
    return distributed.VocabShards(tuple(cuts))


def own(cuts: Cuts) -> tuple[int, int]:
    return cuts[torch.distributed.get_rank()]


def linear(op: Callable[..., Any], cuts: Cuts, **inputs: Any) -> Any:
    """An op on hidden states and a weight."""
    for name in ("weight", "bias"):
        if inputs.get(name) is not None:
            inputs[name] = Part.apply(inputs[name], *own(cuts))
    return op(**inputs, shards=shards_of(cuts))


def from_logits(cuts: Cuts, **inputs: Any) -> Any:
    logits = Part.apply(inputs.pop("logits").T, *own(cuts)).T
    return distributed.gather_logprobs(logits, **inputs, shards=shards_of(cuts))


def loss(cuts: Cuts, **inputs: Any) -> Any:
    return with_statistics(*linear(distributed.linear_grpo_loss, cuts, **inputs))


def head_inputs(dtype: torch.dtype, vocab: int, **options: Any) -> dict[str, Any]:
    """Of `linear_logprobs`: rows that several tokens share or none uses, an ignored token."""
    rows, tokens = 7, 16
    inputs: dict[str, Any] = make_head(rows, 6, vocab, dtype)
    index = torch.randint(0, rows - 1, (tokens,))
    low, high = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), vocab)
    if options.get("vocab_range") == "of rows":
        low = torch.randint(0, vocab, (rows,))
        high = low + 1 + (torch.rand(rows) * (vocab - low)).long()
        options = options | {"vocab_range": torch.stack([low, high], dim=1)}
    elif "vocab_range" in options:
        low, high = (torch.full((rows,), end) for end in options["vocab_range"])
    ids = low[index] + (torch.rand(tokens) * (high - low)[index]).long()
    ids[2] = -100
    inputs |= {"token_ids": ids, "row_index": index}
    return inputs | {"return_entropy": True, "return_sum_squares": True} | options


def head_scales(inputs: dict[str, Any]) -> dict[str, Any]:
    _, largest = logit_scale(inputs)
    tokens, rows = len(inputs["token_ids"]), len(inputs["hidden"])
    by_logprob = torch.full((tokens,), 1.0 / tokens)
    by_entropy = torch.full((rows,), 1.0 / rows)
    return {
        **dict.fromkeys(("out0", "out1", "out2"), largest),
        **gradient_scales(inputs, by_logprob, by_entropy),
    }


def check_linear(cuts: Cuts, backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = head_inputs(dtype, cuts_end(cuts), **options)
    rows = len(inputs["hidden"])

    def reference(**given: Any) -> Any:
        given.pop("memory_budget", None)
        return linear_logprobs(**ranges(given, rows))

    op = functools.partial(linear, distributed.linear_logprobs, cuts, backend=backend)
    names = "hidden", "weight", "bias"
    check_op(op, reference, inputs, differentiable=names, scales=head_scales(inputs))


def check_logits(cuts: Cuts, backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = head_inputs(dtype, cuts_end(cuts), **options)
    factors = {name: inputs.pop(name) for name in ("hidden", "weight", "bias")}
    logits = factors["hidden"] @ factors["weight"].T + factors["bias"]
    identity = torch.eye(logits.shape[1]).to(logits)
    # As a head, whose gradient by hidden states is that by logits.
    scales = head_scales({"hidden": logits, "weight": identity, **inputs})
    scales["dlogits"] = scales.pop("dhidden")
    check_op(
        functools.partial(from_logits, cuts, backend=backend),
        lambda **given: gather_logprobs(**ranges(given, len(logits))),
        {"logits": logits, **inputs},
        differentiable=["logits"],
        scales=scales,
    )


def check_loss(
    cuts: Cuts,
    backend: str,
    dtype: torch.dtype,
    params: Any,
    rows: int,
    options: dict[str, Any],
) -> None:
    """With a budget of so many rows of the widest shard, prompts shared."""
    lengths = [5, 0, 9, 1, 6]
    inputs = make_loss_inputs(lengths, dtype, vocab=cuts_end(cuts), shared_prompts=True, **options)
    widest = max(high - low for low, high in cuts)
    inputs |= {"params": params, "memory_budget": rows * widest * 8}
    inputs["advantages"][2] = 0.0
    check_op(
        functools.partial(loss, cuts, backend=backend),
        run_reference,
        inputs,
        differentiable=["hidden", "weight", "bias"],
        scales=loss_scales(inputs),
    )


def cuts_end(cuts: Cuts) -> int:
    return max(high for _, high in cuts)


def is_rejected(mutant: str, check: Callable[..., None], *arguments: Any) -> bool:
    """Whether the tolerance rule finds what is wrong, on this rank."""
    with MUTANTS[mutant]():
        try:
            check(*arguments)
        except AssertionError:
            return True
    return False
