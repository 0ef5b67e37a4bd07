"""Deliberately broken versions of flow_policy_loss; the tolerance rule must reject every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.reference.flow_policy_loss import flow_policy_loss as reference

Result = tuple[Tensor, dict[str, Tensor]]


def with_params(**replaced: Any) -> Callable[..., Result]:
    def mutant(**inputs: Any) -> Result:
        return reference(**inputs | {"params": dataclasses.replace(inputs["params"], **replaced)})

    return mutant


def with_coefficients(**change: Callable[[Tensor], Tensor]) -> Callable[..., Result]:
    def mutant(**inputs: Any) -> Result:
        coeffs = inputs["coeffs"]
        replaced = {name: function(getattr(coeffs, name)) for name, function in change.items()}
        return reference(**inputs | {"coeffs": dataclasses.replace(coeffs, **replaced)})

    return mutant


def with_input(name: str, change: Callable[[Tensor], Any]) -> Callable[..., Result]:
    return lambda **inputs: reference(**inputs | {name: change(inputs[name])})


def with_gradient(change: Callable[[Tensor], Tensor]) -> Callable[..., Result]:
    def mutant(**inputs: Any) -> Result:
        velocity = inputs["velocity"]
        if velocity.requires_grad:
            velocity = velocity * 1.0
            velocity.register_hook(change)
        return reference(**inputs | {"velocity": velocity})

    return mutant


def gradient_of(other: Callable[..., Result]) -> Callable[..., Result]:
    """The right numbers with the gradient of another objective."""

    def mutant(**inputs: Any) -> Result:
        loss, metrics = reference(**inputs)
        wrong, _ = other(**inputs)
        return wrong + (loss - wrong).detach(), metrics

    return mutant


def without_quadratic_term(**inputs: Any) -> Result:
    # The log-ratio of "guard" for noise / std has no quadratic term; undo its division by |dt|.
    coeffs, params = inputs["coeffs"], inputs["params"]
    noise = inputs["noise"]
    std = coeffs.std.to(noise).reshape(-1, *[1] * (noise.dim() - 1))
    advantages = inputs["advantages"].clamp(-params.adv_clip, params.adv_clip)
    return reference(
        **inputs
        | {
            "noise": noise / std,
            "advantages": advantages * coeffs.dt.abs(),
            "params": dataclasses.replace(params, variant="guard", adv_clip=None),
        }
    )


def weights_as_mask(**inputs: Any) -> Result:
    return reference(**inputs | {"mask": inputs["mask"] & (inputs["policy_weights"] > 0)})


def weights_as_mask_of_the_loss(**inputs: Any) -> Result:
    return weights_as_mask(**inputs)[0], reference(**inputs)[1]


def mask_as_weights(**inputs: Any) -> Result:
    weights = inputs["policy_weights"] * inputs["mask"]
    unmasked = reference(**inputs | {"mask": None, "policy_weights": weights})
    return unmasked[0], reference(**inputs)[1]


MUTANTS: dict[str, Callable[..., Result]] = {
    "c_v sign": with_coefficients(c_v=torch.neg),
    "variance for std": with_coefficients(std=torch.square),
    "dt ignored": with_coefficients(dt=torch.ones_like),
    "coefficients of the neighbour": with_coefficients(
        c_v=lambda c: c.roll(1), std=lambda c: c.roll(1)
    ),
    "quadratic term missing": without_quadratic_term,
    "clip sides swapped": with_params(clip_low=0.3, clip_high=0.05),
    "KL form swapped": with_params(kl="gaussian"),
    "sum for mean": with_params(log_ratio_scale=1.0),
    "advantage clamp ignored": with_params(adv_clip=None),
    "advantage of the neighbour": with_input("advantages", lambda a: a.roll(1)),
    "noise of the neighbour": with_input("noise", lambda z: z.roll(1, 0)),
    "reference of the neighbour": with_input("velocity_ref", lambda v: v.roll(1, 0)),
    "weights ignored": with_input("policy_weights", torch.ones_like),
    "a weight of 0 does not count": weights_as_mask,
    "a weight of 0 has no KL": weights_as_mask_of_the_loss,
    "mask ignored": with_input("mask", torch.ones_like),
    "mask on the policy term alone": mask_as_weights,
    "denominator ignored": with_input("denominator", lambda _: None),
    "KL without its gradient": gradient_of(with_params(beta=0.0)),
    "clipped samples still pull": gradient_of(with_params(clip_low=1.0, clip_high=1e9)),
    "gradient all zeros": with_gradient(torch.zeros_like),
    "gradient sign flipped": with_gradient(torch.neg),
    "gradient scaled by 2 %": with_gradient(lambda g: g * 1.02),
    "gradient misses the last 8 elements": with_gradient(
        lambda g: torch.cat([g[..., :-8], torch.zeros_like(g[..., -8:])], dim=-1)
    ),
}
# One variant for another.
VARIANT_MUTANTS: dict[str, tuple[str, Callable[..., Result]]] = {
    "guard with the std": ("guard", with_params(variant="ppo")),
    "guard not divided by dt": ("guard", with_coefficients(dt=torch.ones_like)),
    "dppo masks nothing": ("dppo", with_params(tau=1e9)),
    "limit ignored": ("ppo", with_params(log_ratio_limit=None)),
    "dppo masks on its own gradient": ("dppo", with_input("advantages", torch.neg)),
}
