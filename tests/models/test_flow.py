from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import lvrpo.models.flow as flow
from lvrpo.models.flow import FlowSchedule
from lvrpo.ops.flow_step import flow_step
from lvrpo.params.flow import FlowLossParams

# The data are N(0, 0.5^2), for which the velocity is linear in x and known.
DATA_VARIANCE = 0.25


def velocity_slope(t: Tensor) -> Tensor:
    covariance = t - (1 - t) * DATA_VARIANCE
    return covariance / ((1 - t) ** 2 * DATA_VARIANCE + t**2)


def final_std(schedule: FlowSchedule) -> float:
    """Exact spread of the samples: every step is a linear map plus independent noise."""
    steps = schedule.coefficients(range(schedule.num_steps), dtype=torch.float64)
    slopes = steps.c_x + steps.c_v * velocity_slope(steps.t)
    variance = 1.0
    for slope, std in zip(slopes.tolist(), steps.std.tolist(), strict=True):
        variance = slope**2 * variance + std**2
    return math.sqrt(variance)


@pytest.mark.parametrize(
    ("dynamics", "noise_level", "expected"),
    [
        ("flow_sde", 0.7, (0.424, 0.479, 0.499)),
        ("flow_sde", 1.3, (0.484, 0.490, 0.499)),
        ("dance_sde", 0.3, (0.385, 0.469, 0.497)),
        ("ode", 0.0, (0.370, 0.465, 0.496)),
        ("cps", 0.8, (0.315, 0.371, 0.398)),
    ],
)
def test_spread_of_a_gaussian(dynamics, noise_level, expected):
    for num_steps, std in zip((10, 40, 400), expected, strict=True):
        schedule = FlowSchedule(num_steps, 3.0, dynamics, noise_level)
        assert abs(final_std(schedule) - std) < 0.001


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.3])
def test_sde_converges_to_the_data(dynamics, noise_level):
    schedule = FlowSchedule(20_000, 3.0, dynamics, noise_level)
    assert abs(final_std(schedule) - 0.5) < 0.001


def test_sampling_with_the_op_has_that_spread(backend):
    generator = torch.Generator().manual_seed(0)
    schedule = FlowSchedule(10, 3.0, "flow_sde", 0.7, window=(0, 6))
    x = torch.randn(50_000, 1, generator=generator)
    for k in range(schedule.num_steps):
        step = schedule.coefficients(k)
        noise = torch.randn(x.shape, generator=generator)
        x, _ = flow_step(velocity_slope(step.t) * x, x, step, noise, backend=backend)
    error = 4 * 0.5 / math.sqrt(2 * len(x))
    assert abs(float(x.std()) - final_std(schedule)) < error


def test_times():
    times = FlowSchedule(10, shift=3.0).times
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert times[5] == pytest.approx(0.75)
    uniform = torch.linspace(1, 0, 5, dtype=torch.float64)
    assert torch.equal(FlowSchedule(4, shift=1.0).times, uniform)


@pytest.mark.parametrize("dynamics", flow.DYNAMICS)
@pytest.mark.parametrize("num_steps", [1, 2, 15])
def test_coefficients_are_finite_up_to_both_ends(dynamics, num_steps):
    steps = FlowSchedule(num_steps, dynamics=dynamics).coefficients(range(num_steps))
    for name in ("c_x", "c_v", "std", "t", "dt"):
        values = getattr(steps, name)
        assert values.shape == (num_steps,)
        assert values.isfinite().all(), name
    assert (steps.dt < 0).all()
    assert (steps.std >= 0).all()


def test_flow_sde_formula():
    schedule = FlowSchedule(15, 3.0, "flow_sde", 1.3)
    k, t = 4, schedule.times.tolist()
    dt = t[k + 1] - t[k]
    sigma = 1.3 * math.sqrt(t[k] / (1 - t[k]))
    step = schedule.coefficients(k, dtype=torch.float64)
    assert float(step.c_x) == pytest.approx(1 + sigma**2 * dt / (2 * t[k]), rel=1e-12)
    assert float(step.c_v) == pytest.approx(
        dt * (1 + sigma**2 * (1 - t[k]) / (2 * t[k])), rel=1e-12
    )
    assert float(step.std) == pytest.approx(sigma * math.sqrt(-dt), rel=1e-12)
    first = schedule.coefficients(0, dtype=torch.float64)
    assert float(first.std) == pytest.approx(1.3 * math.sqrt(1 / (1 - t[1])) * math.sqrt(1 - t[1]))


def test_steps_outside_the_window_are_ode_steps():
    schedule = FlowSchedule(10, window=(1, 3))
    ode = dataclasses.replace(schedule, dynamics="ode")
    assert schedule.stochastic_steps == (1, 2, 3)
    assert ode.stochastic_steps == ()
    steps, plain = (s.coefficients(range(10)) for s in (schedule, ode))
    outside = torch.tensor([0, 4, 5, 6, 7, 8, 9])
    for name in ("c_x", "c_v", "std"):
        assert torch.equal(getattr(steps, name)[outside], getattr(plain, name)[outside])
    assert FlowSchedule(10).stochastic_steps == tuple(range(10))
    assert FlowSchedule(10, dynamics="cps").stochastic_steps == tuple(range(9))


def test_coefficients_by_tensor_repeat_and_keep_order():
    schedule = FlowSchedule(10)
    steps = schedule.coefficients(torch.tensor([3, 0, 3]))
    assert len(steps) == 3
    assert steps.std.dtype == torch.float32
    assert steps.std[0] == steps.std[2] == schedule.coefficients(3).std[0]
    assert torch.equal(steps.select(torch.tensor([1])).t, schedule.coefficients(0).t)
    assert steps.to(torch.float64).c_v.dtype == torch.float64
    with pytest.raises(ValueError, match="steps holds 10"):
        schedule.coefficients([0, 10])
    with pytest.raises(ValueError, match="steps holds -1"):
        schedule.coefficients(-1)


def test_fingerprint_tells_every_field_apart():
    base = FlowSchedule(10, 3.0, "flow_sde", 0.7, (0, 2))
    changes = [
        {"num_steps": 11},
        {"shift": 3.0000001},
        {"dynamics": "cps"},
        {"noise_level": 0.7000001},
        {"window": (0, 3)},
        {"window": None},
    ]
    prints = {dataclasses.replace(base, **change).fingerprint() for change in changes}
    assert len(prints | {base.fingerprint()}) == 1 + len(changes)
    # Written down: a trajectory on disk must still match in the next version.
    assert base.fingerprint() == "9b53fbbaf69a"
    assert FlowSchedule(10, 3, "flow_sde", 0.7, [0, 2]).fingerprint() == base.fingerprint()


def test_noise_floor_is_the_spread_of_the_log_ratio():
    schedule = FlowSchedule(15, 3.0, "flow_sde", 0.7, window=(2, 11))
    elements, relative, samples = 64, 0.01, 4000
    step = schedule.coefficients(schedule.stochastic_steps[3], dtype=torch.float64)
    z = torch.randn(samples, elements, dtype=torch.float64)
    dmu = step.c_v * relative * torch.randn(samples, elements, dtype=torch.float64)
    for params, log_ratio in (
        (FlowLossParams(), (z * dmu / step.std).mean(dim=1)),
        (FlowLossParams(log_ratio_scale=0.5), 0.5 * (z * dmu / step.std).sum(dim=1)),
        (FlowLossParams(variant="guard"), (z * dmu).mean(dim=1)),
    ):
        floor = flow.noise_floor(schedule, elements, relative, params=params)
        assert floor.shape == (10,)
        assert float(floor[3] / log_ratio.std()) == pytest.approx(1, abs=0.05)


def test_training_targets():
    x0, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    t = torch.tensor([0.0, 0.25, 1.0])
    x = flow.interpolate(x0, noise, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * noise[1])
    # One ODE step from t to 0 with the target velocity lands on the data.
    torch.testing.assert_close(x[1] - 0.25 * flow.velocity_target(x0, noise)[1], x0[1])
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(flow.shift_times(ends, 3.0), ends)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"dynamics": "sde"}, "dynamics is 'sde'"),
        ({"noise_level": -0.1}, "noise_level is -0.1"),
        ({"dynamics": "cps", "noise_level": 1.2}, r"noise_level is 1.2, expected \[0, 1\]"),
        ({"window": (2, 10)}, r"window is \(2, 10\)"),
        ({"window": (3, 2)}, r"window is \(3, 2\)"),
    ],
    ids=str,
)
def test_bad_schedule(change, message):
    with pytest.raises(ValueError, match=message):
        FlowSchedule(**{"num_steps": 10} | change)
