from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import gradient_scales, logit_scale, make_head, ranges
from mutants.linear_logprobs import MUTANTS
from torch import Tensor

import lvrpo
from lvrpo.backends import library
from lvrpo.dtypes import numbers
from lvrpo.ops.head import linear
from lvrpo.reference.linear_logprobs import linear_logprobs
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

# rows, hidden width, vocabulary, tokens or None for one per row
SHAPES = {
    "one row": (1, 4, 3, None),
    "odd sizes": (7, 13, 101, None),
    "rows shared by a group": (4, 8, 67, 20),
    "more rows than tokens": (9, 5, 33, 3),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_kernels = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)


def make_inputs(
    rows: int, width: int, vocab: int, tokens: int | None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    inputs: dict[str, Any] = make_head(rows, width, vocab, dtype)
    count = rows if tokens is None else tokens
    inputs["token_ids"] = torch.randint(0, vocab, (count,))
    if tokens is not None:
        inputs["row_index"] = torch.randint(0, rows, (count,))
    return inputs | {"return_entropy": True}


def row_bytes(inputs: dict[str, Any]) -> int:
    return inputs["weight"].shape[0] * (8 if inputs["weight"].dtype == torch.float64 else 4)


def reference(**inputs: Any) -> Any:
    inputs.pop("memory_budget", None)
    return linear_logprobs(**ranges(inputs, len(inputs["hidden"])))


def scales(inputs: dict[str, Any]) -> dict[str, Any]:
    _, largest = logit_scale(inputs)
    tokens, rows = len(inputs["token_ids"]), len(inputs["hidden"])
    by_logprob = torch.full((tokens,), 1.0 / max(tokens, 1))
    by_entropy = torch.full((rows,), 1.0 / max(rows, 1))
    gradients = gradient_scales(inputs, by_logprob, by_entropy)
    return {"out0": largest, "out1": largest, **gradients}


def check(op: Any, inputs: dict[str, Any]) -> None:
    differentiable = [name for name in ("hidden", "weight", "bias") if name in inputs]
    check_op(op, reference, inputs, differentiable=differentiable, scales=scales(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}], ids=str
)
def test_matches_reference(backend, shape, dtype, options):
    inputs = make_inputs(*shape, dtype) | options
    inputs["memory_budget"] = 3 * row_bytes(inputs)
    check(functools.partial(lvrpo.linear_logprobs, backend=backend), inputs)


def test_without_bias(backend):
    inputs = make_inputs(7, 13, 101, None) | {"memory_budget": 2000}
    del inputs["bias"]
    check(functools.partial(lvrpo.linear_logprobs, backend=backend), inputs)


def test_a_narrow_weight_is_converted_in_tiles(monkeypatch):
    monkeypatch.setitem(linear.TILE_BYTES, "cpu", 4 * 13 * 10)
    check(lvrpo.linear_logprobs, make_inputs(7, 13, 101, None, torch.bfloat16))


@pytest.mark.parametrize("per_row", [False, True], ids=["pair", "per row"])
def test_vocab_range(backend, per_row):
    inputs = make_inputs(6, 8, 90, 12)
    low = torch.tensor([0, 20, 25, 0, 7, 89]) if per_row else torch.full((6,), 11)
    high = torch.tensor([90, 70, 26, 1, 80, 90]) if per_row else torch.full((6,), 60)
    inputs["vocab_range"] = torch.stack([low, high], dim=1) if per_row else (11, 60)
    inputs["token_ids"] = (high - 1)[inputs["row_index"]]
    inputs["memory_budget"] = 4 * 90 * 2
    op = functools.partial(lvrpo.linear_logprobs, backend=backend)
    check(op, inputs)
    weight = inputs["weight"].clone().requires_grad_()
    op(**inputs | {"weight": weight})[0].sum().backward()
    outside = (torch.arange(90) < low.min()) | (torch.arange(90) >= high.max())
    assert (weight.grad[outside] == 0).all()


def test_a_pair_multiplies_only_its_slice_of_the_weight():
    inputs = make_inputs(6, 8, 90, None)
    inputs["weight"][:11], inputs["weight"][60:] = torch.nan, torch.nan
    inputs["token_ids"] = torch.randint(11, 60, (6,))
    logprobs, _ = lvrpo.linear_logprobs(**inputs, vocab_range=(11, 60), memory_budget=4 * 49)
    assert logprobs.isfinite().all()


@given(rows=st.integers(1, 12), most=st.integers(1, 14), grouped=st.booleans(), seed=st.integers(0))
@settings(max_examples=40, deadline=None)
@needs_kernels
def test_any_chunks_give_the_same(rows, most, grouped, seed):
    tokens = seed % 20 if grouped else None
    inputs = make_inputs(rows, 5, 17, tokens, torch.float64)
    check(lvrpo.linear_logprobs, inputs | {"memory_budget": most * 17 * 8})


@needs_kernels
def test_a_log_prob_does_not_depend_on_the_rows_beside_it():
    # With whole numbers every sum of products is exact in any order: what is left is ours.
    inputs = make_inputs(16, 8, 300, None)
    for name in ("hidden", "weight", "bias"):
        inputs[name] = (4 * inputs[name]).round() / 4
    whole = lvrpo.linear_logprobs(**inputs)
    for most in (1, 3, 5, 16):
        chunked = lvrpo.linear_logprobs(**inputs, memory_budget=most * 1200)
        assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_ignored_token_is_zero_and_has_no_gradient(backend):
    hidden = torch.randn(3, 4, requires_grad=True)
    ids = torch.tensor([4, -7, 7])
    logprobs = lvrpo.linear_logprobs(
        hidden, torch.randn(9, 4), ids, ignore_index=-7, memory_budget=72, backend=backend
    )
    logprobs.sum().backward()
    assert logprobs[1] == 0
    assert (hidden.grad[1] == 0).all()
    assert (hidden.grad[0] != 0).any()


@pytest.mark.parametrize("vocab", [1, 70])
def test_empty_input(backend, vocab):
    hidden = torch.randn(0, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    logprobs, entropy = lvrpo.linear_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.int64), return_entropy=True, backend=backend
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert hidden.grad.shape == hidden.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_non_contiguous_inputs_and_stride_0_gradient(backend):
    base, weight = torch.randn(4, 10), torch.randn(4, 60)
    ids = torch.randint(0, 30, (10,))
    gradients = []
    for apart in (True, False):
        hidden, columns = base.clone().requires_grad_(), weight.clone().requires_grad_()
        views = hidden.t(), columns[:, ::2].t()
        if not apart:
            views = tuple(view.contiguous() for view in views)
        logprobs = lvrpo.linear_logprobs(*views, ids, memory_budget=480, backend=backend)
        logprobs.backward(torch.ones(1).expand(10))
        gradients.append((hidden.grad, columns.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient(backend, frozen):
    inputs = make_inputs(7, 13, 101, None) | {"memory_budget": 2000}
    leaves = {
        k: inputs[k].clone().requires_grad_(k != frozen) for k in ("hidden", "weight", "bias")
    }
    every = {k: inputs[k].clone().requires_grad_() for k in leaves}
    for chosen in (leaves, every):
        lvrpo.linear_logprobs(**inputs | chosen, backend=backend)[0].sum().backward()
    assert leaves[frozen].grad is None
    for name in leaves.keys() - {frozen}:
        assert torch.equal(leaves[name].grad, every[name].grad)


def test_a_tied_embedding_gets_both_gradients(backend):
    weight = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 5, (3,))

    def function(weight: Tensor) -> Tensor:
        hidden = torch.tanh(weight[ids])
        return lvrpo.linear_logprobs(
            hidden, weight, ids.roll(1), memory_budget=5 * 8 * 2, backend=backend
        )

    torch.autograd.gradcheck(function, (weight,), fast_mode=backend == "triton")


def test_gradcheck(backend):
    inputs = make_inputs(3, 2, 5, 4, torch.float64)
    options = {"temperature": 0.8, "softcap": 4.0, "memory_budget": 5 * 8 * 2, "backend": backend}
    heads = [inputs.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return lvrpo.linear_logprobs(hidden, weight, bias=bias, **inputs, **options)

    torch.autograd.gradcheck(function, heads, fast_mode=backend == "triton")


@needs_kernels
@pytest.mark.parametrize("tokens", [None, 9])
def test_opcheck(tokens):
    inputs = make_inputs(5, 4, 11, tokens)
    tensors = [inputs.get(k) for k in ("hidden", "weight", "bias", "token_ids", "row_index")] + [
        None
    ]
    given, how = numbers(0.9, 0.0, -1), (0, 11, 2, "cpp")
    forward = torch.ops.lvrpo.linear_logprobs_fwd
    arguments = (*tensors, given, True, True, *how)
    torch.library.opcheck(forward.default, arguments)
    logprobs, lse, entropy, _ = forward(*arguments)
    torch.library.opcheck(
        torch.ops.lvrpo.linear_logprobs_bwd.default,
        (logprobs, entropy, *tensors, given, lse, entropy, [True, False, True], *how),
    )


def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs(6, 4, 17, 9) | {"memory_budget": 17 * 4 * 2, "backend": backend}
    heads = [inputs.pop(name) for name in ("hidden", "weight", "bias")]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logprobs, entropy = lvrpo.linear_logprobs(hidden, weight, bias=bias, **inputs)
        return logprobs.sum() + entropy.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (compiled, function):
        leaves = [x.clone().requires_grad_() for x in heads]
        run(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


def test_autocast_is_a_cast_of_the_factors(backend):
    inputs = make_inputs(7, 13, 101, None) | {"backend": backend}
    heads = {name: inputs[name] for name in ("hidden", "weight", "bias")}
    narrow = {name: x.bfloat16().requires_grad_() for name, x in heads.items()}
    # As accelerate leaves them: fp32 hidden states, bf16 weights.
    given = heads | {"weight": heads["weight"].bfloat16()}
    given = {name: x.clone().requires_grad_() for name, x in given.items()}
    expected = lvrpo.linear_logprobs(**inputs | narrow)
    with torch.autocast(inputs["hidden"].device.type, torch.bfloat16):
        ours = lvrpo.linear_logprobs(**inputs | given)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for results in (ours, expected):
        sum(x.sum() for x in results).backward()
    for name, x in given.items():
        assert x.grad.dtype == x.dtype
        assert torch.equal(x.grad, narrow[name].grad.to(x.dtype))
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16, but hidden"):
        lvrpo.linear_logprobs(**inputs | given)
    with torch.autocast(inputs["hidden"].device.type, torch.bfloat16):
        wide = lvrpo.linear_logprobs(**inputs | {name: x.double() for name, x in heads.items()})
    assert wide[0].dtype == torch.float64


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    with pytest.raises(AssertionError):
        check(mutant, make_inputs(8, 12, 203, 24, dtype) | {"temperature": 0.7})


BAD = {
    "token outside the vocabulary": ({"token_ids": torch.tensor([0, 9])}, r"token_ids\[1\] is 9"),
    "token outside its range": ({"vocab_range": (2, 5)}, r"token_ids\[0\] is 0.*range"),
    "range beyond the vocabulary": ({"vocab_range": (0, 10)}, r"vocab_range is \(0, 10\)"),
    "empty range": ({"vocab_range": (3, 3)}, r"vocab_range is \(3, 3\)"),
    "row index out of range": ({"row_index": torch.tensor([0, 2])}, r"row_index\[1\] is 2"),
    "rows and tokens differ": (
        {"token_ids": torch.tensor([0])},
        r"shape \(1,\), .* of hidden have shape \(2,\)",
    ),
    "widths differ": (
        {"weight": torch.zeros(9, 5)},
        r"weight has shape \(9, 5\), expected \[V, 4\]",
    ),
    "dtypes differ": ({"weight": torch.zeros(9, 4).bfloat16()}, "weight is torch.bfloat16"),
    "no vocabulary": ({"weight": torch.zeros(0, 4)}, r"weight has shape \(0, 4\)"),
    "integer hidden": ({"hidden": torch.zeros(2, 4).long()}, "hidden is torch.int64"),
    "bias of another length": ({"bias": torch.zeros(8)}, r"bias has shape \(8,\), expected \[9\]"),
    "bias of another dtype": ({"bias": torch.zeros(9).double()}, "bias is torch.float64"),
    "budget": ({"memory_budget": 35}, "memory_budget is 35 bytes, .* need 36"),
    "temperature zero": ({"temperature": 0.0}, "temperature is 0.0"),
    "negative softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "NaN": ({"hidden": torch.tensor([[0.0] * 4, [torch.nan] * 4])}, "row 1 of"),
    "infinite bias": ({"bias": torch.full((9,), torch.inf)}, "row 0 of"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(9, 4),
        "token_ids": torch.tensor([0, 1]),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=f"^linear_logprobs: .*{message}"):
        lvrpo.linear_logprobs(**arguments | change)
