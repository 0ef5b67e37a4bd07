"""Finite inputs have a finite loss, gradient and metrics wherever the exact ones can be held.

The oracle is the formula of docs/ops/flow_policy_loss.md with exact derivatives, at 60 digits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor

from lvrpo.ops.flow_policy_loss import flow_policy_loss
from lvrpo.ops.flow_step import flow_step
from lvrpo.params.flow import KL_FORMS, VARIANTS, FlowLossParams, StepCoefficients
from lvrpo.reference._log_ratio import saturate

MANY = settings(
    derandomize=True,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
STDS = {
    torch.float32: [0.3, 1e-12, 1e-25, 1e-34],
    torch.float64: [0.3, 1e-25, 1e-90, 1e-120],
}
LEVELS = [0.0, 0.01, 5.0, 20.0, 87.0, 89.0, 200.0, 9999.0]


@st.composite
def params(draw: Any) -> FlowLossParams:
    return FlowLossParams(
        variant=draw(st.sampled_from(VARIANTS)),
        clip_low=draw(st.sampled_from([0.1, 1.0])),
        clip_high=draw(st.sampled_from([0.2, 1e9])),
        adv_clip=draw(st.sampled_from([5.0, None])),
        log_ratio_scale=draw(st.sampled_from(["mean", 0.25, 1.0])),
        log_ratio_limit=draw(st.sampled_from([20.0, None, 3.0, 88.5, 150.0])),
        tau=draw(st.sampled_from([0.0, 1e-5, 1e9])),
        kl=draw(st.sampled_from(KL_FORMS)),
        beta=draw(st.sampled_from([0.0, 0.25])),
    )


def step_of(std: float, dtype: torch.dtype) -> StepCoefficients:
    values = {"c_x": 1.1, "c_v": -0.125, "std": std, "t": 0.5, "dt": -0.0625}
    return StepCoefficients(
        **{name: torch.tensor([value], dtype=dtype) for name, value in values.items()}
    )


def inputs_of(
    log_ratio: float, std: float, advantage: float, dtype: torch.dtype, p: FlowLossParams
) -> dict[str, Any]:
    """One image of four elements whose log-ratio is about `log_ratio`."""
    coeffs = step_of(std, dtype)
    scale = 1.0 if p.log_ratio_scale == "mean" else p.log_ratio_scale * 4
    u = torch.tensor([0.5, -1.0, 0.25, 0.0], dtype=torch.float64)
    if p.variant == "guard":
        dv = 4 * u  # mean(z c_v dv)
        noise = log_ratio / scale / (-0.125 * dv).where(u != 0, 1.0) * 4 / 3
    else:
        dv = u * std / -0.125  # u = c_v dv / std, mean(z u - u^2 / 2)
        noise = (log_ratio / scale * 4 / 3 + u**2 / 2) / u.where(u != 0, 1.0)
    return {
        "velocity": dv.to(dtype)[None],
        "velocity_old": torch.zeros(1, 4, dtype=dtype),
        "noise": noise.to(dtype)[None],
        "coeffs": coeffs,
        "advantages": torch.tensor([advantage], dtype=dtype),
        "velocity_ref": 0.75 * dv.to(dtype)[None],
    }


def exact(inputs: dict[str, Any], p: FlowLossParams) -> tuple[mpf, list[mpf], mpf, mpf]:
    """Loss, its gradient, the log-ratio, and the largest element of that one's gradient."""
    v, old, z, ref = (
        [mpf(float(x)) for x in inputs[name][0]]
        for name in ("velocity", "velocity_old", "noise", "velocity_ref")
    )
    c, s, dt = (mpf(float(getattr(inputs["coeffs"], name))) for name in ("c_v", "std", "dt"))
    a, d = mpf(float(inputs["advantages"])), len(v)
    if p.adv_clip is not None:
        a = min(max(a, -mpf(p.adv_clip)), mpf(p.adv_clip))
    scale = mpf(1) if p.log_ratio_scale == "mean" else mpf(p.log_ratio_scale) * d
    dmu = [c * (x - y) for x, y in zip(v, old, strict=True)]
    kl_old = sum(m**2 for m in dmu) / (2 * s**2 * d)
    if p.variant == "guard":
        log_ratio = scale * sum(n * m for n, m in zip(z, dmu, strict=True)) / d
        slope = [scale * c * n / d for n in z]
    else:
        terms = [n * m / s - m**2 / (2 * s**2) for n, m in zip(z, dmu, strict=True)]
        log_ratio = scale * sum(terms) / d
        slope = [scale * c * (n / s - m / s**2) / d for n, m in zip(z, dmu, strict=True)]
    limit = mpmath.inf if p.log_ratio_limit is None else mpf(p.log_ratio_limit)
    ratio = mpmath.exp(min(max(log_ratio, -limit), limit))
    at_low, at_high = 1 - mpf(p.clip_low), 1 + mpf(p.clip_high)
    cut = (a < 0 and ratio < at_low) or (a > 0 and ratio > at_high)
    if p.variant == "dppo":
        moved = (a < 0 and ratio < 1) or (a > 0 and ratio > 1)
        cut = kl_old >= p.tau and moved
        policy = mpf(0) if cut else -a * ratio
    else:
        policy = max(-a * ratio, -a * min(max(ratio, at_low), at_high))
    push = mpf(0) if cut or abs(log_ratio) > limit else -a * ratio
    if p.variant == "guard":
        policy, push = policy / abs(dt), push / abs(dt)
    factor = {
        "velocity_mse": mpf(1),
        "gaussian": c**2 / (2 * s**2),
        "no_dt": c**2 / (2 * s**2) * abs(dt),
        "dmu2": c**2,
    }[p.kl]
    apart = [x - y for x, y in zip(v, ref, strict=True)]
    beta = mpf(p.beta)
    loss = policy + beta * factor * sum(x**2 for x in apart) / d
    pull = [2 * beta * factor * x / d for x in apart]
    return (
        loss,
        [push * k + x for k, x in zip(slope, pull, strict=True)],
        log_ratio,
        max(map(abs, slope)),
    )


def agrees(ours: float, expected: mpf, size: mpf, dtype: torch.dtype, spread: float) -> bool:
    """Within the rounding of an exponential whose exponent has error `spread` eps."""
    return abs(mpf(ours) - expected) <= 32 * torch.finfo(dtype).eps * (1 + spread) * size


@DTYPES
@MANY
@given(data=st.data())
def test_finite_inputs(backend, dtype, data):
    p = data.draw(params())
    sign, level = data.draw(st.sampled_from([1, -1])), data.draw(st.sampled_from(LEVELS))
    std = data.draw(st.sampled_from(STDS[dtype]))
    advantage = data.draw(st.sampled_from([0.0, 1.0, -1.0, 7.0, -1e-3, -1e-30]))
    inputs = inputs_of(sign * level, std, advantage, dtype, p)
    with mpmath.workdps(60):
        loss, gradient, log_ratio, steepest = exact(inputs, p)
        largest = mpf(torch.finfo(dtype).max) / 4
        inputs["velocity"].requires_grad_()
        ours, metrics = flow_policy_loss(**inputs, params=p, backend=backend)
        (slope,) = torch.autograd.grad(ours, inputs["velocity"])
        for name, value in metrics.as_dict().items():
            assert bool(value.isfinite()), (name, value)
        assert bool(metrics.extremes.isfinite().all())
        assert not bool(ours.isnan())
        # Summands of the log-ratio, whose rounding the exponential multiplies.
        spread = float(level + 2) * 4
        near = p.log_ratio_limit is not None and (
            abs(abs(log_ratio) - p.log_ratio_limit) < 64 * torch.finfo(dtype).eps * (1 + spread)
        )
        # A ratio that is about to underflow keeps no digits.
        underflow = 2 * mpf(torch.finfo(dtype).tiny) / torch.finfo(dtype).eps
        if abs(loss) < largest:
            assert agrees(float(ours.detach()), loss, abs(loss) + underflow, dtype, spread)
        size = max(abs(x) for x in gradient) + underflow * (1 + steepest)
        if size < largest and not near:
            assert bool(slope.isfinite().all())
            for ours_i, exact_i in zip(slope[0].tolist(), gradient, strict=True):
                assert agrees(ours_i, exact_i, size, dtype, spread)


@DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [-20.0, 20.0])
def test_a_saturated_sample_takes_no_gradient_with_it(backend, dtype, variant, level):
    """In a batch with one of every level, the gradient of the others is what it is alone."""
    p = FlowLossParams(variant=variant, clip_low=1.0, clip_high=1e9, log_ratio_scale=1.0, tau=1e9)
    one = inputs_of(0.5, 0.3, -1.0, dtype, p)
    parts = [one] + [inputs_of(math.copysign(x, level), 0.3, -1.0, dtype, p) for x in LEVELS[4:]]
    whole = {
        name: torch.cat([part[name] for part in parts])
        for name in one
        if isinstance(one[name], Tensor)
    } | {"coeffs": one["coeffs"]}
    for arguments in (one, whole):
        arguments["velocity"].requires_grad_()
        loss, _ = flow_policy_loss(**arguments, denominator=1, params=p, backend=backend)
        loss.backward()
    assert torch.equal(whole["velocity"].grad[0], one["velocity"].grad[0])
    assert (whole["velocity"].grad[1:] == 0).all()


@DTYPES
@pytest.mark.parametrize("large", [1e30, 3e38])
@pytest.mark.parametrize("variant", VARIANTS)
def test_velocities_far_apart_saturate(backend, dtype, large, variant):
    p = FlowLossParams(variant=variant, log_ratio_scale=1.0)
    velocity = torch.tensor([[large, -large, 0.0]], dtype=dtype, requires_grad=True)
    loss, metrics = flow_policy_loss(
        velocity,
        -velocity.detach(),
        torch.tensor([[1.5, 0.5, -1.0]], dtype=dtype),
        step_of(0.3, dtype),
        [-1.0],
        velocity_ref=velocity.detach(),
        params=p,
        backend=backend,
    )
    loss.backward()
    assert bool(loss.isfinite())
    assert (velocity.grad == 0).all()
    assert all(bool(value.isfinite()) for value in metrics.as_dict().values())


@DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("apart", [0.0, 1e-20, 1.0])
def test_the_smallest_std_there_is(backend, dtype, variant, apart):
    """Of a log-ratio that is 0, or past any limit."""
    tiny = torch.finfo(dtype).tiny
    velocity = torch.zeros(1, 4, dtype=dtype, requires_grad=True)
    loss, metrics = flow_policy_loss(
        velocity,
        torch.full((1, 4), apart, dtype=dtype),
        torch.ones(1, 4, dtype=dtype),
        step_of(tiny, dtype),
        [1.0],
        velocity_ref=torch.full((1, 4), apart, dtype=dtype),
        params=FlowLossParams(variant=variant),
        backend=backend,
    )
    loss.backward()
    for value in (loss, *metrics.as_dict().values()):
        assert bool(value.isfinite())
    if apart == 0:
        assert float(metrics.ratio_min) == float(metrics.ratio_max) == 1.0
        assert not bool(velocity.grad.isnan().any())
    elif variant != "guard":
        assert float(loss.detach()) == pytest.approx(-math.exp(-20), rel=1e-5)
        assert (velocity.grad == 0).all()


@DTYPES
@pytest.mark.parametrize("std", [0, 1, 2, 3, None])
def test_flow_step_of_any_std(backend, dtype, std):
    std = torch.finfo(dtype).tiny if std is None else STDS[dtype][std]
    coeffs = step_of(std, dtype)
    velocity, x_t, noise = torch.randn(3, 2, 4, dtype=dtype).unbind()
    velocity.requires_grad_()
    _, logprob = flow_step(velocity, x_t, coeffs, noise, backend=backend)
    (gradient,) = torch.autograd.grad(logprob.sum(), velocity)
    with mpmath.workdps(60):
        s, c_v = mpf(float(coeffs.std)), mpf(float(coeffs.c_v))
        for n in range(2):
            z = [mpf(x) for x in noise[n].tolist()]
            expected = -sum(x**2 for x in z) / 8 - mpmath.log(s) - mpmath.log(2 * mpmath.pi) / 2
            assert agrees(float(logprob.detach()[n]), expected, abs(mpmath.log(s)), dtype, 1.0)
            for ours, x in zip(gradient[n].tolist(), z, strict=True):
                slope = c_v * x / (s * 4)
                if abs(slope) < mpf(torch.finfo(dtype).max) / 4:
                    assert agrees(ours, slope, abs(slope), dtype, 1.0)


@DTYPES
@pytest.mark.parametrize("limit", [20.0, 3.0, None])
def test_saturate(dtype, limit):
    bound = math.inf if limit is None else limit
    x = torch.tensor([0.0, 2.5, -2.5, 3.0, 19.0, -21.0, 9999.0, -1e30, math.inf], dtype=dtype)
    x.requires_grad_()
    saturated = saturate(x, limit)
    assert saturated.tolist() == [min(max(value, -bound), bound) for value in x.tolist()]
    (gradient,) = torch.autograd.grad(saturated.exp().sum(), x)
    expected = [math.exp(v) if abs(v) <= bound and v < 700 else 0.0 for v in x.tolist()]
    keep = [abs(v) < 88 for v in x.tolist()] if limit is None else [True] * len(x)
    assert gradient[torch.tensor(keep)].tolist() == pytest.approx(
        [e for e, kept in zip(expected, keep, strict=True) if kept], rel=1e-5
    )
    assert math.isnan(float(saturate(x.new_tensor(math.nan), limit)))


def test_defaults_of_the_limit():
    assert FlowLossParams().log_ratio_limit == 20.0
    assert dataclasses.replace(FlowLossParams(), log_ratio_limit=None).log_ratio_limit is None
