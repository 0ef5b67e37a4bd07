from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from fused_inputs import HEADS, VOCAB, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import loss_scales, make_loss_inputs, run_op, run_reference
from loss_inputs import PARAMS, STATISTICS
from mutants.linear_grpo_loss import MUTANTS

from lvrpo.backends import library
from lvrpo.ops.grpo_loss import LOSS_PRESETS, LossParams
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [5, 0, 9, 1, 14]
#: For Triton's interpreter, which takes milliseconds per program.
FEW = [2, 0, 3, 1]
ALL_TERMS = PARAMS["grpo, all terms"]
#: Bounds that leave sequence ratios something to do at this length.
WIDE = {"clip_low": 0.2, "clip_high": 0.3}
needs_kernels = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)


def preset(name: str) -> LossParams:
    changes: dict[str, Any] = {"max_length": 20} if name == "dr_grpo" else {}
    return LossParams.preset(name, **changes | (WIDE if name in ("gspo", "luspo") else {}))


def budget(inputs: dict[str, Any], rows: int) -> int:
    return rows * len(inputs["weight"]) * (8 if inputs["weight"].dtype == torch.float64 else 4)


def lengths_for(backend: str) -> list[int]:
    return FEW if backend == "triton" else LENGTHS


def check(op: Any, inputs: dict[str, Any]) -> None:
    differentiable = [name for name in ("hidden", "weight", "bias") if name in inputs]
    scales = loss_scales(inputs)
    check_op(op, run_reference, inputs, differentiable=differentiable, scales=scales)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_matches_reference(backend, params):
    inputs = make_loss_inputs(lengths_for(backend)) | {"params": params}
    inputs["memory_budget"] = budget(inputs, len(inputs["hidden"]) // 4)
    check(functools.partial(run_op, backend=backend), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params", [ALL_TERMS, PARAMS["gspo, all terms"]], ids=["token", "gspo"])
def test_other_dtypes(backend, params, dtype):
    inputs = make_loss_inputs(lengths_for(backend), dtype, shared_prompts=True)
    inputs |= {"params": params, "memory_budget": budget(inputs, len(inputs["hidden"]) // 2)}
    check(functools.partial(run_op, backend=backend), inputs)


@pytest.mark.parametrize("shared_prompts", [False, True], ids=["own rows", "shared prompts"])
@pytest.mark.parametrize("name", LOSS_PRESETS)
@needs_kernels
def test_every_preset_in_chunks_of_any_size(name, shared_prompts):
    inputs = make_loss_inputs(LENGTHS, torch.float64, shared_prompts=shared_prompts)
    inputs |= {"params": preset(name), "temperature": 0.8}
    inputs["advantages"][2] = 0.0
    for rows in (1, 4, 13, 29):
        inputs["memory_budget"] = budget(inputs, rows)
        check(run_op, inputs)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", ["grpo", "gspo", "vespo"])
@needs_kernels
def test_the_kl_of_a_sequence_in_chunks_of_any_size(name, on_policy):
    # Its slope through the factor is known with the last log-prob of the sequence, on policy too.
    head, lengths = HEADS["linear"], [3, 0, 6, 1, 4]
    batch = make_batch(head, lengths)
    if on_policy:
        batch.inputs["old_logprobs"] = None
    params = LossParams.preset(name, beta=0.5, kl_factor="sequence_ratio")
    loss, expected = head.plain(batch.factors, **batch.plainly, params=params)
    for rows in (1, 4, 14):
        by = {"params": params, "memory_budget": rows * VOCAB * 8}
        result, gradients = head.run(batch.factors, **batch.tokens, **by)
        torch.testing.assert_close(result.loss.detach(), loss)
        torch.testing.assert_close(gradients, expected)


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    rows=st.integers(1, 20),
    shared=st.booleans(),
    dead=st.integers(0, 63),
    name=st.sampled_from(["grpo", "gspo", "rloo"]),
)
@settings(max_examples=30, deadline=None)
@needs_kernels
def test_any_lengths_and_chunks(lengths, rows, shared, dead, name):
    inputs = make_loss_inputs(lengths, torch.float64, width=4, vocab=9, shared_prompts=shared)
    inputs |= {"params": preset(name), "memory_budget": rows * 9 * 8, "level": "sequence"}
    inputs["advantages"] *= torch.tensor([dead >> i & 1 for i in range(len(lengths))])
    check(run_op, inputs)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"vocab_range": (7, 50)}], ids=str)
@pytest.mark.parametrize("params", [ALL_TERMS, PARAMS["gspo, all terms"]], ids=["token", "gspo"])
def test_softmax_options(backend, options, params):
    inputs = make_loss_inputs(LENGTHS, vocab=61)
    inputs["token_ids"] = torch.randint(7, 50, (29,))
    inputs |= options | {"params": params, "memory_budget": budget(inputs, 6)}
    check(functools.partial(run_op, backend=backend), inputs)


def test_a_range_for_each_row(backend):
    inputs = make_loss_inputs(LENGTHS) | {"params": ALL_TERMS}
    inputs["vocab_range"] = torch.tensor([[0, 20], [20, 61]])[torch.arange(29) % 2]
    inputs["token_ids"] = inputs["vocab_range"][:, 1] - 3
    inputs["advantages"][0] = 0.0
    check(functools.partial(run_op, backend=backend), inputs | {"params": LossParams()})
    check(functools.partial(run_op, backend=backend), inputs)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_denominator(backend, as_tensor):
    inputs = make_loss_inputs(LENGTHS, torch.float64) | {"params": ALL_TERMS, "backend": backend}
    results = []
    for denominator in (len(LENGTHS), 3.0):
        hidden = inputs["hidden"].clone().requires_grad_()
        given = torch.tensor(float(denominator)) if as_tensor else denominator
        loss, statistics, *_ = run_op(**inputs | {"hidden": hidden, "denominator": given})
        loss.backward()
        results.append(torch.cat([loss.detach()[None], statistics[:1], hidden.grad.flatten()]))
    torch.testing.assert_close(results[1], results[0] * (len(LENGTHS) / 3.0))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_ignored_tokens_are_masked(backend, name):
    inputs = make_loss_inputs(LENGTHS) | {"params": preset(name), "backend": backend}
    mask = torch.arange(29) % 3 != 0
    ids = torch.where(mask, inputs["token_ids"], -5)
    results = []
    for change in ({"mask": mask}, {"token_ids": ids, "mask": None}):
        hidden = inputs["hidden"].clone().requires_grad_()
        outputs = run_op(**inputs | change | {"hidden": hidden, "ignore_index": -5})
        outputs[0].backward()
        results.append((*outputs, hidden.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_masked_rows_may_hold_anything(name):
    inputs = make_loss_inputs(LENGTHS) | {"params": preset(name)}
    clean = run_op(**inputs)
    masked = ~inputs["mask"]
    assert masked.any()
    inputs["hidden"][masked] = torch.nan
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_()
    loss, *others = run_op(**inputs)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip((loss, *others), clean, strict=True))
    assert (inputs["hidden"].grad[masked] == 0).all()
    assert inputs["weight"].grad.isfinite().all()


@pytest.mark.parametrize("mask", ["all", "none"])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_no_row_has_a_gradient(backend, mask, name):
    inputs = make_loss_inputs(LENGTHS) | {"params": preset(name), "backend": backend}
    inputs["mask"] = torch.full((29,), mask == "none")
    inputs["advantages"] = torch.zeros(len(LENGTHS)) if mask == "none" else inputs["advantages"]
    heads = [inputs[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    loss, statistics, logprobs, entropy = run_op(**inputs)
    loss.backward()
    assert all((head.grad == 0).all() for head in heads)
    active = statistics[STATISTICS.index("active_tokens")]
    assert float(active) == (29 if mask == "none" else 0)
    assert ((logprobs != 0) == (mask == "none")).all()
    assert ((entropy != 0) == (mask == "none")).all()


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no sequence", "empty ones"])
def test_empty_input(backend, lengths):
    heads = [torch.randn(0, 4), torch.randn(9, 4), torch.randn(9)]
    hidden, weight, bias = (head.requires_grad_() for head in heads)
    nothing, cu_seqlens = torch.zeros(0), torch.zeros(len(lengths) + 1, dtype=torch.int64)
    loss, *_ = run_op(
        hidden=hidden,
        weight=weight,
        bias=bias,
        token_ids=nothing.long(),
        old_logprobs=nothing,
        advantages=torch.zeros(len(lengths)),
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(torch.equal(head.grad, torch.zeros_like(head)) for head in heads)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    inputs = make_loss_inputs(LENGTHS, dtype, shared_prompts=True, temperature=0.7)
    with pytest.raises(AssertionError):
        check(mutant, inputs | {"params": ALL_TERMS})
