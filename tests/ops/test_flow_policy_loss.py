from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_inputs import OPTIONAL, PARAMS, as_tuple, make_inputs, params_of
from mutants.flow_policy_loss import MUTANTS, VARIANT_MUTANTS
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.ops.flow_policy_loss import flow_policy_loss
from lvrpo.ops.flow_step import flow_step
from lvrpo.params.flow import KL_FORMS, VARIANTS, FlowLossParams, StepCoefficients
from lvrpo.reference.flow_policy_loss import flow_policy_loss as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = {
    "one scalar": (1, 1),
    "odd sizes": (3, 5, 7),
    "4 tokens of 12": (24, 4, 12),
    "more than one block per image": (3, 8192 + 130),
}


def scales(inputs: dict[str, Any]) -> dict[str, Tensor | float]:
    """Sizes of the summands of the log-ratio and of the gradient; both may cancel."""
    params, coeffs = inputs["params"], inputs["coeffs"].to(torch.float64)
    v, z = inputs["velocity"].double(), inputs["noise"].double()
    trailing = (-1, *[1] * (v.dim() - 1))
    c_v, s = coeffs.c_v.abs().reshape(trailing), coeffs.std.reshape(trailing)
    factor = 1.0 if params.log_ratio_scale == "mean" else params.log_ratio_scale * v[0].numel()
    dmu = c_v * (v - inputs["velocity_old"].double()).abs()
    terms = dmu * z.abs() / s + dmu**2 / s**2
    slope = c_v * z.abs() / s + c_v * dmu / s**2
    if params.variant == "guard":
        terms, slope = dmu * z.abs(), c_v * z.abs()
    log_ratio = factor * terms.flatten(1).mean(dim=1)
    ratio = reference(**inputs)[1]["ratio_max"].double()
    mask, weights = inputs["mask"], inputs["policy_weights"]
    mask = torch.ones(len(v)) if mask is None else mask.double()
    weights = mask if weights is None else mask * weights.clamp(min=1)
    share = weights / (mask.sum() if inputs["denominator"] is None else inputs["denominator"])
    largest = params.adv_clip or float(inputs["advantages"].abs().max())
    push = share * ratio * (1 + log_ratio) * largest
    push = push / coeffs.dt.abs() if params.variant == "guard" else push
    velocity_ref = v if inputs["velocity_ref"] is None else inputs["velocity_ref"].double()
    pull = 2 * params.beta * (v - velocity_ref).abs()
    pull = pull * torch.maximum(torch.ones_like(s), c_v**2 / s**2)
    gradient = push.reshape(trailing) * factor * slope + share.reshape(trailing) * pull
    result = {f"out{i}": float(push.sum()) for i in (0, 1, 7, 12, 13)}
    return result | {
        "out8": float((mask * log_ratio).sum() / mask.sum()),
        "dvelocity": gradient / v[0].numel(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_reference(backend, shape, dtype, variant):
    inputs = make_inputs(shape, dtype, params_of(variant))
    op = as_tuple(flow_policy_loss, backend=backend)
    check_op(op, as_tuple(reference), inputs, differentiable=["velocity"], scales=scales(inputs))


@pytest.mark.parametrize("kl", KL_FORMS)
@pytest.mark.parametrize("scale", ["mean", 0.05])
@pytest.mark.parametrize("optional", ["with", "without"])
def test_options_match_reference(backend, kl, scale, optional):
    params = dataclasses.replace(PARAMS, kl=kl, log_ratio_scale=scale)
    inputs = make_inputs((24, 4, 12), torch.float32, params)
    if optional == "without":
        inputs |= dict.fromkeys(OPTIONAL)
        inputs["params"] = dataclasses.replace(params, beta=0.0, adv_clip=None)
    op = as_tuple(flow_policy_loss, backend=backend)
    check_op(op, as_tuple(reference), inputs, differentiable=["velocity"], scales=scales(inputs))


def test_the_inputs_exercise_every_branch():
    for variant in VARIANTS:
        params = params_of(variant)
        _, metrics = reference(**make_inputs((24, 4, 12), torch.float32, params))
        assert metrics["clip_fraction_low"] > 0, variant
        assert metrics["clip_fraction_high"] > 0, variant
        clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
        assert 0.1 < clipped / metrics["active_samples"] < 0.9, variant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_velocities_give_a_ratio_of_exactly_one(backend, variant, dtype):
    inputs = make_inputs((24, 4, 12), dtype, FlowLossParams(variant=variant, log_ratio_scale=1.0))
    inputs["velocity_old"] = inputs["velocity"].float()
    _, metrics = flow_policy_loss(**inputs | {"denominator": None}, backend=backend)
    for value in (metrics.ratio_min, metrics.ratio_max):
        assert float(value) == 1.0
    assert float(metrics.abs_log_ratio) == 0.0
    assert float(metrics.kl_old) == 0.0
    assert float(metrics.clip_fraction_low) == float(metrics.clip_fraction_high) == 0.0


def test_log_ratio_is_the_difference_of_the_log_densities(backend):
    """The differential form against two log-densities of the step that `flow_step` drew."""
    inputs = make_inputs((1, 4, 12), torch.float64)
    for step in range(10):
        coeffs = FlowSchedule(10, 3.0).coefficients(step, dtype=torch.float64)
        x_t = torch.randn(1, 4, 12, dtype=torch.float64)
        x_next, _ = flow_step(inputs["velocity_old"], x_t, coeffs, inputs["noise"])

        def log_density(velocity, coeffs=coeffs, x_t=x_t, x_next=x_next):
            mean = coeffs.c_x * x_t + coeffs.c_v * velocity
            return torch.distributions.Normal(mean, coeffs.std).log_prob(x_next)

        difference = log_density(inputs["velocity"]) - log_density(inputs["velocity_old"])
        for scale, expected in (("mean", difference.mean()), (0.3, 0.3 * difference.sum())):
            loss, _ = flow_policy_loss(
                inputs["velocity"],
                inputs["velocity_old"],
                inputs["noise"],
                coeffs,
                torch.tensor([-1.0], dtype=torch.float64),
                params=FlowLossParams(clip_low=1.0, clip_high=1e9, log_ratio_scale=scale),
                backend=backend,
            )
            assert abs(float(loss.log() - expected)) < 1e-12


def test_on_policy_gradient_is_advantage_times_score(backend):
    inputs = make_inputs((6, 4, 12), torch.float64, FlowLossParams(adv_clip=None))
    inputs |= {"mask": None, "policy_weights": None, "denominator": None}
    inputs["velocity_old"] = inputs["velocity"].clone()
    inputs["velocity"].requires_grad_()
    flow_policy_loss(**inputs, backend=backend).loss.backward()
    coeffs = inputs["coeffs"]
    factor = -inputs["advantages"] * coeffs.c_v / (coeffs.std * 48) / 6
    expected = factor[:, None, None] * inputs["noise"]
    assert (inputs["velocity"].grad - expected).abs().max() < 1e-15


@pytest.mark.parametrize("shape", [(0, 3), (0, 0)])
def test_empty_input(backend, shape):
    velocity = torch.zeros(shape, requires_grad=True)
    loss, metrics = flow_policy_loss(
        velocity,
        torch.zeros(shape),
        torch.zeros(shape),
        FlowSchedule(10).coefficients([]),
        torch.zeros(0),
        backend=backend,
    )
    loss.backward()
    assert loss.item() == metrics.active_samples.item() == 0
    assert velocity.grad.shape == shape


def test_zero_advantages_give_a_zero_gradient(backend):
    inputs = make_inputs((8, 4, 12), torch.float32, dataclasses.replace(PARAMS, beta=0.0))
    inputs["advantages"].zero_()
    inputs["velocity"].requires_grad_()
    flow_policy_loss(**inputs, backend=backend).loss.backward()
    assert (inputs["velocity"].grad == 0).all()


def test_gradient_to_the_velocity_only(backend):
    inputs = make_inputs((8, 4, 12), torch.float32)
    for name in ("velocity_old", "noise", "advantages", "velocity_ref", "policy_weights"):
        inputs[name].requires_grad_()
    assert not flow_policy_loss(**inputs, backend=backend).loss.requires_grad
    inputs["velocity"].requires_grad_()
    loss, metrics = flow_policy_loss(**inputs, backend=backend)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.as_dict().values())
    assert all(value.dtype == torch.float32 for value in metrics.as_dict().values())


def test_non_contiguous_and_stride_0_gradient(backend):
    inputs = make_inputs((6, 4, 12), torch.float32)
    inputs["velocity"].requires_grad_()
    strided = inputs | {
        name: inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("velocity", "velocity_old", "noise", "velocity_ref")
    }
    strided["velocity"].requires_grad_()
    strided["advantages"] = torch.stack([inputs["advantages"]] * 2, dim=1)[:, 0]
    flow_policy_loss(**strided, backend=backend).loss.expand(5).sum().backward()
    (reference(**inputs)[0] * 5).backward()
    torch.testing.assert_close(strided["velocity"].grad, inputs["velocity"].grad)


def test_one_step_for_all_samples(backend):
    inputs = make_inputs((5, 12), torch.float32)
    results = [
        as_tuple(flow_policy_loss, backend=backend)(
            **inputs | {"coeffs": FlowSchedule(10).coefficients(steps)}
        )
        for steps in (2, [2] * 5)
    ]
    torch.testing.assert_close(*results)


def test_the_number_of_threads_does_not_matter():
    inputs = make_inputs((3, 50_000), torch.float32)
    inputs["velocity"].requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss, metrics = flow_policy_loss(**inputs, backend="cpp")
            (gradient,) = torch.autograd.grad(loss, [inputs["velocity"]])
            values = torch.stack(list(metrics.as_dict().values()))
            results.append(torch.cat([loss.detach()[None], values, gradient.flatten()]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kl", KL_FORMS)
def test_gradcheck(backend, variant, kl):
    params = dataclasses.replace(PARAMS, variant=variant, kl=kl)
    inputs = make_inputs((6, 5), torch.float64, params)

    def function(velocity: Tensor) -> Tensor:
        return flow_policy_loss(**inputs | {"velocity": velocity}, backend=backend).loss

    torch.autograd.gradcheck(function, (inputs["velocity"].requires_grad_(),))


NUMBERS = torch.tensor([0.1, 0.2, 5.0, 0.0, 20.0, 1e-5, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("optional", ["with", "without"])
def test_opcheck(optional):
    inputs = make_inputs((4, 5), torch.float32)
    if optional == "without":
        inputs |= dict.fromkeys(OPTIONAL)
    coeffs = inputs["coeffs"]
    latents = [inputs[n] for n in ("velocity", "velocity_old", "noise", "velocity_ref")]
    samples = [inputs[n] for n in ("advantages", "mask", "policy_weights", "denominator")]
    arguments = (*latents, coeffs.c_v, coeffs.std, coeffs.dt, *samples, NUMBERS, 0, 1)
    forward = torch.ops.lvrpo.flow_policy_loss_fwd
    torch.library.opcheck(forward.default, arguments)
    loss, *_, directions = forward(*arguments)
    backward = torch.ops.lvrpo.flow_policy_loss_bwd
    torch.library.opcheck(backward.default, (torch.ones_like(loss), *latents, directions))


def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs((4, 5), torch.float32)

    def function(velocity: Tensor, coeffs: StepCoefficients) -> Tensor:
        arguments = inputs | {"velocity": velocity, "coeffs": coeffs}
        loss, metrics = flow_policy_loss(**arguments, backend=backend)
        return loss + metrics.kl_old

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = inputs["velocity"].clone().requires_grad_()
    eager = inputs["velocity"].clone().requires_grad_()
    compiled(ours, inputs["coeffs"]).backward()
    function(eager, inputs["coeffs"]).backward()
    torch.testing.assert_close(ours.grad, eager.grad)


def test_the_op_refuses_an_empty_denominator():
    latents, one = [torch.zeros(1, 2)] * 3, torch.ones(1)
    with pytest.raises(RuntimeError, match="denominator must hold one number"):
        torch.ops.lvrpo.flow_policy_loss_fwd(
            *latents, None, one, one, one, one, None, None, torch.zeros(0), NUMBERS, 0, 0
        )
    with pytest.raises(RuntimeError, match="numbers must have size 7"):
        torch.ops.lvrpo.flow_policy_loss_fwd(
            *latents, None, one, one, one, one, None, None, None, NUMBERS[:6], 0, 0
        )


def reject(mutant: Callable[..., Any], inputs: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_op(
            as_tuple(mutant),
            as_tuple(reference),
            inputs,
            differentiable=["velocity"],
            scales=scales(inputs),
        )


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    reject(mutant, make_inputs((24, 4, 12), dtype))


@pytest.mark.parametrize(
    ("variant", "mutant"), VARIANT_MUTANTS.values(), ids=VARIANT_MUTANTS.keys()
)
def test_rule_rejects_variant_mutant(variant, mutant):
    params = params_of(variant)
    reject(mutant, make_inputs((24, 4, 12), torch.float32, params))
