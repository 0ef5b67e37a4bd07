from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_inputs import (
    INF,
    PARAMS,
    make_inputs,
    metrics_of,
    reference,
    run_op,
    scales,
    stops_a_gradient,
)
from mutants.grpo_loss import MUTANTS, VARIANT_MUTANTS
from runnable import WITH_KERNELS
from torch import Tensor

from lvrpo import backends
from lvrpo.backends import library
from lvrpo.dtypes import numbers_by_name
from lvrpo.ops.grpo_loss import LOSS_PRESETS, LossParams, grpo_loss
from lvrpo.params.policy_loss import LOSS_NUMBERS
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

# Lengths of the sequences. The interpreter of Triton takes milliseconds per sequence.
SEQUENCES = 12 if backends.triton_interprets() else 260  # more than one thread's share
SHAPES = {
    "one token": [1],
    "ragged, some empty": [3, 0, 7, 1, 0],
    "longer than a block": [1100, 5],
    "many": [20] * SEQUENCES,
}


def check(backend: str, lengths: list[int], dtype: torch.dtype, params: LossParams) -> None:
    inputs = make_inputs(lengths, dtype) | {"params": params}
    check_op(
        lambda **inputs: run_op(**inputs, backend=backend),
        reference,
        inputs,
        differentiable=["logprobs", "entropy"],
        scales=scales(inputs),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_matches_reference(backend, params, dtype):
    check(backend, [3, 0, 7, 700, 1, 40, 0], dtype, params)


@pytest.mark.parametrize("name", ["grpo, all terms", "gspo, all terms", "gmpo", "rloo", "dppo_kl"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference_in_every_shape(backend, shape, name):
    check(backend, shape, torch.float32, PARAMS[name])


@settings(
    max_examples=5 if backends.triton_interprets() else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    name=st.sampled_from(sorted(PARAMS)),
)
def test_matches_reference_for_any_lengths(backend, lengths, name):
    check(backend, lengths, torch.float32, PARAMS[name])


def test_narrow_inputs_and_per_token_advantages(backend):
    inputs = make_inputs([3, 0, 7, 1], torch.bfloat16) | {"params": PARAMS["grpo, all terms"]}
    inputs["advantages"] = torch.randn(11, dtype=torch.bfloat16)
    check_op(
        lambda **inputs: run_op(**inputs, backend=backend),
        reference,
        inputs,
        differentiable=["logprobs", "entropy"],
        scales=scales(inputs),
    )


def test_one_token_by_hand(backend):
    # ratio 2 with A = 1 is held at 1.2, with A = -1 it is not; ratio 1/2 the other way round.
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() + torch.tensor([-1.0, -1.0, 1.0, 1.0]) * math.log(2.0)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    result = grpo_loss(logprobs, old, advantages, torch.arange(5), backend=backend)
    result.loss.backward()
    expected = torch.tensor([-1.2, 2.0, -0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(result.loss, expected.mean())
    slopes = torch.tensor([0.0, 2.0, -0.5, 0.0], dtype=torch.float64) / 4
    torch.testing.assert_close(logprobs.grad, slopes)
    metrics = result.metrics
    assert [float(metrics.clip_fraction_low), float(metrics.clip_fraction_high)] == [0.25, 0.25]
    torch.testing.assert_close(float(metrics.ratio_min), 0.5)
    torch.testing.assert_close(float(metrics.ratio_max), 2.0)
    torch.testing.assert_close(float(metrics.ratio_mean), 1.25)
    torch.testing.assert_close(float(metrics.effective_sample_size), 25 / (4 * 8.5))


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_on_policy_ratio_is_exactly_one_and_has_a_gradient(backend, name):
    inputs = make_inputs([3, 0, 7, 600])
    params = LossParams.preset(name, **({"max_length": 9} if name == "dr_grpo" else {}))
    inputs |= {"params": params, "backend": backend}
    results = []
    for old in (None, inputs["logprobs"].clone()):
        logprobs = inputs["logprobs"].clone().requires_grad_()
        result = grpo_loss(**inputs | {"logprobs": logprobs, "old_logprobs": old})
        result.loss.backward()
        results.append((result.loss.detach(), logprobs.grad))
        for field in ("ratio_min", "ratio_max", "ratio_mean", "effective_sample_size"):
            assert float(getattr(result.metrics, field)) == 1.0
        assert float(result.metrics.clip_fraction_low + result.metrics.clip_fraction_high) == 0.0
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][1] != 0).any()


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_masked_tokens_may_hold_anything(backend, params):
    inputs = make_inputs([6, 4, 5])
    keep = inputs["mask"]
    garbage = torch.tensor([math.nan, INF, -INF])[torch.arange(15) % 3]
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "policy_weights"):
        inputs[name] = torch.where(keep, inputs[name], garbage).requires_grad_()
    inputs |= {"params": params, "backend": backend}
    result = grpo_loss(**inputs)
    result.loss.backward()
    for name in ("logprobs", "entropy"):
        gradient = inputs[name].grad
        assert gradient is None or (gradient[~keep] == 0).all()
    assert inputs["logprobs"].grad.isfinite().all()

    counts = [int(part.sum()) for part in keep.split([6, 4, 5])]
    short = {
        k: x[keep] if torch.is_tensor(x) and x.shape == (15,) else x for k, x in inputs.items()
    }
    short["cu_seqlens"] = torch.tensor([0, *counts]).cumsum(0)
    alone = grpo_loss(**short)
    torch.testing.assert_close(result.loss, alone.loss)
    assert metrics_of(result.metrics) == pytest.approx(metrics_of(alone.metrics), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_parts_with_the_global_denominator_add_up(backend, aggregation, as_tensor):
    inputs = make_inputs([3, 4, 5, 6], torch.float64)
    params = LossParams(aggregation=aggregation, beta=0.1)
    whole = grpo_loss(**inputs, params=params, backend=backend)
    count = float(whole.metrics.active_tokens) if aggregation == "token_mean" else 4
    denominator = torch.tensor(count) if as_tensor else count
    parts = []
    for tokens, sequences in ((slice(0, 7), slice(0, 2)), (slice(7, 18), slice(2, 4))):
        part = {k: x[tokens] if len(x) == 18 else x for k, x in inputs.items()}
        part["advantages"] = inputs["advantages"][sequences]
        part["cu_seqlens"] = inputs["cu_seqlens"][sequences.start : sequences.stop + 1]
        part["cu_seqlens"] = part["cu_seqlens"] - part["cu_seqlens"][0]
        parts.append(grpo_loss(**part, params=params, denominator=denominator, backend=backend))
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    policy = parts[0].metrics.policy_loss + parts[1].metrics.policy_loss
    torch.testing.assert_close(policy, whole.metrics.policy_loss)


def test_kl_is_exact_for_close_policies(backend):
    # In fp32, e^d - d - 1 computed as written is off by more than its own size here.
    d = torch.tensor([1e-4, -2e-4, 3e-4, 0.0])
    logprobs = torch.full((4,), -0.5)
    ref = logprobs + d
    ours = grpo_loss(
        logprobs, None, torch.ones(1), torch.tensor([0, 4]), ref_logprobs=ref, backend=backend
    ).metrics.kl
    exact = (ref.double() - logprobs.double()).square().mean() / 2
    assert abs(float(ours) / float(exact) - 1) < 1e-3


def empty_inputs(lengths: list[int]) -> dict[str, Any]:
    return {
        "logprobs": torch.zeros(sum(lengths), requires_grad=True),
        "old_logprobs": None,
        "advantages": torch.ones(len(lengths)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }


@pytest.mark.parametrize("lengths", [[], [0, 0], [2, 1]], ids=["no sequence", "empty", "masked"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_nothing_to_learn_from(backend, lengths, name):
    inputs = empty_inputs(lengths)
    mask = torch.zeros(sum(lengths), dtype=torch.bool)
    params = LossParams.preset(name)
    result = grpo_loss(**inputs, mask=mask, params=params, backend=backend)
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    assert (inputs["logprobs"].grad == 0).all()
    values = metrics_of(result.metrics)
    of_ratios = {"ratio_min", "ratio_max", "ratio_mean", "effective_sample_size"}
    assert values == {name: float(name in of_ratios) for name in values}


def test_non_contiguous_inputs_and_scaled_upstream_gradient(backend):
    inputs = make_inputs([4, 6]) | {"params": PARAMS["grpo, all terms"]}
    apart = {
        k: x.repeat_interleave(2)[::2] if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    gradients = []
    for some in (inputs, apart):
        logprobs = some["logprobs"].detach().requires_grad_()
        loss = grpo_loss(**some | {"logprobs": logprobs}, backend=backend).loss
        (loss.expand(3).sum() * 2).backward()
        gradients.append(logprobs.grad)
    assert torch.equal(*gradients)
    logprobs = inputs["logprobs"].detach().requires_grad_()
    grpo_loss(**inputs | {"logprobs": logprobs}, backend=backend).loss.backward()
    torch.testing.assert_close(gradients[0], 6 * logprobs.grad)


def test_only_log_probs_and_entropy_get_a_gradient(backend):
    inputs = make_inputs([4, 6])
    leaves = {k: x.requires_grad_() for k, x in inputs.items() if x.is_floating_point()}
    params = PARAMS["grpo, all terms"]
    result = grpo_loss(**inputs, params=params, backend=backend)
    result.loss.backward()
    received = {name for name, leaf in leaves.items() if leaf.grad is not None}
    assert received == {"logprobs", "entropy"}
    assert not any(value.requires_grad for value in result.metrics.as_dict().values())


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_order_of_sequences_does_not_matter(backend, params):
    lengths = [3, 1, 7, 4]
    inputs = make_inputs(lengths) | {"params": params, "backend": backend}
    order = [2, 0, 3, 1]
    moved = {
        k: torch.cat([x.split(lengths)[i] for i in order])
        for k, x in inputs.items()
        if torch.is_tensor(x) and len(x) == 15
    }
    moved["advantages"] = inputs["advantages"][order]
    moved["cu_seqlens"] = torch.tensor([0, *(lengths[i] for i in order)]).cumsum(0)
    torch.testing.assert_close(grpo_loss(**inputs).loss, grpo_loss(**inputs | moved).loss)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_same_bits_for_any_number_of_threads(params):
    inputs = make_inputs([20] * 260) | {"params": params, "backend": "cpp"}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            logprobs = inputs["logprobs"].clone().requires_grad_()
            loss, metrics = run_op(**inputs | {"logprobs": logprobs})
            loss.backward()
            results.append((loss.detach(), metrics, logprobs.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "params",
    [pytest.param(p, id=name) for name, p in PARAMS.items() if not stops_a_gradient(p)],
)
def test_gradcheck(backend, params):
    inputs = make_inputs([3, 0, 4, 2], torch.float64) | {"params": params, "backend": backend}
    logprobs, entropy = inputs.pop("logprobs"), inputs.pop("entropy")

    def function(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return grpo_loss(logprobs, entropy=entropy, **inputs).loss

    leaves = logprobs.requires_grad_(), entropy.requires_grad_()
    # Along one random direction where every evaluation is slow.
    torch.autograd.gradcheck(function, leaves, fast_mode=backends.triton_interprets())


@pytest.mark.parametrize("backend", WITH_KERNELS, indirect=True)
def test_opcheck(backend):
    inputs = make_inputs([3, 0, 4])
    params = PARAMS["grpo, all terms"]
    by = (numbers_by_name(LOSS_NUMBERS, params.numbers()), False, params.count_empty)
    names = ("logprobs", "old_logprobs", "advantages", "cu_seqlens", "ref_logprobs", "entropy")
    tensors = [inputs[name] for name in (*names, "mask", "policy_weights")]
    op, choices = torch.ops.lvrpo.grpo_loss_fwd_triton.default, params.choices()
    if backend != "triton":
        ops = torch.ops.lvrpo_emulated if "emulated" in backend else torch.ops.lvrpo
        op = ops.grpo_loss_fwd.default
        choices = library.positions("grpo_loss_fwd", choices)
    torch.library.opcheck(op, (*tensors, *by), choices)
    bare = (inputs["logprobs"], None, *tensors[2:4], None, None, None, None)
    torch.library.opcheck(op, (*bare, *by), choices)


@pytest.mark.parametrize(
    "name", ["grpo, all terms", "gspo, all terms", "gmpo", "vespo, clamped KL"]
)
def test_a_sequence_does_not_depend_on_its_neighbours(backend, name):
    params = dataclasses.replace(PARAMS[name], aggregation="token_sum")
    inputs = make_inputs([30, 700, 4])
    part = slice(30, 730)
    alone = {k: x[part] for k, x in inputs.items() if len(x) == 734}
    alone |= {"advantages": inputs["advantages"][1:2], "cu_seqlens": torch.tensor([0, 700])}
    gradients = []
    for some in (inputs, alone):
        logprobs = some["logprobs"].clone().requires_grad_()
        grpo_loss(**some | {"logprobs": logprobs}, params=params, backend=backend).loss.backward()
        gradients.append(logprobs.grad)
    assert torch.equal(gradients[0][part], gradients[1])


def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs([3, 4]) | {"params": PARAMS["grpo, all terms"], "backend": backend}

    def function(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        result = grpo_loss(**inputs | {"logprobs": logprobs})
        return result.loss, result.metrics.kl

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (compiled, function):
        logprobs = inputs["logprobs"].clone().requires_grad_()
        run(logprobs)[0].backward()
        gradients.append(logprobs.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("params", "mutant"),
    [
        pytest.param(PARAMS[name], mutant, id=f"{name}-{what}")
        for name, mutants in ({"grpo, all terms": MUTANTS} | VARIANT_MUTANTS).items()
        for what, mutant in mutants.items()
    ],
)
def test_rule_rejects_mutant(params, mutant):
    inputs = make_inputs([9, 12, 0, 3, 30, 41, 25, 60] + [4] * 16) | {"params": params}
    differentiable = {"differentiable": ["logprobs", "entropy"], "scales": scales(inputs)}
    with pytest.raises(AssertionError):
        check_op(mutant, reference, inputs, **differentiable)
