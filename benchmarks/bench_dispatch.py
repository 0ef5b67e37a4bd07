"""What a call costs the host: every op with inputs so small that nothing else takes time.

With a GPU that is the column `host_ms`. Without one it is the time of the call, the arithmetic of a
few numbers included, and Triton's launches end at a driver that does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness.measure import Gate, step
from harness.null_launch import NullTriton, null_driver, unread
from harness.providers import DEVICE, Case
from torch import Tensor

import lvrpo
from lvrpo.params.metrics import Metrics

ROWS, VOCAB, HIDDEN = 8, 32, 16
NULL = NullTriton()


def head() -> dict[str, Any]:
    return {"hidden": torch.randn(ROWS, HIDDEN), "weight": torch.randn(VOCAB, HIDDEN)}


def targets() -> dict[str, Any]:
    return {"token_ids": torch.arange(ROWS)}


def loss_data() -> dict[str, Any]:
    return {
        "old_logprobs": -torch.rand(ROWS) - 3,
        "advantages": torch.randn(2),
        "cu_seqlens": torch.tensor([0, ROWS // 2, ROWS]),
    }


def coefficients() -> lvrpo.StepCoefficients:
    t = torch.linspace(0.9, 0.5, 2)
    return lvrpo.StepCoefficients(c_x=1 - t / 9, c_v=t - 1.1, std=t / 3, t=t, dt=-t / 7)


def latents(*names: str) -> dict[str, Any]:
    return {name: torch.randn(2, 16) for name in names} | {"coeffs": coefficients()}


def attention() -> dict[str, Any]:
    mask = lvrpo.SpanMask.from_spans([ROWS], [-1], ["causal"])
    return {name: torch.randn(ROWS, 2, 16) for name in "qkv"} | {"mask": mask.to(DEVICE)}


#: By op: inputs, and which of them get a gradient.
OPS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "gather_logprobs": (lambda: {"logits": torch.randn(ROWS, VOCAB)} | targets(), ("logits",)),
    "linear_logprobs": (lambda: head() | targets(), ("hidden", "weight")),
    "grpo_loss": (lambda: {"logprobs": -torch.rand(ROWS) - 3} | loss_data(), ("logprobs",)),
    "logits_grpo_loss": (
        lambda: {"logits": torch.randn(ROWS, VOCAB)} | targets() | loss_data(),
        ("logits",),
    ),
    "linear_grpo_loss": (lambda: head() | targets() | loss_data(), ("hidden", "weight")),
    "normalize_advantages": (lambda: {"rewards": torch.randn(64, 3), "groups": 8}, ()),
    "packed_attention": (attention, ("q", "k", "v")),
    "guided_velocity": (
        lambda: {name: torch.randn(2, 4, 4) for name in ("velocity", "without_text")},
        ("velocity",),
    ),
    "flow_step": (lambda: latents("velocity", "x_t", "noise"), ("velocity", "x_t")),
    "flow_policy_loss": (
        lambda: latents("velocity", "velocity_old", "noise") | {"advantages": torch.randn(2)},
        ("velocity",),
    ),
}


def tensors(functional: Any, **inputs: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, whatever it is."""
    found = functional(**inputs)
    if isinstance(found, lvrpo.Advantages):
        return found.values, found.per_reward
    if isinstance(found, Tensor):
        return (found,)
    return tuple(x for x in found if not isinstance(x, Metrics))


def providers(case: Case) -> Iterator[str]:
    """The backends that run the op here with kernels of their own."""
    if DEVICE == "cpu" and not NULL.why_not(case.op):
        yield NULL.name
    yield from (name for name, reason in case.providers("small").items() if not reason)


def timed(case: Case, name: str, direction: str) -> Callable[[], Any]:
    """What is timed of a provider."""
    if name != NULL.name:
        return step(case.bind(name), case, direction)
    with unread():
        return unread()(step(case.bind(name), case, direction))


@pytest.mark.parametrize("op", OPS)
def bench_dispatch(op, direction, race, publish):
    make, differentiable = OPS[op]
    if direction == "forward+backward" and not differentiable:
        pytest.skip(f"{op} has no gradient")
    case = Case(op, make(), differentiable, call=tensors, shape="dispatch")
    gate = Gate(case, direction)
    launches_nothing = DEVICE == "cpu" and not NULL.why_unavailable()
    with null_driver() if launches_nothing else contextlib.nullcontext():
        steps = {name: timed(case, name, direction) for name in providers(case)}
        found = race(f"dispatch of {op} {direction}", steps, most=1000)
    for name in steps:
        facts = found.times[name].facts()
        precision, wrong = None, "its launches do nothing"
        if name != NULL.name:
            precision, wrong = gate.grade(case.bind(name))
        publish(
            op=op,
            direction=direction,
            shape=case.described,
            dtype="float32",
            provider=name,
            provider_version=case.version(name),
            rounds=found.rounds,
            correct=precision is not None,
            precision=precision,
            why_no_number=wrong or None,
            **facts | {"host_ms": facts["host_ms"] or facts["wall_ms"]},
        )
