"""What counts, what weighs, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_inputs import as_tuple, make_inputs, params_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lvrpo import checks
from lvrpo.models.flow import FlowSchedule
from lvrpo.ops.flow_policy_loss import flow_policy_loss
from lvrpo.params.flow import VARIANTS, FlowLossMetrics, FlowLossParams
from lvrpo.reference.flow_policy_loss import flow_policy_loss as reference

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e38, -1e38])
@pytest.mark.parametrize("unread", [False, True])
def test_a_sample_that_does_not_count_is_ignored_whatever_it_holds(
    backend, variant, junk, unread, monkeypatch
):
    inputs = make_inputs((8, 4, 12), torch.float32, params_of(variant)) | {"denominator": None}
    kept = inputs["mask"]
    alone = {
        name: value[kept] if isinstance(value, Tensor) and value.dim() else value
        for name, value in inputs.items()
    } | {"coeffs": inputs["coeffs"].select(kept)}
    for name in ("velocity", "velocity_old", "noise", "velocity_ref", "advantages"):
        inputs[name][~kept] = junk
    inputs["policy_weights"][~kept] = junk
    for name in ("std", "dt", "c_v"):
        getattr(inputs["coeffs"], name)[~kept] = junk
    if unread:
        monkeypatch.setattr(checks, "check_values", lambda _: False)
    inputs["velocity"].requires_grad_()
    alone["velocity"].requires_grad_()
    ours = as_tuple(flow_policy_loss, backend=backend)(**inputs)
    expected = as_tuple(flow_policy_loss, backend=backend)(**alone)
    torch.testing.assert_close(ours, expected)
    ours[0].backward()
    expected[0].backward()
    assert (inputs["velocity"].grad[~kept] == 0).all()
    assert torch.equal(inputs["velocity"].grad[kept], alone["velocity"].grad)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e38])
def test_a_policy_weight_of_0_leaves_kl_metrics_and_denominator(backend, variant, junk):
    """The mean of the others' policy terms times their share, and the KL of all."""
    params = params_of(variant)
    inputs = make_inputs((8, 4, 12), torch.float64, params) | {"mask": None, "denominator": None}
    pushes = inputs["policy_weights"] > 0
    assert not pushes.all()

    def run(**changes: Any) -> tuple[Tensor, Tensor, FlowLossMetrics]:
        velocity = inputs["velocity"].clone().requires_grad_()
        loss, metrics = flow_policy_loss(
            **inputs | {"velocity": velocity} | changes, backend=backend
        )
        return loss.detach(), torch.autograd.grad(loss, velocity)[0], metrics

    advantages = inputs["advantages"].where(pushes, junk)
    loss, gradient, metrics = run(advantages=advantages)
    without_kl = dataclasses.replace(params, beta=0.0)
    push = run(mask=pushes, denominator=8, params=without_kl)
    pull = run(policy_weights=torch.zeros(8))
    torch.testing.assert_close(loss, push[0] + pull[0])
    torch.testing.assert_close(gradient, push[1] + pull[1])
    everything = run(policy_weights=None)[2].as_dict()
    for name in everything.keys() - {"policy_loss", "clip_fraction_low", "clip_fraction_high"}:
        assert torch.equal(getattr(metrics, name), everything[name]), name
    same = run()[2]
    assert torch.equal(same.clip_fraction_low, everything["clip_fraction_low"])


def test_weights_multiply_the_policy_term_alone(backend):
    inputs = make_inputs((8, 4, 12), torch.float64) | {"denominator": None, "mask": None}
    losses = [
        flow_policy_loss(**inputs | {"policy_weights": [scale] * 8}, backend=backend).loss
        for scale in (0.0, 1.0, 3.0)
    ]
    assert losses[0] > 0
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))


def test_an_unchecked_deterministic_step_has_no_weight(backend, monkeypatch):
    inputs = make_inputs((8, 4, 12), torch.float32) | {"mask": None, "denominator": None}
    inputs["coeffs"].std[2] = 0.0
    expected = as_tuple(reference)(**inputs | {"mask": torch.arange(8) != 2})
    # As on a GPU or under torch.compile.
    monkeypatch.setattr(checks, "check_values", lambda _: False)
    ours = as_tuple(flow_policy_loss, backend=backend)(**inputs)
    torch.testing.assert_close(ours, expected)
    assert ours[11] == 7


@pytest.mark.parametrize("denominator", [3.7, None], ids=["global", "own"])
def test_micro_batches_give_what_one_call_over_everything_gives(backend, denominator):
    inputs = make_inputs((8, 4, 12), torch.float64) | {"denominator": denominator}
    whole, metrics = flow_policy_loss(**inputs, backend=backend)
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):  # the second has no active sample
        part = {
            name: value[rows] if isinstance(value, Tensor) and value.dim() else value
            for name, value in inputs.items()
        } | {"coeffs": inputs["coeffs"].select(rows)}
        parts.append(flow_policy_loss(**part, backend=backend))
    if denominator is not None:
        torch.testing.assert_close(sum(part.loss for part in parts), whole)
    merged = FlowLossMetrics.merge(part.metrics for part in parts)
    torch.testing.assert_close(merged.as_dict(), metrics.as_dict())
    assert float(parts[1].metrics.active_samples) == 0


ZEROS = {
    "int": 0,
    "float": 0.0,
    "int64": torch.tensor(0),
    "fp32": torch.tensor(0.0),
    "fp64, one dimension": torch.zeros(1, dtype=torch.float64),
    "own": None,
}


def check_nothing(run: Callable[..., Any], variant: str, zero: Any) -> None:
    inputs = make_inputs((4, 6), torch.float32, params_of(variant))
    inputs |= {"mask": torch.zeros(4, dtype=torch.int64), "denominator": zero}
    velocity = inputs["velocity"].requires_grad_()
    loss, metrics = run(**inputs)
    loss.backward()
    assert loss.item() == 0
    assert float(metrics.active_samples) == float(metrics.ratio_mean) == 0
    assert float(metrics.ratio_min) == float(metrics.ratio_max) == 1
    assert (velocity.grad == 0).all()


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS.keys())
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_active(backend, zero, variant):
    check_nothing(functools.partial(flow_policy_loss, backend=backend), variant, zero)


@pytest.mark.parametrize("zero", ["int", "int64", "own"])
def test_nothing_is_active_in_a_graph(backend, zero):
    torch._dynamo.reset()
    op = functools.partial(flow_policy_loss, backend=backend)
    compiled = torch.compile(lambda **inputs: op(**inputs), fullgraph=True, backend="aot_eager")
    check_nothing(compiled, "ppo", ZEROS[zero])


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_an_unchecked_denominator_that_is_refused_elsewhere(backend, denominator, monkeypatch):
    monkeypatch.setattr(checks, "check_values", lambda _: False)
    inputs = make_inputs((4, 6), torch.float32) | {"denominator": denominator}
    velocity = inputs["velocity"].requires_grad_()
    loss, metrics = flow_policy_loss(**inputs, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert float(metrics.ratio_mean) > 0
    assert (velocity.grad == 0).all()


UNCHECKED = {
    "weight": ("policy_weights", math.nan),
    "infinite weight": ("policy_weights", math.inf),
    "negative weight": ("policy_weights", -1.0),
    "advantage": ("advantages", math.nan),
    "infinite advantage": ("advantages", math.inf),
    "std": ("std", math.nan),
    "infinite std": ("std", math.inf),
    "negative std": ("std", -1.0),
    "dt": ("dt", 0.0),
}


@pytest.mark.parametrize(("name", "value"), UNCHECKED.values(), ids=UNCHECKED.keys())
def test_what_is_refused_where_values_are_read_has_no_weight_elsewhere(
    backend, name, value, monkeypatch
):
    monkeypatch.setattr(checks, "check_values", lambda _: False)
    inputs = make_inputs((8, 4, 12), torch.float32, params_of("guard"))
    inputs |= {"mask": None, "policy_weights": torch.ones(8), "denominator": 8}
    dropped = torch.arange(8) == 2
    if name == "std":
        expected = flow_policy_loss(**inputs | {"mask": ~dropped}, backend=backend)
    else:
        weights = torch.where(dropped, 0.0, inputs["policy_weights"])
        expected = flow_policy_loss(**inputs | {"policy_weights": weights}, backend=backend)
    holder = inputs["coeffs"] if name in ("std", "dt") else None
    (inputs[name] if holder is None else getattr(holder, name))[dropped] = value
    inputs["velocity"].requires_grad_()
    loss, _ = flow_policy_loss(**inputs, backend=backend)
    loss.backward()
    assert inputs["velocity"].grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), expected.loss)


NAN = torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.nan, 0.0]])
INF = torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.inf, 0.0]])
ODE = FlowSchedule(10, window=(0, 3)).coefficients([2, 7])
ONE = FlowSchedule(10).coefficients(2)
GUARD = FlowLossParams(variant="guard")
BAD = {
    "deterministic step": ({"coeffs": ODE}, r"sample 1 is of a deterministic step .* t = 0.5625"),
    "no reference": ({"params": FlowLossParams(beta=0.1)}, "velocity_ref is None.*beta is 0.1"),
    "other shape": ({"noise": torch.zeros(2, 4)}, r"noise has shape \(2, 4\)"),
    "advantage per element": ({"advantages": torch.zeros(2, 3)}, "advantages has shape"),
    "negative mask": ({"mask": [1, -1]}, r"mask\[1\] is -1"),
    "NaN mask": ({"mask": torch.tensor([torch.nan, 1.0])}, r"mask\[0\] is nan"),
    "mask per element": ({"mask": torch.ones(2, 3)}, "mask has shape"),
    "negative weight": ({"policy_weights": [1.0, -1.0]}, r"policy_weights\[1\] is -1.0"),
    "NaN weight": ({"policy_weights": torch.tensor([torch.nan, 1.0])}, r"weights\[0\] is nan"),
    "denominator zero": ({"denominator": 0.0}, "denominator is 0, but 2 samples count"),
    "denominator negative": ({"denominator": torch.tensor(-1)}, "denominator is -1.0"),
    "denominator NaN": ({"denominator": math.nan}, "denominator is nan"),
    "no length": (
        {"coeffs": dataclasses.replace(ONE, dt=torch.zeros(1)), "params": GUARD},
        "sample 0 is of a step of no length .coeffs.dt is 0 at t =",
    ),
    "NaN coefficient": (
        {"coeffs": dataclasses.replace(ONE, c_v=torch.tensor([torch.nan]))},
        "sample 0 of coeffs.c_v holds NaN",
    ),
    "infinite old velocity": ({"velocity_old": INF}, "sample 1 of velocity_old holds NaN or inf"),
    "denominator vector": ({"denominator": torch.ones(2)}, "denominator has shape"),
    "NaN velocity": ({"velocity": NAN}, "sample 1 of velocity holds NaN"),
    "NaN noise": ({"noise": NAN}, "sample 1 of noise holds NaN"),
    "inf advantage": ({"advantages": torch.tensor([0, torch.inf])}, r"advantages\[1\] is inf"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments: dict[str, Any] = {
        name: torch.zeros(2, 3) for name in ("velocity", "velocity_old", "noise")
    } | {
        "coeffs": FlowSchedule(10).coefficients([2, 7]),
        "advantages": torch.zeros(2),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        flow_policy_loss(**arguments | change)


def test_no_number_is_a_constant_of_a_graph(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs = make_inputs((4, 6), torch.float32)
    op = as_tuple(flow_policy_loss, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    for x in (0.5, 0.625, 0.75, 0.875):
        params = FlowLossParams(
            clip_low=x / 4,
            clip_high=x / 3,
            adv_clip=x,
            log_ratio_scale=x,
            log_ratio_limit=x,
            beta=x,
        )
        given = inputs | {"denominator": 3 + x, "params": params}
        assert all(torch.equal(a, b) for a, b in zip(compiled(**given), op(**given), strict=True))
    assert counter.frame_count <= 2


FORMS = {
    "bool": lambda x: x.bool(),
    "int64": lambda x: x.long(),
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.to(torch.uint8),
    "fp64": lambda x: x.double(),
    "bf16": lambda x: x.bfloat16(),
    "list": lambda x: x.tolist(),
    "list of int": lambda x: x.long().tolist(),
    "[N, 1]": lambda x: x[:, None],
    "strided": lambda x: torch.stack([x, x], dim=1)[:, 1],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("name", ["mask", "policy_weights", "advantages"])
def test_numbers_per_sample_in_any_form(backend, form, name):
    ones = torch.tensor([1.0, 0.0, 1.0, 1.0])
    inputs = make_inputs((4, 6), torch.float32) | {"denominator": None, "mask": None}
    inputs |= {"policy_weights": None}
    results = []
    for value in (ones.bool() if name == "mask" else ones, form(ones)):
        velocity = inputs["velocity"].clone().requires_grad_()
        arguments = inputs | {"velocity": velocity, name: value}
        loss, metrics = flow_policy_loss(**arguments, backend=backend)
        (gradient,) = torch.autograd.grad(loss, velocity)
        results.append([loss, gradient, metrics.sums])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "denominator",
    [
        5,
        torch.tensor(5),
        torch.tensor(5, dtype=torch.int32),
        torch.tensor([5.0]),
        torch.tensor(5.0, dtype=torch.float64),
    ],
    ids=str,
)
def test_denominator_in_any_form(backend, denominator):
    inputs = make_inputs((4, 6), torch.float32)
    results = [
        flow_policy_loss(**inputs | {"denominator": given}, backend=backend).loss
        for given in (5.0, denominator)
    ]
    assert torch.equal(*results)
    assert results[0].shape == ()


def test_the_weights_that_were_also_a_mask_name_their_successors():
    latents = [torch.zeros(2, 3)] * 3
    with pytest.raises(TypeError, match=r"sample_weights is gone; give mask=.*and policy_weights="):
        flow_policy_loss(*latents, ONE, torch.zeros(2), sample_weights=torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "grpo"}, "variant is 'grpo', expected one of ppo, guard, dppo"),
        ({"kl": "k3"}, "kl is 'k3'"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"tau": math.nan}, "tau is nan"),
        ({"beta": -1.0}, "FlowLossParams: beta is -1.0"),
        ({"beta": math.inf}, "beta is inf"),
        ({"log_ratio_scale": math.inf}, "log_ratio_scale is inf"),
        ({"adv_clip": 0.0}, "adv_clip is 0.0"),
        ({"log_ratio_scale": "sum"}, "log_ratio_scale is 'sum'"),
        ({"log_ratio_limit": 0.0}, "log_ratio_limit is 0.0, expected > 0, or None"),
        ({"log_ratio_scale": 0.0}, "log_ratio_scale is 0.0"),
    ],
    ids=str,
)
def test_bad_params(change, message):
    with pytest.raises(ValueError, match=message):
        FlowLossParams(**change)
