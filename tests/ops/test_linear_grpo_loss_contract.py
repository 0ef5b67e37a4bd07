"""What linear_grpo_loss promises besides its numbers: memory, work, autograd, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_inputs import composite_arguments
from linear_inputs import make_loss_inputs, run_op
from loss_inputs import PARAMS, stops_a_gradient
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import lvrpo
from lvrpo import checks
from lvrpo.backends import library
from lvrpo.ops.grpo_loss import LossParams
from lvrpo.ops.head import fused, linear

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [5, 0, 9, 1, 14]
ALL_TERMS = PARAMS["grpo, all terms"]
GSPO = PARAMS["gspo, all terms"]
HEAD = ("hidden", "weight", "bias")
needs_kernels = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)


def with_gradients(inputs: dict[str, Any], names: tuple[str, ...] = HEAD) -> dict[str, Tensor]:
    return {name: inputs[name].detach().clone().requires_grad_(name in names) for name in HEAD}


def gradients_of(inputs: dict[str, Any], scale: float = 1.0, **change: Any) -> list[Tensor]:
    leaves = with_gradients(inputs)
    (run_op(**inputs | leaves | change)[0] * scale).backward()
    return [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("params", [ALL_TERMS, GSPO], ids=["token", "gspo"])
@pytest.mark.parametrize("shared_prompts", [False, True], ids=["own rows", "shared prompts"])
def test_gradcheck(backend, params, shared_prompts):
    assert not stops_a_gradient(params)
    sizes = {"width": 3, "vocab": 7, "shared_prompts": shared_prompts}
    inputs = make_loss_inputs([3, 0, 4, 2], torch.float64, **sizes)
    inputs |= {"params": params, "memory_budget": 7 * 8 * 3, "backend": backend}
    leaves = with_gradients(inputs)

    def function(*heads: Tensor) -> Tensor:
        return run_op(**inputs | dict(zip(HEAD, heads, strict=True)))[0]

    torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=backend == "triton")


@needs_kernels
@pytest.mark.parametrize("params", [ALL_TERMS, GSPO], ids=["token", "gspo"])
def test_opcheck(params):
    inputs = make_loss_inputs(LENGTHS, width=3, vocab=7, shared_prompts=True)
    factors = [inputs.get(name) for name in HEAD]
    loss = composite_arguments(inputs, params)
    how = ([True, False, True], 0, 7, 4, "cpp")
    op = torch.ops.lvrpo.linear_grpo_loss_fwd.default
    torch.library.opcheck(op, (*factors, *loss, *how))


@pytest.mark.parametrize("params", [ALL_TERMS, GSPO], ids=["token", "gspo"])
def test_compiles_without_a_graph_break(backend, params):
    inputs = make_loss_inputs(LENGTHS, width=4, vocab=7)
    inputs |= {"params": params, "memory_budget": 7 * 4 * 8, "backend": backend}
    leaves = with_gradients(inputs)
    others = {name: x for name, x in inputs.items() if name not in HEAD}

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        result = lvrpo.linear_grpo_loss(hidden, weight, bias=bias, **others)
        return 3 * result.loss, result.metrics.kl, result.logprobs, result.entropy

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, function):
        leaves = with_gradients(inputs)
        outputs = run(*leaves.values())
        outputs[0].backward()
        results.append((*outputs, *(leaf.grad for leaf in leaves.values())))
    torch.testing.assert_close(*results)


def test_upstream_gradient_scales_the_gradients(backend):
    inputs = make_loss_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    once, twice = gradients_of(inputs), gradients_of(inputs, scale=2.0)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_gives_the_same(backend, dtype):
    inputs = make_loss_inputs(LENGTHS, dtype) | {"params": ALL_TERMS, "backend": backend}
    leaves = with_gradients(inputs)
    loss = run_op(**inputs | leaves)[0]
    results = []
    for scale in (1.0, 4.0, 1.0):
        gradients = torch.autograd.grad(loss * scale, leaves.values(), retain_graph=True)
        results.append([gradient / scale for gradient in gradients])
        del gradients
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))
    torch.autograd.grad(loss, leaves.values())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves.values())


def test_only_the_head_gets_a_gradient(backend):
    inputs = make_loss_inputs(LENGTHS) | {"params": ALL_TERMS}
    leaves = {
        k: x.requires_grad_()
        for k, x in inputs.items()
        if torch.is_tensor(x) and x.is_floating_point()
    }
    loss, *others = run_op(**inputs, backend=backend)
    loss.backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(HEAD)
    assert not any(x.requires_grad for x in others)


def test_a_tied_embedding_gets_both_gradients(backend):
    inputs = make_loss_inputs([3, 4], torch.float64, width=3, vocab=7)
    inputs |= {"params": ALL_TERMS, "memory_budget": 7 * 8 * 2, "backend": backend}

    def function(weight: Tensor) -> Tensor:
        return run_op(**inputs | {"weight": weight, "hidden": torch.tanh(weight)})[0]

    torch.autograd.gradcheck(
        function, (inputs["weight"].requires_grad_(),), fast_mode=backend == "triton"
    )


def test_autocast_is_a_cast_of_the_factors(backend):
    inputs = make_loss_inputs(LENGTHS) | {"params": ALL_TERMS, "backend": backend}
    narrow = gradients_of(inputs | {name: inputs[name].bfloat16() for name in HEAD})
    # As accelerate leaves them: fp32 hidden states, bf16 weights.
    leaves = with_gradients(inputs | {"weight": inputs["weight"].bfloat16()})
    with torch.autocast(inputs["hidden"].device.type, torch.bfloat16):
        loss = run_op(**inputs | leaves)[0]
    loss.backward()
    for name, expected in zip(HEAD, narrow, strict=True):
        assert torch.equal(leaves[name].grad, expected.to(leaves[name].dtype))


@pytest.fixture
def gemms(monkeypatch):
    """Names of the GEMMs that ran, and how many rows each saw."""
    seen: dict[str, int] = {"project": 0, "dhidden": 0, "dweight": 0}
    matmul = linear._matmul

    def count(out: Tensor, left: Tensor, right: Tensor, *, plus: Tensor | None) -> None:
        vocab, width = 61, 12
        name = {(width, vocab): "project", (vocab, width): "dhidden"}.get(tuple(right.shape))
        seen[name or "dweight"] += left.shape[0] if name else left.shape[1]
        matmul(out, left, right, plus=plus)

    monkeypatch.setattr(linear, "_matmul", count)
    return seen


@needs_kernels
@pytest.mark.parametrize("rows", [4, 14, 29])
def test_three_gemms(gemms, rows):
    inputs = make_loss_inputs(LENGTHS) | {"params": ALL_TERMS, "memory_budget": rows * 61 * 4}
    inputs |= {"mask": None, "policy_weights": None}
    gradients_of(inputs)
    assert gemms == {"project": 29, "dhidden": 29, "dweight": 29}


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "old", "projected"),
    [(14, True, 29), (9, True, 29 + 7), (4, True, 29 + 3 + 6 + 12), (4, False, 29)],
    ids=["sequences fit", "the longest does not", "two do not", "on policy"],
)
def test_a_sequence_ratio_projects_again_only_what_does_not_fit(gemms, rows, old, projected):
    inputs = make_loss_inputs(LENGTHS) | {"params": GSPO, "memory_budget": rows * 61 * 4}
    inputs |= {"mask": None, "policy_weights": None}
    gradients_of(inputs, **({} if old else {"old_logprobs": None}))
    assert gemms["dhidden"] == gemms["dweight"] == 29
    assert gemms["project"] == projected


@needs_kernels
def test_rows_without_a_gradient_are_projected_once(gemms):
    inputs = make_loss_inputs(LENGTHS) | {"params": LossParams()}
    inputs["advantages"][2] = 0.0
    pulls = inputs["mask"] & (inputs["policy_weights"] != 0)
    pulls[5:14] = False
    seen = int(inputs["mask"].sum())
    assert pulls.sum() < seen
    for params, live in ((LossParams(), int(pulls.sum())), (ALL_TERMS, seen)):
        gemms.update(dict.fromkeys(gemms, 0))
        gradients_of(inputs, params=params)
        assert gemms == {"project": seen, "dhidden": live, "dweight": live}


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "options", "again", "live"),
    [
        (29, {"top_entropy": 0.3}, 0, 29),
        (4, {"top_entropy": 0.99}, 28, 29),
        (4, {"top_entropy": 0.9}, 26, 26),
        (4, {"top_entropy": 0.3}, 9, 9),
        (4, {"entropy_threshold": 1.0}, 0, 29),
    ],
    ids=["all fit", "all but one are kept", "most are kept", "few are kept", "threshold"],
)
def test_what_a_selection_leaves_is_projected_again(gemms, rows, options, again, live):
    params = LossParams(clip_low=math.inf, clip_high=math.inf)
    inputs = make_loss_inputs(LENGTHS) | {"params": params, "memory_budget": rows * 61 * 4}
    gradients_of(inputs | {"mask": None, "policy_weights": None}, **options)
    assert gemms == {"project": 29 + again, "dhidden": live, "dweight": live}


@needs_kernels
@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), HEAD])
def test_a_frozen_input_costs_nothing(gemms, frozen):
    inputs = make_loss_inputs(LENGTHS) | {"params": ALL_TERMS, "mask": None}
    every = dict(zip(HEAD, gradients_of(inputs), strict=True))
    gemms.update(dict.fromkeys(gemms, 0))
    leaves = with_gradients(inputs, tuple(name for name in HEAD if name not in frozen))
    loss = run_op(**inputs | leaves)[0]
    if frozen != HEAD:
        loss.backward()
    assert gemms == {
        "project": 29,
        "dhidden": 29 * ("hidden" not in frozen),
        "dweight": 29 * ("weight" not in frozen),
    }
    for name in HEAD:
        if name in frozen:
            assert leaves[name].grad is None
        else:
            assert torch.equal(leaves[name].grad, every[name])


@needs_kernels
def test_no_grad_runs_the_forward_only(gemms):
    inputs = make_loss_inputs(LENGTHS) | {"params": GSPO}
    expected = run_op(**inputs)
    gemms.update(dict.fromkeys(gemms, 0))
    with torch.no_grad():
        outputs = run_op(**inputs | with_gradients(inputs))
    assert not any(x.requires_grad for x in outputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert gemms["dhidden"] == gemms["dweight"] == 0


@needs_kernels
@pytest.mark.parametrize("params", [LossParams(), GSPO], ids=["token", "gspo"])
def test_while_a_graph_is_captured_every_row_is_live(monkeypatch, params):
    inputs = make_loss_inputs(LENGTHS, torch.float64, shared_prompts=True)
    inputs |= {"params": params, "memory_budget": 61 * 8 * 4}
    inputs["advantages"][2] = 0.0
    expected = gradients_of(inputs)
    monkeypatch.setattr(fused, "is_captured", lambda _: True)
    monkeypatch.setattr(checks, "check_values", lambda _: False)
    monkeypatch.setattr(Tensor, "tolist", None)
    torch.testing.assert_close(gradients_of(inputs), expected)


@needs_kernels
def test_factors_that_stay_narrow(monkeypatch):
    # As on a GPU, whose GEMMs widen: bf16 factors and gradients of logits, fp32 sums.
    def widening(out: Tensor, left: Tensor, right: Tensor, *, plus: Tensor | None) -> None:
        product = left.float() @ right.float()
        out.copy_(product if plus is None else plus + product)

    inputs = make_loss_inputs(LENGTHS, torch.bfloat16) | {"params": ALL_TERMS}
    expected = gradients_of(inputs)
    monkeypatch.setattr(linear, "dtypes_of", lambda _: (torch.bfloat16, torch.float32))
    monkeypatch.setattr(linear, "_matmul", widening)
    for ours, wide in zip(gradients_of(inputs), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wide).float().norm() < 2**-7 * wide.float().norm()


def test_groups_end_at_cuts():
    assert fused.group_between([0], 4) == []
    assert fused.group_between([0, 2, 4, 5], 4) == [[(0, 4)], [(4, 5)]]
    assert fused.group_between([0, 6, 7], 4) == [[(0, 3), (3, 6)], [(6, 7)]]
    assert fused.group_between([0, 1, 9, 10], 4)[1] == [(1, 5), (5, 9)]


def peak_bytes(run: Any) -> int:
    """The most memory that is allocated at a time, above what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = torch.tensor([0] + [event.nbytes() for event in events])
    return int(allocated.cumsum(0).max())


@needs_kernels
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_memory_is_one_chunk_and_the_gradients(scale):
    rows, width, vocab, budget = 256, 16, 4096, 32 * 4096 * 4
    inputs = make_loss_inputs([64] * 4, width=width, vocab=vocab)
    inputs |= {"params": ALL_TERMS, "memory_budget": budget, "mask": None}
    leaves = with_gradients(inputs)

    def run() -> None:
        (run_op(**inputs | leaves)[0] * scale).backward()

    run()  # what is allocated once and kept
    for leaf in leaves.values():
        leaf.grad = None
    gradients = 4 * (rows * width + vocab * width + vocab)
    bound = budget + 1.2 * gradients + 64 * 1024
    assert peak_bytes(run) < bound < 4 * rows * vocab / 4


@needs_kernels
def test_same_bits_run_to_run():
    inputs = make_loss_inputs([40] * 6, shared_prompts=True) | {"params": GSPO}
    first, second = ((*run_op(**inputs), *gradients_of(inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BAD = {
    "token outside the vocabulary": ({"token_ids": torch.tensor([0, 9])}, r"token_ids\[1\] is 9"),
    "range beyond the vocabulary": ({"vocab_range": (0, 10)}, r"vocab_range is \(0, 10\)"),
    "row index out of range": ({"row_index": torch.tensor([0, 2])}, r"row_index\[1\] is 2"),
    "rows and tokens differ": (
        {"hidden": torch.zeros(3, 4)},
        r"token_ids has shape \(2,\), but the rows of hidden have shape \(3,\)",
    ),
    "widths differ": ({"weight": torch.zeros(9, 5)}, r"weight has shape \(9, 5\)"),
    "dtypes differ": ({"hidden": torch.zeros(2, 4).double()}, "weight is torch.float32, but"),
    "budget": ({"memory_budget": 35}, "memory_budget is 35 bytes, .* need 36"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0"),
    "NaN": ({"hidden": torch.full((2, 4), torch.nan)}, r"row 0 of|logprobs\[0\] is nan"),
    "old log-probs": ({"old_logprobs": torch.zeros(3)}, r"old_logprobs has shape \(3,\)"),
    "an old log-prob": ({"old_logprobs": torch.tensor([0.0, torch.nan])}, r"old_logprobs\[1\]"),
    "advantages": ({"advantages": torch.zeros(4)}, r"advantages has shape \(4,\)"),
    "an advantage": (
        {"advantages": torch.tensor([torch.inf, 0.0, 0.0])},
        r"advantages\[0\] is inf",
    ),
    "offsets": ({"cu_seqlens": torch.tensor([0, 1, 1, 1])}, "cu_seqlens ends at 1, expected 2"),
    "mask": ({"mask": torch.tensor([1.0, -1.0])}, r"mask\[1\] is -1.0"),
    "weight": ({"policy_weights": torch.tensor([1.0, -1.0])}, r"policy_weights\[1\] is -1.0"),
    "no reference": ({"params": LossParams(beta=0.1)}, "ref_logprobs is None, but beta is 0.1"),
    "denominator": ({"denominator": 0.0}, "denominator is 0.0"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(9, 4),
        "token_ids": torch.tensor([0, 1]),
        "old_logprobs": torch.zeros(2),
        "advantages": torch.ones(3),
        "cu_seqlens": torch.tensor([0, 2, 2, 2]),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=f"^linear_grpo_loss: .*({message})"):
        lvrpo.linear_grpo_loss(**arguments | change)
