"""Deliberately broken versions of flow_step; the tolerance rule must reject every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.params.flow import StepCoefficients
from lvrpo.reference._philox import standard_normal
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


def with_streams(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def mutant(velocity: Tensor, x_t: Tensor, coeffs: StepCoefficients, noise: Tensor) -> Any:
        return reference(velocity, x_t, coeffs, change(noise))

    return mutant


def with_numbers(change: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    """`change` gets the streams and the element count, and gives the noise."""

    def mutant(velocity: Tensor, x_t: Tensor, coeffs: StepCoefficients, noise: Tensor) -> Any:
        z = change(noise, velocity[0].numel()).view(velocity.shape)
        return reference(velocity, x_t, coeffs, z.to(velocity.dtype))

    return mutant


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

# Of noise that is drawn from streams.
STREAM_MUTANTS: dict[str, Callable[..., Any]] = {
    "stream of the neighbour": with_streams(lambda s: s.roll(1, 0)),
    "one stream for all": with_streams(lambda s: s[:1].expand_as(s)),
    "seed for subsequence": with_streams(lambda s: s.flip(1)),
    "subsequence ignored": with_streams(lambda s: s * torch.tensor([1, 0])),
    "lower half of the seed alone": with_streams(lambda s: s & torch.tensor([0xFFFFFFFF, -1])),
    "lower half of the subsequence alone": with_streams(
        lambda s: s & torch.tensor([-1, 0xFFFFFFFF])
    ),
    "numbers one on": with_numbers(lambda s, size: standard_normal(s, size + 1)[:, 1:]),
    "pairs swapped": with_numbers(
        lambda s, size: standard_normal(s, size).view(len(s), -1, 2).flip(2)
    ),
    "the same numbers over and over": with_numbers(
        lambda s, size: standard_normal(s, 4).repeat(1, size // 4)
    ),
}
