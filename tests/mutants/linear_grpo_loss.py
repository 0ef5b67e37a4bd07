"""Deliberately broken versions of linear_grpo_loss; the tolerance rule must reject every one.

What a loss can get wrong is in `mutants.grpo_loss`; these get a chunk, a row or a scale wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.reference.linear_grpo_loss import linear_grpo_loss as reference

Mutant = Callable[..., tuple[Tensor, ...]]


class _Detour(torch.autograd.Function):
    """The identity, whose backward does what a broken op would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def with_gradient(name: str, change: Callable[[Tensor], Tensor]) -> Mutant:
    def mutant(**inputs: Any) -> tuple[Tensor, ...]:
        return reference(**inputs | {name: _Detour.apply(inputs[name], change)})

    return mutant


def with_upstream(change: Callable[[Tensor], Tensor]) -> Mutant:
    def mutant(**inputs: Any) -> tuple[Tensor, ...]:
        loss, *others = reference(**inputs)
        return _Detour.apply(loss, change), *others

    return mutant


def with_inputs(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutant:
    return lambda **inputs: reference(**inputs | change(inputs))


def with_params(**changes: Any) -> Mutant:
    def mutant(params: Any, **inputs: Any) -> tuple[Tensor, ...]:
        return reference(**inputs, params=dataclasses.replace(params, **changes))

    return mutant


def detached_rows(begin: int, end: int | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        hidden = inputs["hidden"]
        rows = torch.arange(len(hidden))
        inside = (rows >= begin) & (rows < (len(hidden) if end is None else end))
        return {"hidden": torch.where(inside[:, None], hidden.detach(), hidden)}

    return change


def without_dead_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    lengths = inputs["cu_seqlens"].diff()
    advantage = inputs["advantages"].repeat_interleave(lengths)
    return {"token_weights": inputs["token_weights"] * (advantage > 0)}


def wrong_output(index: int, change: Callable[[Tensor], Tensor]) -> Mutant:
    def mutant(**inputs: Any) -> tuple[Tensor, ...]:
        outputs = list(reference(**inputs))
        outputs[index] = change(outputs[index])
        return tuple(outputs)

    return mutant


MUTANTS: dict[str, Mutant] = {
    "dhidden all zeros": with_gradient("hidden", torch.zeros_like),
    "dhidden not put back in order": with_gradient("hidden", lambda g: g.flip(0)),
    "dhidden without the last chunk": with_inputs(detached_rows(20, None)),
    "dhidden without the first row": with_inputs(detached_rows(0, 1)),
    "dweight all zeros": with_gradient("weight", torch.zeros_like),
    "dweight sign flipped": with_gradient("weight", torch.neg),
    "dweight scaled by 2 %": with_gradient("weight", lambda g: g * 1.02),
    "dweight misses its last row": with_gradient(
        "weight", lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])])
    ),
    "dbias all zeros": with_gradient("bias", torch.zeros_like),
    "upstream gradient ignored": with_upstream(torch.ones_like),
    "upstream gradient applied twice": with_upstream(torch.square),
    "gradient of the entropy missing": with_params(entropy_coef=0.0),
    "gradient of the KL missing": with_params(beta=0.0),
    "rows without a gradient left out of the metrics": with_inputs(without_dead_rows),
    "tokens shifted by one": with_inputs(lambda i: {"token_ids": i["token_ids"].roll(1)}),
    "old log-probs shifted by one": with_inputs(
        lambda i: {"old_logprobs": i["old_logprobs"].roll(1)}
    ),
    "row of the neighbour": with_inputs(lambda i: {"row_index": i["row_index"].roll(1)}),
    "shared row counted once": with_inputs(
        lambda i: {"row_index": torch.arange(len(i["row_index"]))}
    ),
    "bias ignored": with_inputs(lambda i: {"bias": i["bias"] * 0}),
    "temperature ignored": with_inputs(lambda i: {"temperature": 1.0}),
    "log-probs of masked tokens kept": wrong_output(2, lambda x: x - (x == 0).to(x)),
    "entropy in bits": wrong_output(3, lambda x: x / 0.6931471805599453),
}
