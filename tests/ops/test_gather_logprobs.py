from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mutants.gather_logprobs import MUTANTS
from torch import Tensor

import lvrpo
from lvrpo.dtypes import numbers
from lvrpo.reference.gather_logprobs import gather_logprobs as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")

# rows, vocabulary, tokens or None for one per row
SHAPES = {
    "one row, tiny vocabulary": (1, 3, None),
    "vocabulary not a multiple of any block": (5, 1003, None),
    "more than one block per row": (3, 5000, None),
    "rows shared by a group": (4, 129, 32),
    "more rows than tokens": (9, 64, 3),
}


def make_inputs(rows: int, vocab: int, tokens: int | None, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(rows * vocab)
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    count = rows if tokens is None else tokens
    token_ids = torch.randint(0, vocab, (count,))
    inputs: dict[str, Any] = {"logits": logits, "token_ids": token_ids}
    inputs |= {"return_entropy": True, "return_sum_squares": True}
    if tokens is not None:
        inputs["row_index"] = torch.randint(0, rows, (count,))
    return inputs


def scales(inputs: dict[str, Any]) -> dict[str, Tensor | float]:
    # A log-prob is a difference of two numbers of the size of the scaled logits, so p, which is
    # exp(z - lse), has a relative error of that many ulps. A gradient adds up p times upstream
    # values: 1 / tokens for each token of the row, and log p / rows for the entropy.
    cap = inputs.get("softcap", torch.inf)
    z = inputs["logits"].double()
    z = (z if cap == torch.inf else cap * torch.tanh(z / cap)) / inputs.get("temperature", 1.0)
    largest = 1 + 2 * float(z.abs().max())
    if inputs.get("vocab_range") is not None:
        low, high = inputs["vocab_range"].T[:, :, None]
        column = torch.arange(z.shape[1], device=z.device)
        z = z.masked_fill((column < low) | (column >= high), -torch.inf)
    ids = inputs["token_ids"]
    rows = inputs.get("row_index", torch.arange(len(z), device=z.device))
    p = z.softmax(dim=1)
    upstream = rows.bincount(minlength=len(z))[:, None] / len(ids) + largest / len(z)
    dlogits = p * largest * upstream
    dlogits[rows, ids] += largest / len(ids)
    squares = p.square().sum(dim=1) * largest
    return {"out0": largest, "out1": largest, "out2": squares, "dlogits": dlogits}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}], ids=str
)
def test_matches_reference(backend, shape, dtype, options):
    inputs = make_inputs(*shape, dtype) | options
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    check_op(op, reference, inputs, differentiable=["logits"], scales=scales(inputs))


def test_vocab_range(backend):
    inputs = make_inputs(6, 300, None, torch.float32)
    low = torch.tensor([0, 100, 250, 0, 7, 299])
    high = torch.tensor([300, 200, 251, 1, 290, 300])
    inputs["vocab_range"] = torch.stack([low, high], dim=1)
    inputs["token_ids"] = low
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    check_op(op, reference, inputs, differentiable=["logits"], scales=scales(inputs))
    logits = inputs["logits"].clone().requires_grad_()
    op(**inputs | {"logits": logits})[0].sum().backward()
    outside = (torch.arange(300) < low[:, None]) | (torch.arange(300) >= high[:, None])
    assert (logits.grad[outside] == 0).all()


def test_ignored_token_is_zero_and_has_no_gradient(backend):
    logits = torch.randn(3, 50, requires_grad=True)
    logprobs = lvrpo.gather_logprobs(logits, torch.tensor([4, -100, 7]), backend=backend)
    logprobs.sum().backward()
    assert logprobs[1] == 0
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0] != 0).any()


def test_a_target_of_probability_0_can_be_masked_out_afterwards(backend):
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]], requires_grad=True)
    logprobs, entropy = lvrpo.gather_logprobs(
        logits, torch.tensor([2, 1]), return_entropy=True, backend=backend
    )
    assert logprobs[0] == -torch.inf
    (gradient,) = torch.autograd.grad(logprobs, logits, torch.tensor([0.0, 1.0]), retain_graph=True)
    assert (gradient[0] == 0).all()
    assert gradient[1].isfinite().all()
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{"vocab_range": (0, 2)}, {"softcap": 5.0}], ids=str)
def test_an_infinite_logit_that_the_softmax_does_not_see_is_accepted(backend, options):
    logits = torch.tensor([[0.0, 1.0, torch.inf]])
    logprobs = lvrpo.gather_logprobs(logits, torch.tensor([1]), backend=backend, **options)
    assert logprobs.isfinite().all()


def test_large_common_offset_keeps_its_digits(backend):
    logits = torch.randn(4, 200)
    ids = torch.randint(0, 200, (4,))
    shifted = (logits.double() + 4096).float()
    exact = reference(shifted.double(), ids)
    ours = lvrpo.gather_logprobs(shifted, ids, backend=backend)
    assert (ours - exact).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [1, 700])
def test_empty_input(backend, vocab):
    logits = torch.randn(0, vocab, requires_grad=True)
    logprobs, entropy = lvrpo.gather_logprobs(
        logits, torch.zeros(0, dtype=torch.int64), return_entropy=True, backend=backend
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert logits.grad.shape == logits.shape


def test_non_contiguous_logits_and_stride_0_gradient(backend):
    base = torch.randn(5, 400, requires_grad=True)
    ids = torch.randint(0, 100, (5,))
    ours = lvrpo.gather_logprobs(base[:, ::4], ids, backend=backend)
    ours.backward(torch.ones(1).expand(5))
    ours_gradient, base.grad = base.grad, None
    reference(base[:, ::4], ids).sum().backward()
    torch.testing.assert_close(ours_gradient, base.grad)


def test_gradcheck(backend):
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 0, 10, 5, 5])
    rows = torch.tensor([0, 1, 1, 3, 3])

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return lvrpo.gather_logprobs(
            x, ids, rows, temperature=0.8, softcap=4.0, return_entropy=True, backend=backend
        )

    torch.autograd.gradcheck(function, (logits,))


def test_opcheck():
    logits = torch.randn(4, 11)
    ids = torch.tensor([3, 0, 10, 5])
    given = numbers(1.0, 0.0, -100)
    torch.library.opcheck(
        torch.ops.lvrpo.gather_logprobs_fwd.default,
        (logits, ids, None, None, given, True, False),
    )
    _, lse, entropy, _ = torch.ops.lvrpo.gather_logprobs_fwd(
        logits, ids, None, None, given, True, False
    )
    arguments = (
        torch.empty(4, 11),
        torch.randn(4),
        torch.randn(4),
        logits,
        ids,
        None,
        None,
        lse,
        entropy,
        given,
    )
    torch.library.opcheck(torch.ops.lvrpo.gather_logprobs_bwd.default, arguments)


def test_compiles_without_a_graph_break(backend):
    def function(x: Tensor) -> Tensor:
        logprobs, entropy = lvrpo.gather_logprobs(
            x, torch.tensor([3, 0]), return_entropy=True, backend=backend
        )
        return (logprobs + entropy).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = torch.randn(2, 17, requires_grad=True)
    eager = ours.detach().clone().requires_grad_()
    compiled(ours).backward()
    function(eager).backward()
    torch.testing.assert_close(ours.grad, eager.grad)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    inputs = make_inputs(8, 1003, 24, dtype) | {"temperature": 0.7}
    with pytest.raises(AssertionError):
        check_op(mutant, reference, inputs, differentiable=["logits"], scales=scales(inputs))


BAD = {
    "token outside the vocabulary": ({"token_ids": torch.tensor([0, 9])}, r"token_ids\[1\] is 9"),
    "negative token": ({"token_ids": torch.tensor([-1, 0])}, r"token_ids\[0\] is -1"),
    "token outside its range": ({"vocab_range": (2, 5)}, r"token_ids\[0\] is 0.*range"),
    "range beyond the vocabulary": ({"vocab_range": (0, 10)}, r"vocab_range\[0\] is \[0, 10\]"),
    "row index out of range": ({"row_index": torch.tensor([0, 2])}, r"row_index\[1\] is 2"),
    "rows and tokens differ": (
        {"token_ids": torch.tensor([0])},
        r"shape \(1,\), .* of logits have shape \(2,\)",
    ),
    "float tokens": ({"token_ids": torch.tensor([0.0, 1.0])}, "token_ids is torch.float32"),
    "integer logits": ({"logits": torch.zeros(2, 9, dtype=torch.int64)}, "logits is torch.int64"),
    "temperature zero": ({"temperature": 0.0}, "temperature is 0.0"),
    "temperature infinite": ({"temperature": torch.inf}, "temperature is inf"),
    "softcap infinite": ({"softcap": torch.inf}, "softcap is inf"),
    "no columns": ({"logits": torch.zeros(2, 0)}, r"logits has shape \(2, 0\)"),
    "nothing but -inf in range": (
        {"logits": torch.tensor([[-torch.inf, -torch.inf, 1.0]] * 2), "vocab_range": (0, 2)},
        "row 0 of logits has no finite log-sum-exp .its largest value is -inf",
    ),
    "negative softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "+inf": ({"logits": torch.tensor([[0.0] * 9, [torch.inf] * 9])}, "row 1 of logits"),
    "NaN": ({"logits": torch.tensor([[torch.nan] * 9, [0.0] * 9])}, "row 0 of logits"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    arguments = {"logits": torch.zeros(2, 9), "token_ids": torch.tensor([0, 1]), "backend": backend}
    with pytest.raises(ValueError, match=message):
        lvrpo.gather_logprobs(**arguments | change)


FORWARD = {
    "logits": torch.zeros(2, 4),
    "token_ids": torch.tensor([-100, 1]),
    "row_index": None,
    "vocab_range": None,
}
BACKWARD = {
    "dlogits": torch.empty(2, 4),
    "dlogprobs": torch.ones(2),
    "dentropy": torch.ones(2),
} | FORWARD
BACKWARD |= {"lse": torch.ones(2), "entropy": torch.ones(2)}
FAR = 10**9
UNFIT = {
    "token": {"token_ids": torch.tensor([0, FAR])},
    "row": {"row_index": torch.tensor([0, FAR])},
    "row of an ignored token": {"row_index": torch.tensor([-FAR, 0])},
    "too many tokens": {"token_ids": torch.zeros(3, dtype=torch.int64)},
    "vocab_range": {"vocab_range": torch.tensor([[0, FAR], [0, 4]])},
    "vocab_range for one row": {"vocab_range": torch.tensor([[0, 4]])},
    "one-dimensional logits": {"logits": torch.zeros(4)},
    "dlogprobs": {"dlogprobs": torch.ones(1)},
    "dentropy": {"dentropy": torch.ones(1)},
    "dentropy without entropy": {"entropy": None},
    "lse": {"lse": torch.ones(1)},
    "lse of another dtype": {"lse": torch.ones(2, dtype=torch.float64)},
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT.keys())
def test_the_op_reads_and_writes_no_memory_that_is_not_there(change):
    given = numbers(1.0, 0.0, -100)
    if change.keys() <= FORWARD.keys():
        with pytest.raises(RuntimeError):
            torch.ops.lvrpo.gather_logprobs_fwd(*(FORWARD | change).values(), given, True, False)
    with pytest.raises(RuntimeError):
        torch.ops.lvrpo.gather_logprobs_bwd(*(BACKWARD | change).values(), given)
