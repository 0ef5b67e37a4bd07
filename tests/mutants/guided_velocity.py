"""Deliberately broken versions of guided_velocity; the tolerance rule must reject every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvrpo.params.flow import GuidanceParams
from lvrpo.reference.guided_velocity import guided_velocity as reference


def with_params(change: Callable[[GuidanceParams], dict[str, Any]]) -> Callable[..., Any]:
    def mutant(*, params: GuidanceParams, **inputs: Any) -> Any:
        return reference(**inputs, params=dataclasses.replace(params, **change(params)))

    return mutant


def with_inputs(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    def mutant(**inputs: Any) -> Any:
        return reference(**inputs | change(inputs))

    return mutant


def with_gradient(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def mutant(**inputs: Any) -> Any:
        if inputs[name].requires_grad:
            inputs[name] = inputs[name] * 1.0
            inputs[name].register_hook(change)
        return reference(**inputs)

    return mutant


def factor_is_data(**inputs: Any) -> Any:
    """The renormalisation without its gradient."""
    plain = reference(**inputs | {"params": dataclasses.replace(inputs["params"], renorm="none")})
    factor = reference(**inputs) / plain
    return plain * factor.detach()


MUTANTS: dict[str, Callable[..., Any]] = {
    "scale is the push": with_params(lambda p: {"text_scale": p.text_scale + 1}),
    "scales exchanged": with_params(
        lambda p: {"text_scale": p.image_scale, "image_scale": p.text_scale}
    ),
    "not renormalised": with_params(lambda p: {"renorm": "none"}),
    "norm of a row": with_params(lambda p: {"renorm": "channel"}),
    "renormalised before the image": with_params(lambda p: {"renorm": "text_channel"}),
    "no smallest factor": with_params(lambda p: {"renorm_min": 0.0}),
    "branches exchanged": with_inputs(
        lambda x: {"without_text": x["without_image"], "without_image": x["without_text"]}
    ),
    "branch of the neighbour": with_inputs(
        lambda x: {"without_text": x["without_text"].roll(1, 0)}
    ),
    "all are guided": with_inputs(lambda x: {"guided": None}),
    "none without an image branch": with_inputs(lambda x: {"without_image": None}),
    "factor without its gradient": factor_is_data,
    "gradient sign flipped": with_gradient("velocity", torch.neg),
    "gradient scaled by 2 %": with_gradient("velocity", lambda g: g * 1.02),
    "branch is data": with_gradient("without_text", torch.zeros_like),
    "image branch is data": with_gradient("without_image", torch.zeros_like),
    "gradient misses the last sample": with_gradient(
        "velocity", lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])])
    ),
}
