"""Gradients are the same bits however autograd keeps what a backward needs, and however often."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doors.calls import Call, Inputs, device_of, every_call
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def checkpointed(call: Call, inputs: Inputs, *, use_reentrant: bool) -> list[Tensor]:
    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return call.run(**inputs | dict(zip(call.differentiable, leaves, strict=True)))

    leaves = [inputs[name] for name in call.differentiable]
    return gradients(call, inputs, checkpoint(run, *leaves, use_reentrant=use_reentrant))


def gradients(call: Call, inputs: Inputs, results: Any, **options: Any) -> list[Tensor]:
    """By `backward`, because reentrant checkpointing knows no other way."""
    leaves = [inputs[name] for name in call.differentiable]
    for leaf in leaves:
        leaf.grad = None
    call.total(results).backward(**options)
    return [leaf.grad for leaf in leaves]


def plain(call: Call, inputs: Inputs) -> list[Tensor]:
    return gradients(call, inputs, call.run(**inputs))


def reentrant(call: Call, inputs: Inputs) -> list[Tensor]:
    return checkpointed(call, inputs, use_reentrant=True)


def non_reentrant(call: Call, inputs: Inputs) -> list[Tensor]:
    return checkpointed(call, inputs, use_reentrant=False)


def saved_on_cpu(call: Call, inputs: Inputs) -> list[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        results = call.run(**inputs)
    return gradients(call, inputs, results)


def second_backward(call: Call, inputs: Inputs) -> list[Tensor]:
    results = call.run(**inputs)
    gradients(call, inputs, results, retain_graph=True)
    return gradients(call, inputs, results)


def second_forward(call: Call, inputs: Inputs) -> list[Tensor]:
    first = call.run(**inputs)
    gradients(call, inputs, call.run(**inputs))
    return gradients(call, inputs, first)


WAYS: tuple[Callable[[Call, Inputs], list[Tensor]], ...] = (
    reentrant,
    non_reentrant,
    saved_on_cpu,
    second_backward,
    second_forward,
)
MIXED = ("fp32", "autocast", "autocast of 16-bit weights")


def in_precision(call: Call, backend: str, precision: str) -> tuple[Inputs, Any]:
    """Inputs, and the context to call in."""
    inputs = call.inputs(backend)
    if precision == "fp32":
        return inputs, contextlib.nullcontext()
    if precision != "autocast":
        inputs |= {name: inputs[name].bfloat16() for name in call.narrow}
        inputs = call.with_leaves(inputs)
    return inputs, torch.autocast(device_of(inputs), torch.bfloat16)


@pytest.mark.parametrize("precision", MIXED)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@every_call
def test_gradients_are_the_same_bits(call, way, precision, backend):
    if not call.differentiable:
        pytest.skip("it has no gradient")
    inputs, context = in_precision(call, backend, precision)
    with context:
        expected = plain(call, inputs)
        ours = way(call, inputs)
    assert all(gradient.isfinite().all() for gradient in expected)
    for name, gradient, plain_gradient in zip(call.differentiable, ours, expected, strict=True):
        assert gradient.dtype == inputs[name].dtype
        assert torch.equal(gradient, plain_gradient), name
