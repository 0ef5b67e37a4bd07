"""Deliberately broken versions of flow_step; the tolerance rule must reject every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.params.flow import StepCoefficients
from lvrpo.reference.flow_step import flow_step as reference


def with_coefficients(
    change: Callable[[StepCoefficients], dict[str, Tensor]],
) -> Callable[..., Any]:
    def mutant(velocity: Tensor, x_t: Tensor, coeffs: StepCoefficients, noise: Tensor) -> Any:
        return reference(velocity, x_t, dataclasses.replace(coeffs, **change(coeffs)), noise)

    return mutant


def with_gradient(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def mutant(velocity: Tensor, x_t: Tensor, coeffs: StepCoefficients, noise: Tensor) -> Any:
        if velocity.requires_grad:
            velocity = velocity * 1.0
            velocity.register_hook(change)
        return reference(velocity, x_t, coeffs, noise)

    return mutant


def with_logprob(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """`change` gets the log-prob and the element count."""

    def mutant(velocity: Tensor, *rest: Any, **named: Any) -> Any:
        x_next, logprob = reference(velocity, *rest, **named)
        return x_next, change(logprob, torch.tensor(float(velocity[0].numel())))

    return mutant


def neighbour_noise(velocity: Tensor, x_t: Tensor, coeffs: StepCoefficients, noise: Tensor) -> Any:
    return reference(velocity, x_t, coeffs, noise.roll(1, 0))


def sample_is_not_data(
    velocity: Tensor, x_t: Tensor, coeffs: StepCoefficients, noise: Tensor
) -> Any:
    x_next, logprob = reference(velocity, x_t, coeffs, noise)
    return x_next, logprob.detach()


MUTANTS: dict[str, Callable[..., Any]] = {
    "c_v sign": with_coefficients(lambda c: {"c_v": -c.c_v}),
    "c_x is one": with_coefficients(lambda c: {"c_x": torch.ones_like(c.c_x)}),
    "variance for std": with_coefficients(lambda c: {"std": c.std**2}),
    "coefficients of the neighbour": with_coefficients(
        lambda c: {"c_x": c.c_x.roll(1), "c_v": c.c_v.roll(1), "std": c.std.roll(1)}
    ),
    "noise of the neighbour": neighbour_noise,
    "log-prob summed": with_logprob(lambda logprob, size: logprob * size),
    "log-prob in bits": with_logprob(lambda logprob, _: logprob / 0.6931471805599453),
    "log-prob without its gradient": sample_is_not_data,
    "gradient all zeros": with_gradient(torch.zeros_like),
    "gradient sign flipped": with_gradient(torch.neg),
    "gradient scaled by 2 %": with_gradient(lambda g: g * 1.02),
    "gradient misses the last sample": with_gradient(
        lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])])
    ),
}
