"""Finite in, finite out: every loss at log-ratios past the range of floats.

The oracle is mpmath, in which no exponential overflows: values by the formulas of
docs/ops/grpo_loss.md, derivatives by differences.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from loss_inputs import metrics_of
from mpmath import mp, mpf

from lvrpo import backends
from lvrpo.ops.grpo_loss import LOSS_PRESETS, LossParams, grpo_loss

FAR = [0.0, 20.0, -20.0, 87.0, -87.0, 89.0, -89.0, 200.0, -200.0, 9999.0, -9999.0]
#: The tokens of the one sequence besides the far one: log-probs, and log-ratios inside every bound.
NEAR = [(-1.5, 0.03125), (-0.75, -0.0625)]
STEP = mpf(10) ** -20


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(50):
        yield


def clamp(x: Any, low: Any, high: Any) -> Any:
    return max(mpf(low), min(mpf(high), x))


def surrogate(
    x: list, c: list, t: int, level: Any, rho: Any, a: Any, old: list, p: LossParams
) -> Any:
    """Of token t; `c` are the log-probs as constants, `rho` the ratio that is differentiated."""
    low, high = p.clip_low, p.clip_high
    cap = math.inf if p.ratio_cap is None else p.ratio_cap
    fixed = mp.exp(level(c))
    if a == 0:
        return mpf(0)
    if p.ratio == "none":
        return -a * x[t]
    if p.surrogate == "clip":
        return -a * (min(rho, mpf(1 + high)) if a > 0 else clamp(rho, 1 - low, cap))
    if p.surrogate == "detached":
        return -a * clamp(fixed, 1 - low, 1 + high) * x[t]
    if p.surrogate == "sigmoid":
        tau = mpf(p.gate_pos if a > 0 else p.gate_neg)
        at = tau * (min(rho, mp.exp(20)) - 1)
        return -a * 4 / tau / (1 + mp.exp(-at))
    if p.surrogate == "gamma":
        k, rate = p.gamma_pos if a > 0 else p.gamma_neg
        return -a * mp.exp(rate + k * mp.log(fixed) - rate * fixed) * x[t]
    if p.surrogate == "log_clip":
        return -a * rho
    new, before = mp.exp(c[t]), mp.exp(old[t])
    change = new - before
    inside = change <= high if a > 0 else change >= -low
    if p.surrogate == "binary_kl":
        tiny = mpf(1e-8)
        far = before * (old[t] - c[t]) + (1 - before) * mp.log(
            (1 - before + tiny) / (1 - new + tiny)
        )
        inside = far <= (high if a > 0 else low) or (change <= 0 if a > 0 else change >= 0)
    return -a * min(fixed, mpf(cap)) * x[t] if inside else mpf(0)


@functools.cache  # the same for every backend
def oracle(
    logp: tuple[float, ...],
    old: tuple[float, ...],
    ref: tuple[float, ...],
    a: float,
    p: LossParams,
) -> tuple[Any, list[Any]]:
    """Loss and its derivatives for one sequence, all of whose tokens are active."""
    n, limit = len(logp), math.inf if p.log_ratio_limit is None else p.log_ratio_limit
    c, old, ref = ([mpf(x) for x in values] for values in (logp, old, ref))

    def level_of(t: int, x: list, limit: float = limit) -> Any:
        gaps = [u - v for u, v in zip(x, old, strict=True)]
        if p.ratio in ("none", "token"):
            return clamp(gaps[t], -limit, limit)
        if p.surrogate == "gamma":
            total = sum(clamp(gap, -20, 20) for gap in gaps)
            return clamp(clamp(total, mp.log(mpf(1e-8)), 20), -limit, limit)
        if p.surrogate == "log_clip":
            clipped = (lambda g: min(g, p.clip_high)) if a > 0 else (lambda g: max(g, -p.clip_low))
            gaps = [clipped(gap) for gap in gaps]
        total = sum(gaps)
        if p.ratio == "seq_sum":
            return clamp(total, -limit, limit)
        return clamp(total / n, -limit, limit)

    def kl(x: list, t: int) -> Any:
        d = ref[t] - x[t]
        value = {"k1": -d, "k2": d * d / 2, "abs": abs(d)}.get(p.kl)
        if value is None:
            d = min(d, mpf(limit))
            value = mp.exp(d) - d - 1
        if p.kl_factor == "none":
            return value
        by = c if p.kl_factor == "detached_ratio" else x
        gap = by[t] - old[t]
        if p.kl_factor == "sequence_ratio":
            gap = sum(u - v for u, v in zip(by, old, strict=True)) / n
        return value * mp.exp(clamp(gap, -limit, limit))

    def loss(x: list) -> Any:
        total = mpf(0)
        for t in range(n):
            level = functools.partial(level_of, t)
            # The mean of "seq_mean_token" is a constant, but for the token's own log-prob.
            at = level(c if p.ratio == "seq_mean_token" else x)
            if p.ratio == "seq_mean_token" and abs(level(c, math.inf)) <= limit:
                at += x[t] - c[t]
            total += surrogate(x, c, t, level, mp.exp(at), a, old, p) + p.beta * kl(x, t)
        inner = {"seq_mean_token_mean": n, "token_mean": n, "seq_mean_token_sum_norm": p.max_length}
        return total / inner.get(p.aggregation, 1)

    slopes = []
    for t in range(n):
        # From the inside, where a log-ratio is at its limit: there it still has its derivative.
        step = -STEP * mp.sign(logp[t] - old[t]) if logp[t] != old[t] else STEP
        moved = [y + step * (i == t) for i, y in enumerate(c)]
        slopes.append((loss(moved) - loss(c)) / step)
    return loss(c), slopes


def cases() -> Any:
    """Log-probs, old and reference log-probs, and advantage: one far token, or all of them."""
    for d, a, whole in itertools.product(FAR, (-1.0, 0.0, 1.0), (False, True)):
        near = [] if whole else NEAR
        tokens = [(min(d, 0.0) - 1.0, d)] * (3 if whole else 1) + near
        logp, old = (tuple(x - gap * by for x, gap in tokens) for by in (0, 1))
        yield logp, old, tuple(x + gap / 2 + 0.125 for x, gap in tokens), a  # off |d|'s kink


SHARED_KL = "k3 times the sequence's ratio"
KLS = {
    "no KL": {},
    "k3": {"beta": 0.5},
    "k3 times ratio": {"beta": 0.5, "kl_factor": "ratio"},
    "k2 times constant ratio": {"beta": 0.5, "kl": "k2", "kl_factor": "detached_ratio"},
    "k1 times ratio": {"beta": 0.5, "kl": "k1", "kl_factor": "ratio"},
    "abs": {"beta": 0.5, "kl": "abs"},
    SHARED_KL: {"beta": 0.5, "kl_factor": "sequence_ratio"},
    "k1 times the sequence's ratio": {"beta": 0.5, "kl": "k1", "kl_factor": "sequence_ratio"},
}


FORMS = dict.fromkeys(
    [
        *itertools.product(LOSS_PRESETS, ("no KL",), (20.0, None)),
        *itertools.product(("grpo", "gspo_token"), KLS, (20.0,)),
        *itertools.product(("gspo", "gmpo", "vespo"), (SHARED_KL,), (20.0, None)),
        *itertools.product(("grpo", "gspo"), ("k3 times ratio",), (5.0,)),
    ]
)
MORE = dict.fromkeys(itertools.product(LOSS_PRESETS, ("k3 times ratio",), (20.0, None)))
CASES = [
    *FORMS,
    *(pytest.param(*form, marks=pytest.mark.slow) for form in MORE if form not in FORMS),
]


@pytest.mark.parametrize(("name", "kl", "limit"), CASES)
def test_value_and_gradient_are_finite_and_right(backend, name, kl, limit):
    length = {"max_length": 4} if name == "dr_grpo" else {}
    params = LossParams.preset(name, log_ratio_limit=limit, **KLS[kl], **length)
    for number, (logp, old, ref, advantage) in enumerate(cases()):
        if backends.triton_interprets() and number % 11:
            continue  # milliseconds a call
        value, slopes = oracle(logp, old, ref, advantage, params)
        leaf = torch.tensor(logp, requires_grad=True)

        def run(leaf=leaf, old=old, ref=ref, advantage=advantage):
            return grpo_loss(
                leaf,
                torch.tensor(old),
                [advantage],
                [0, len(old)],
                ref_logprobs=torch.tensor(ref),
                params=params,
                backend=backend,
            )

        largest = max(abs(value), *map(abs, slopes))
        if largest > 1e37:  # fp32 has no such number
            assert limit is None
            if abs(value) > 1e39:
                with pytest.raises(ValueError, match="log_ratio_limit is None"):
                    run()
            continue
        loss, metrics = run()
        loss.backward()
        # e^20 has 26 bits of its exponent's own rounding.
        scale = 1e-5 * float(max(1, largest))
        assert float(loss.detach()) == pytest.approx(float(value), rel=1e-5, abs=scale)
        found = pytest.approx([float(x) for x in slopes], rel=1e-5, abs=scale)
        assert leaf.grad.tolist() == found, (logp, old, advantage)
        assert all(map(math.isfinite, metrics_of(metrics).values())), (logp, old, advantage)


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_no_limit_changes_nothing_near_the_old_policy(backend, name):
    length = {"max_length": 4} if name == "dr_grpo" else {}
    with_limit = LossParams.preset(name, beta=0.1, **length)
    without = dataclasses.replace(with_limit, log_ratio_limit=None)
    old = -torch.rand(12) - 0.5
    results = []
    for params in (with_limit, without):
        leaf = (old + 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(0))).detach()
        leaf.requires_grad_()
        loss, _ = grpo_loss(
            *(leaf, old, [1.0, -1.0, 0.5], [0, 4, 4, 12]),
            ref_logprobs=old,
            params=params,
            backend=backend,
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_kl_limit_bounds_the_gradient_too(backend):
    # verl's clamp at 10, without a limit of log-ratios: the infinite exponential is not multiplied.
    leaf = torch.tensor([-500.0, -1.0], requires_grad=True)
    params = LossParams(beta=1.0, kl_limit=10.0, log_ratio_limit=None)
    loss, _ = grpo_loss(
        leaf,
        None,
        [0.0],
        [0, 2],
        ref_logprobs=torch.tensor([-1.0, -1.0]),
        params=params,
        backend=backend,
    )
    loss.backward()
    assert float(loss.detach()) == 5.0
    assert leaf.grad.tolist() == [0.0, 0.0]
