"""What the ops that form a policy loss and its gradient in one pass can get wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Mutant = Callable[..., tuple[Tensor, ...]]
Inputs = dict[str, Any]


class _Detour(torch.autograd.Function):
    """The identity, whose backward does what a broken op would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


class Broken:
    """Makes mutants of a reference that returns loss, metrics, log-probs and entropies."""

    def __init__(self, reference: Mutant) -> None:
        self.reference = reference

    def with_gradient(self, name: str, change: Callable[[Tensor], Tensor]) -> Mutant:
        def mutant(**inputs: Any) -> tuple[Tensor, ...]:
            return self.reference(**inputs | {name: _Detour.apply(inputs[name], change)})

        return mutant

    def with_upstream(self, change: Callable[[Tensor], Tensor]) -> Mutant:
        def mutant(**inputs: Any) -> tuple[Tensor, ...]:
            loss, *others = self.reference(**inputs)
            return _Detour.apply(loss, change), *others

        return mutant

    def with_inputs(self, change: Callable[[Inputs], Inputs]) -> Mutant:
        return lambda **inputs: self.reference(**inputs | change(inputs))

    def with_params(self, **changes: Any) -> Mutant:
        def mutant(params: Any, **inputs: Any) -> tuple[Tensor, ...]:
            return self.reference(**inputs, params=dataclasses.replace(params, **changes))

        return mutant

    def wrong_output(self, index: int, change: Callable[[Tensor], Tensor]) -> Mutant:
        def mutant(**inputs: Any) -> tuple[Tensor, ...]:
            outputs = list(self.reference(**inputs))
            outputs[index] = change(outputs[index])
            return tuple(outputs)

        return mutant


def without_dead_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    lengths = inputs["cu_seqlens"].diff()
    advantage = inputs["advantages"].repeat_interleave(lengths)
    return {"mask": inputs["mask"] & (advantage > 0)}


def without_weightless_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """As if a policy weight of 0 left the denominator too."""
    return {"mask": inputs["mask"] & (inputs["policy_weights"] != 0)}
