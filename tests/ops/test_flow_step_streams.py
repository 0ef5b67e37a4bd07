"""Noise that is drawn from streams: Philox and Box-Muller, and the ops that take streams of it."""

from __future__ import annotations

import functools
from typing import Any

import flow_inputs
import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from mutants.flow_step import STREAM_MUTANTS
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.ops.flow_policy_loss import flow_policy_loss
from lvrpo.ops.flow_step import flow_step
from lvrpo.params.flow import StepCoefficients
from lvrpo.reference._philox import philox, standard_normal
from lvrpo.reference.flow_step import flow_step as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

WORD = 0xFFFFFFFF
# kat_vectors of Random123: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
SHAPES = [(1, 1), (3, 5, 7), (10, 4, 12), (2, 8192 + 130)]
# Seeds and subsequences of every sign and size.
EDGES = [0, 1, -1, 2**31, 2**32, 2**32 - 1, 2**63 - 1, -(2**63), 81985529216486895]


def as_streams(samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    at = torch.randint(len(EDGES), (samples, 2), generator=generator)
    return torch.tensor(EDGES)[at] ^ torch.arange(samples)[:, None]


def step_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(shape))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    velocity, x_t = (torch.randn(shape, generator=generator) for _ in range(2))
    schedule = FlowSchedule(10, 3.0, window=(0, 8))
    return {
        "velocity": velocity.to(dtype),
        "x_t": x_t.to(wide),
        "coeffs": schedule.coefficients(torch.arange(shape[0]) * 3 % 10, dtype=wide),
        "noise": as_streams(shape[0]),
    }


def drawn(streams: Tensor, elements: int, backend: str) -> Tensor:
    """What a step from nothing draws."""
    nothing, one = torch.zeros(len(streams), elements), torch.ones(1)
    coeffs = StepCoefficients(0 * one, 0 * one, one, one, one)
    return flow_step(nothing, nothing, coeffs, streams, backend=backend)[0]


def words_of(counter: int, subsequence: int, seed: int) -> list[int]:
    """Philox in Python's integers."""
    halves = [x >> shift & WORD for x in (counter, subsequence) for shift in (0, 32)]
    low, high = seed & WORD, seed >> 32 & WORD
    for turn in range(10):
        of_a, of_c = halves[0] * 0xD2511F53, halves[2] * 0xCD9E8D57
        keys = (low + turn * 0x9E3779B9) & WORD, (high + turn * 0xBB67AE85) & WORD
        halves = [
            *(of_c >> 32 ^ halves[1] ^ keys[0], of_c & WORD),
            *(of_a >> 32 ^ halves[3] ^ keys[1], of_a & WORD),
        ]
    return halves


@functools.cache
def exact_normals(seed: int, subsequence: int, elements: int) -> list[np.float32]:
    """Box-Muller with 50 digits, rounded once."""
    found = []
    for index in range((elements + 3) // 4):
        words = words_of(index, subsequence & (2**64 - 1), seed & (2**64 - 1))
        for one, two in (words[:2], words[2:]):
            with mpmath.workdps(50):
                u, turn = ((mpmath.mpf(word) + 0.5) / 2**32 for word in (one, two))
                radius = mpmath.sqrt(-2 * mpmath.log(u))
                angle = 2 * mpmath.pi * turn
                pair = radius * mpmath.cos(angle), radius * mpmath.sin(angle)
            found += [np.float32(float(x)) for x in pair]
    return found[:elements]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_those_that_random123_publishes(counter, key, words):
    expected = [int(word, 16) for word in words.split()]
    found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in found] == expected
    counter_low, subsequence = (counter[i] | counter[i + 1] << 32 for i in (0, 2))
    assert words_of(counter_low, subsequence, key[0] | key[1] << 32) == expected


def test_numbers_are_exact_but_for_one_rounding(backend):
    streams = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES))
    for stream, ours in zip(streams.tolist(), drawn(streams, 43, backend).tolist(), strict=True):
        assert ours == [float(x) for x in exact_normals(*stream, 43)], stream


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 2047, 8192, 8193, 40_000])
def test_every_backend_draws_the_same_bits(backend, elements):
    streams = as_streams(5)
    assert torch.equal(drawn(streams, elements, backend), standard_normal(streams, elements))


def test_numbers_of_a_stream_are_standard_normal():
    for seed, subsequence in ((0, 0), (-1, 7), (2**40, 2**63 - 1)):
        z = standard_normal(torch.tensor([[seed, subsequence]]), 200_000)[0].double().numpy()
        assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
        # Standard errors of the moments of 200,000 normals.
        for power, moment, error in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
            assert abs((z**power).mean() - moment) < 4 * error / len(z) ** 0.5, power
        assert np.abs(z).max() < (2 * 33 * np.log(2)) ** 0.5


def test_neighbours_are_independent():
    """Of seeds, of subsequences, and of the elements of one stream; also how large they are."""
    grid = torch.cartesian_prod(torch.arange(40), torch.arange(40)) + torch.tensor([3, -20])
    z = standard_normal(grid, 64).double().view(40, 40, 64)
    for values in (z, z.square() - 1):
        size = float(values.square().mean())
        for dim in range(3):
            for apart in (1, 2, 3, 4):
                first = values.narrow(dim, 0, values.shape[dim] - apart)
                product = (first * values.narrow(dim, apart, first.shape[dim])).mean()
                assert abs(float(product)) < 4.5 * size / first.numel() ** 0.5, (dim, apart)
        swapped = (values * values.transpose(0, 1)).mean()  # seed and subsequence are two things
        assert float(swapped) < 0.2 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_from_streams_is_one_from_their_numbers(backend, shape, dtype):
    inputs = step_inputs(shape, dtype)
    stored = standard_normal(inputs["noise"], inputs["velocity"][0].numel()).view(shape)
    results = []
    for noise in (inputs["noise"], stored):
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("velocity", "x_t")}
        x_next, logprob = flow_step(**inputs | leaves | {"noise": noise}, backend=backend)
        gradients = torch.autograd.grad((x_next.sin().sum() + logprob.sum()), list(leaves.values()))
        results.append((x_next, logprob, *gradients))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_ref", [True, False])
def test_a_loss_from_streams_is_one_from_their_numbers(backend, shape, dtype, has_ref):
    inputs = flow_inputs.make_inputs(shape, dtype, flow_inputs.params_of("ppo"))
    if not has_ref:
        inputs |= {"velocity_ref": None, "params": flow_inputs.FlowLossParams()}
    streams = as_streams(shape[0])
    stored = standard_normal(streams, inputs["velocity"][0].numel()).view(shape)
    results = []
    for noise in (streams, stored):
        velocity = inputs["velocity"].clone().requires_grad_()
        found = flow_policy_loss(**inputs | {"velocity": velocity, "noise": noise}, backend=backend)
        found.loss.backward()
        results.append((found.loss, found.metrics.sums, found.metrics.extremes, velocity.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_a_sample_alone_draws_what_it_draws_in_a_batch(backend):
    streams = as_streams(6)
    batch = drawn(streams, 5000, backend)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    assert torch.equal(drawn(streams[order], 5000, backend), batch[order])
    for i in range(6):
        assert torch.equal(drawn(streams[i : i + 1], 700, backend), batch[i : i + 1, :700])


def test_streams_of_any_strides(backend):
    streams = as_streams(6)
    strided = streams.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(drawn(strided, 33, backend), drawn(streams, 33, backend))


def test_a_deterministic_step_draws_nothing(backend):
    inputs = step_inputs((10, 12), torch.float32)
    inputs["coeffs"] = FlowSchedule(10, dynamics="ode").coefficients(range(10))
    x_next, logprob = flow_step(**inputs, backend=backend)
    expected, _ = flow_step(**inputs | {"noise": None}, backend=backend)
    assert torch.equal(x_next, expected)
    assert torch.equal(logprob, torch.zeros(10))


def test_no_samples(backend):
    streams = torch.zeros(0, 2, dtype=torch.int64)
    coeffs = FlowSchedule(10).coefficients([])
    x_next, _ = flow_step(torch.zeros(0, 3), torch.zeros(0, 3), coeffs, streams, backend=backend)
    assert x_next.shape == (0, 3)


def test_a_chain_of_steps_is_kept_in_its_first_latents_and_velocities(backend):
    """Latents of later steps need not be stored either: the same step makes the same bits."""
    schedule, seeds = FlowSchedule(6), torch.tensor([11, 12, 13])
    x = torch.randn(3, 4, 12)
    first, velocities, latents = x, [], []
    for k in range(6):
        latents.append(x)
        velocities.append((x * 1.3 + k).bfloat16())
        streams = torch.stack([seeds, torch.full_like(seeds, k)], dim=1)
        x, _ = flow_step(velocities[k], x, schedule.coefficients(k), streams, backend=backend)
    again = first
    for k, velocity in enumerate(velocities):
        assert torch.equal(again, latents[k])
        streams = torch.stack([seeds, torch.full_like(seeds, k)], dim=1)
        again, _ = flow_step(velocity, again, schedule.coefficients(k), streams, backend=backend)


@pytest.mark.parametrize("op", ["flow_step", "flow_policy_loss"])
def test_compiles_without_a_graph_break(backend, op):
    if op == "flow_step":
        inputs = step_inputs((4, 5), torch.float32)
        run = functools.partial(flow_step, backend=backend)
    else:
        inputs = flow_inputs.make_inputs((4, 5), torch.float32) | {"noise": as_streams(4)}
        run = functools.partial(flow_policy_loss, backend=backend)

    def function(velocity: Tensor) -> Tensor:
        return run(**inputs | {"velocity": velocity})[0].square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = inputs["velocity"].clone().requires_grad_()
    eager = inputs["velocity"].clone().requires_grad_()
    compiled(ours).backward()
    function(eager).backward()
    torch.testing.assert_close(ours.grad, eager.grad)


def test_opcheck():
    inputs = step_inputs((4, 5), torch.float32)
    coeffs = inputs["coeffs"]
    rest = inputs["noise"], coeffs.c_x, coeffs.c_v, coeffs.std
    x_t = inputs["x_t"]
    torch.library.opcheck(torch.ops.lvrpo.flow_step_fwd.default, (inputs["velocity"], x_t, *rest))
    torch.library.opcheck(torch.ops.lvrpo.flow_step_bwd.default, (x_t, torch.randn(4), *rest))


@pytest.mark.parametrize("mutant", STREAM_MUTANTS.values(), ids=STREAM_MUTANTS.keys())
def test_rule_rejects_mutant(mutant):
    inputs = step_inputs((8, 4, 12), torch.float32)
    check_op(reference, reference, inputs, differentiable=["velocity", "x_t"])
    with pytest.raises(AssertionError):
        check_op(mutant, reference, inputs, differentiable=["velocity", "x_t"])


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"noise is torch.int64 of shape \(2, 3\), expected"),
        (torch.zeros(3, 2, dtype=torch.int64), r"torch.int64 of shape \(2, 2\)"),
        (torch.zeros(2, dtype=torch.int64), "noise is torch.int64"),
        (torch.zeros(2, 2, dtype=torch.int32), "noise is torch.int32"),
        (torch.zeros(2, 4), r"noise has shape \(2, 4\)"),
    ],
)
@pytest.mark.parametrize("op", ["flow_step", "flow_policy_loss"])
def test_bad_input(backend, op, noise, message):
    x, coeffs = torch.zeros(2, 3), FlowSchedule(10).coefficients(2)
    calls = {
        "flow_step": lambda: flow_step(x, x, coeffs, noise, backend=backend),
        "flow_policy_loss": lambda: flow_policy_loss(
            x, x, noise, coeffs, [1.0, 1.0], backend=backend
        ),
    }
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        calls[op]()
