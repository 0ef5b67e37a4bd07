from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from mutants.flow_step import MUTANTS
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.ops.flow_step import flow_step
from lvrpo.params.flow import StepCoefficients
from lvrpo.reference.flow_step import flow_step as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = {
    "one scalar": (1, 1),
    "odd sizes": (3, 5, 7),
    "4 tokens of 12": (10, 4, 12),
    "more than one block per image": (2, 8192 + 130),
}


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, **schedule: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(shape))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    velocity, x_t, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    # Both ends of the schedule, an ODE step among them.
    schedule = FlowSchedule(10, 3.0, **{"window": (0, 8)} | schedule)
    steps = torch.arange(shape[0]) * 3 % 10
    return {
        "velocity": velocity.to(dtype),
        "x_t": x_t.to(wide),
        "coeffs": schedule.coefficients(steps, dtype=wide),
        "noise": noise.to(wide),
    }


def scales(inputs: dict[str, Any]) -> dict[str, Tensor | float]:
    # x_next and the gradients are sums of terms that may cancel.
    z, coeffs = inputs["noise"].double(), inputs["coeffs"].to(torch.float64)
    c_x, c_v, s = (
        c.abs().reshape(-1, *[1] * (z.dim() - 1)) for c in (coeffs.c_x, coeffs.c_v, coeffs.std)
    )
    safe = torch.where(s > 0, s, 1.0)
    dmean = (1 + z.abs() / safe) * 4 / z.numel()
    x_next = c_x * inputs["x_t"].double().abs() + c_v * inputs["velocity"].double().abs()
    logprob = 1 + safe.log().abs().flatten() + z.square().flatten(1).mean(dim=1)
    return {
        "out0": x_next + s * z.abs(),
        "out1": logprob,
        "dvelocity": c_v * dmean,
        "dx_t": c_x * dmean,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
def test_matches_reference(backend, shape, dtype, dynamics):
    inputs = make_inputs(shape, dtype, dynamics=dynamics)
    op = functools.partial(flow_step, backend=backend)
    check_op(op, reference, inputs, differentiable=["velocity", "x_t"], scales=scales(inputs))


def test_logprob_is_that_of_the_normal_distribution(backend):
    inputs = make_inputs((4, 6, 5), torch.float64, window=None)
    x_next, logprob = flow_step(**inputs, backend=backend)
    coeffs = inputs["coeffs"]
    c_x, c_v, std = (c.reshape(-1, 1, 1) for c in (coeffs.c_x, coeffs.c_v, coeffs.std))
    mean = c_x * inputs["x_t"] + c_v * inputs["velocity"]
    expected = torch.distributions.Normal(mean, std).log_prob(x_next).mean(dim=(1, 2))
    assert (logprob - expected).abs().max() < 1e-12


def test_gradient_of_the_logprob_is_noise_over_std(backend):
    inputs = make_inputs((4, 6, 5), torch.float64, window=None)
    velocity, x_t = inputs["velocity"].requires_grad_(), inputs["x_t"].requires_grad_()
    _, logprob = flow_step(**inputs, backend=backend)
    logprob.sum().backward()
    coeffs, z = inputs["coeffs"], inputs["noise"]
    c_x, c_v, std = (c.reshape(-1, 1, 1) for c in (coeffs.c_x, coeffs.c_v, coeffs.std))
    assert (velocity.grad - c_v * z / (std * 30)).abs().max() < 1e-12
    assert (x_t.grad - c_x * z / (std * 30)).abs().max() < 1e-12


def test_deterministic_step(backend):
    inputs = make_inputs((10, 12), torch.float32, dynamics="ode")
    inputs["velocity"].requires_grad_()
    x_next, logprob = flow_step(**inputs | {"noise": None}, backend=backend)
    assert torch.equal(logprob, torch.zeros(10))
    # The noise of a deterministic step is not read.
    nan = torch.full_like(inputs["noise"], torch.nan)
    with_nan, logprob = flow_step(**inputs | {"noise": nan}, backend=backend)
    assert torch.equal(with_nan, x_next)
    assert torch.equal(logprob, torch.zeros(10))
    (with_nan.sum() + logprob.sum()).backward()
    assert inputs["velocity"].grad.isfinite().all()
    assert torch.equal(inputs["velocity"].grad[0], inputs["coeffs"].dt[0].expand(12))


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e38])
def test_noise_is_not_read_where_nobody_wants_the_gradient_of_the_logprob(backend, junk):
    inputs = make_inputs((4, 12), torch.float32, window=None)
    inputs["noise"][2] = junk
    inputs["velocity"].requires_grad_()
    x_next, _ = flow_step(**inputs, backend=backend)
    x_next[[0, 1, 3]].sum().backward()
    expected = inputs["coeffs"].c_v[:, None].expand(4, 12).clone()
    expected[2] = 0
    assert torch.equal(inputs["velocity"].grad, expected)


def test_no_gradient_to_noise(backend):
    inputs = make_inputs((3, 12), torch.float32, window=None)
    inputs["noise"].requires_grad_()
    x_next, logprob = flow_step(**inputs, backend=backend)
    assert not x_next.requires_grad
    assert not logprob.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (0, 0)])
def test_empty_input(backend, shape):
    empty = torch.zeros(shape, requires_grad=True)
    coeffs = FlowSchedule(10).coefficients([])
    x_next, logprob = flow_step(empty, empty, coeffs, torch.zeros(shape), backend=backend)
    (x_next.sum() + logprob.sum()).backward()
    assert x_next.shape == empty.grad.shape == shape
    assert logprob.shape == (0,)


def test_one_step_for_all_samples(backend):
    inputs = make_inputs((5, 12), torch.float32)
    one = FlowSchedule(10).coefficients(2)
    five = FlowSchedule(10).coefficients([2] * 5)
    for ours, expected in zip(
        flow_step(**inputs | {"coeffs": one}, backend=backend),
        flow_step(**inputs | {"coeffs": five}, backend=backend),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_non_contiguous_and_stride_0_gradient(backend):
    inputs = make_inputs((6, 4, 12), torch.float32)
    plain = {
        name: value.detach().clone().requires_grad_(name == "velocity")
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    strided = {
        name: value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(True)
        for name, value in plain.items()
    }
    for arguments, function in (
        (strided, functools.partial(flow_step, backend=backend)),
        (plain, reference),
    ):
        x_next, logprob = function(**arguments, coeffs=inputs["coeffs"])
        torch.autograd.backward(
            [x_next, logprob], [torch.ones(1, 1, 1).expand(6, 4, 12), torch.ones(1).expand(6)]
        )
    torch.testing.assert_close(strided["velocity"].grad, plain["velocity"].grad)


def test_a_sample_alone_equals_the_sample_in_a_batch(backend):
    inputs = make_inputs((6, 9000), torch.float32)
    batch = flow_step(**inputs, backend=backend)
    for i in range(6):
        alone = {k: v[i : i + 1] for k, v in inputs.items() if k != "coeffs"}
        ours = flow_step(**alone, coeffs=inputs["coeffs"].select(slice(i, i + 1)), backend=backend)
        assert torch.equal(ours[0], batch[0][i : i + 1])
        assert torch.equal(ours[1], batch[1][i : i + 1]) or backend == "torch"


def test_the_number_of_threads_does_not_matter():
    inputs = make_inputs((3, 50_000), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.cat([x.flatten() for x in flow_step(**inputs, backend="cpp")]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_gradcheck(backend):
    inputs = make_inputs((4, 5), torch.float64)
    data = flow_step(**inputs, backend=backend)[0].detach()

    def pathwise(velocity: Tensor, x_t: Tensor) -> Tensor:
        return flow_step(velocity, x_t, inputs["coeffs"], inputs["noise"], backend=backend)[0]

    def density(velocity: Tensor, x_t: Tensor) -> Tensor:
        # Finite differences move the sample with the mean; hold it in place through the noise.
        coeffs = inputs["coeffs"]
        mean = coeffs.c_x[:, None] * x_t.detach() + coeffs.c_v[:, None] * velocity.detach()
        std = coeffs.std[:, None]
        noise = torch.where(std > 0, (data - mean) / std, 0.0)
        return flow_step(velocity, x_t, coeffs, noise, backend=backend)[1]

    leaves = inputs["velocity"].requires_grad_(), inputs["x_t"].requires_grad_()
    torch.autograd.gradcheck(pathwise, leaves)
    torch.autograd.gradcheck(density, leaves)


def test_opcheck():
    inputs = make_inputs((4, 5), torch.float32)
    coeffs = inputs["coeffs"]
    c = (coeffs.c_x, coeffs.c_v, coeffs.std)
    for noise in (inputs["noise"], None):
        torch.library.opcheck(
            torch.ops.lvrpo.flow_step_fwd.default, (inputs["velocity"], inputs["x_t"], noise, *c)
        )
        torch.library.opcheck(
            torch.ops.lvrpo.flow_step_bwd.default, (inputs["x_t"], torch.randn(4), noise, *c)
        )


def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs((4, 5), torch.float32)

    def function(velocity: Tensor, coeffs: StepCoefficients) -> Tensor:
        arguments = inputs | {"velocity": velocity, "coeffs": coeffs}
        x_next, logprob = flow_step(**arguments, backend=backend)
        return x_next.square().sum() + logprob.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = inputs["velocity"].clone().requires_grad_()
    eager = inputs["velocity"].clone().requires_grad_()
    compiled(ours, inputs["coeffs"]).backward()
    function(eager, inputs["coeffs"]).backward()
    torch.testing.assert_close(ours.grad, eager.grad)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    inputs = make_inputs((8, 4, 12), dtype)
    with pytest.raises(AssertionError):
        check_op(
            mutant, reference, inputs, differentiable=["velocity", "x_t"], scales=scales(inputs)
        )


def coefficients(**changed: Tensor) -> StepCoefficients:
    fields = {name: torch.full((2,), 0.5) for name in ("c_x", "c_v", "std", "t", "dt")}
    return StepCoefficients(**fields | changed)


BAD = {
    "noise missing": ({"noise": None}, r"noise is None, but coeffs.std\[0\] is 0.5"),
    "other shape": ({"x_t": torch.zeros(2, 4)}, r"x_t has shape \(2, 4\)"),
    "integer velocity": (
        {"velocity": torch.zeros(2, 3, dtype=torch.int64)},
        "velocity is torch.int64",
    ),
    "no elements": ({"velocity": torch.zeros(2, 0)}, r"velocity has shape \(2, 0\)"),
    "one dimension": ({"velocity": torch.zeros(2)}, r"velocity has shape \(2,\)"),
    "negative std": ({"coeffs": coefficients(std=torch.tensor([0.5, -1]))}, r"std\[1\] is -1.0"),
    "NaN std": ({"coeffs": coefficients(std=torch.tensor([math.nan, 1]))}, r"std\[0\] is nan"),
    "three coefficients": (
        {"coeffs": coefficients(c_v=torch.ones(3))},
        r"coeffs.c_v has shape \(3,\)",
    ),
    "mixed lengths": ({"coeffs": coefficients(c_x=torch.ones(1))}, "c_x 1, c_v 2"),
    "bf16 coefficients": ({"coeffs": coefficients(c_x=torch.ones(2).bfloat16())}, "bfloat16"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments: dict[str, Any] = {
        name: torch.zeros(2, 3) for name in ("velocity", "x_t", "noise")
    } | {"coeffs": coefficients(), "backend": backend}
    with pytest.raises(ValueError, match=message):
        flow_step(**arguments | change)
