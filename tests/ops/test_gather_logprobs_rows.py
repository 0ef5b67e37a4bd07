"""Rows that no token uses, tokens that fit no row, rows at the ends of a dtype, forms of input."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.gather_logprobs import UNGUARDED
from ops.test_gather_logprobs import make_inputs
from plain_softmax import softmax_terms
from runnable import ON_HOST
from torch import Tensor

import lvrpo
from lvrpo.testing import check_against_plain

FULL = {"return_entropy": True, "return_sum_squares": True}
IGNORED = -100
#: What a row that no token uses may hold, in every column or in one.
ANYTHING = [math.nan, math.inf, -math.inf, 1e38, -1e38, 3e38]


def poisoned(
    seed: int, value: float, whole: bool, shared: bool, ranged: bool, dtype: torch.dtype
) -> tuple[dict[str, Any], Tensor]:
    """Inputs, some rows of which are poisoned, and the indices of the others."""
    torch.manual_seed(seed)
    rows, vocab = 6, 37
    used = torch.rand(rows) < 0.6
    used[seed % rows], used[(seed + 1) % rows] = True, False
    inputs: dict[str, Any] = {"logits": (torch.randn(rows, vocab) * 3).to(dtype)}
    if whole:
        inputs["logits"][~used] = value
    else:
        inputs["logits"][~used, seed % vocab] = value
    low = torch.zeros(rows, dtype=torch.int64)
    high = torch.full((rows,), vocab)
    if ranged:
        low, high = low + torch.arange(rows) * 3, high - torch.arange(rows) * 2
        inputs["vocab_range"] = torch.stack([low, high], dim=1)
    of = torch.arange(rows)
    if shared:
        of = torch.randint(0, rows, (15,))
        inputs["row_index"] = of
    ids = low[of] + (torch.rand(len(of)) * (high - low)[of]).long()
    inputs["token_ids"] = torch.where(used[of], ids, IGNORED)
    keep = torch.zeros(rows, dtype=torch.bool)
    keep[of[inputs["token_ids"] != IGNORED]] = True
    return inputs, keep.nonzero()[:, 0]


def upstream(inputs: dict[str, Any], keep: Tensor, *, everywhere: bool = False) -> list[Tensor]:
    """Gradients by log-probs and entropies, 0 by what nobody uses."""
    tokens, rows = len(inputs["token_ids"]), len(inputs["logits"])
    by_entropy = torch.zeros(rows)
    by_entropy[slice(None) if everywhere else keep] = 0.3
    return [torch.linspace(-1, 2, tokens), by_entropy]


def run(op, inputs: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    leaf = inputs["logits"].detach().clone().requires_grad_()
    logprobs, entropy, squares = op(**inputs | FULL | {"logits": leaf})
    scaled = [g.to(x) for g, x in zip(upstream, (logprobs, entropy), strict=True)]
    (gradient,) = torch.autograd.grad((logprobs, entropy), leaf, scaled)
    return [logprobs.detach(), entropy.detach(), squares, gradient]


def deleted(
    inputs: dict[str, Any], keep: Tensor, upstream: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The same by the formula, as if the rows that nobody uses and their tokens were not there."""
    leaf = inputs["logits"][keep].to(dtype).requires_grad_()
    ids = inputs["token_ids"]
    of = inputs.get("row_index", torch.arange(len(ids), device=ids.device))
    asking = ids != IGNORED
    position = torch.full((len(inputs["logits"]),), -1, device=ids.device)
    position[keep] = torch.arange(len(keep), device=ids.device)
    options = {k: inputs[k] for k in ("temperature", "softcap") if k in inputs}
    if "vocab_range" in inputs:
        options["vocab_range"] = inputs["vocab_range"][keep]
    logprobs, entropy, squares = softmax_terms(leaf, ids[asking], position[of[asking]], **options)
    total = (logprobs * upstream[0].to(leaf)[asking]).sum()
    total = total + (entropy * upstream[1].to(leaf)[keep]).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return [logprobs.detach(), entropy.detach(), squares, gradient]


def check_rows(op, inputs: dict[str, Any], keep: Tensor, name: str = "") -> None:
    given = upstream(inputs, keep)
    ours = run(op, inputs, given)
    gold, plain = (deleted(inputs, keep, given, dtype) for dtype in (torch.float64, ours[0].dtype))
    asking = inputs["token_ids"] != IGNORED
    assert (ours[0][~asking] == 0).all()
    others = torch.ones(len(inputs["logits"]), dtype=torch.bool, device=keep.device)
    others[keep] = False
    assert (ours[3][others] == 0).all()
    found = [ours[0][asking], *(x[keep] for x in ours[1:])]
    largest = 1 + 2 * float(inputs["logits"][keep].double().abs().max()) / inputs.get(
        "temperature", 1.0
    )
    parts = ("log-probs", "entropy", "squares", "dlogits")
    for part, a, b, c in zip(parts, found, gold, plain, strict=True):
        check_against_plain(a, b, c.to(a.dtype), scale=largest, name=f"{name}{part}")


@given(
    seed=st.integers(0, 2**16),
    value=st.sampled_from(ANYTHING),
    form=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    softcap=st.sampled_from([None, 6.0]),
    name=st.sampled_from(ON_HOST),
)
@settings(max_examples=60, deadline=None)
def test_a_row_that_no_token_uses_may_hold_anything(seed, value, form, dtype, softcap, name):
    inputs, keep = poisoned(seed, value, *form, dtype)
    inputs |= {"temperature": 0.7} | ({} if softcap is None else {"softcap": softcap})
    check_rows(functools.partial(lvrpo.gather_logprobs, backend=name), inputs, keep)


@pytest.mark.parametrize("shared", [False, True])
def test_also_where_no_value_is_read(shared, backend):
    torch._dynamo.reset()
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for value in ANYTHING:
        for function in (op, compiled):
            inputs, keep = poisoned(3, value, True, shared, True, torch.float32)
            check_rows(function, inputs, keep, f"{value}, compiled {function is compiled}: ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_its_entropy_is_0_and_has_no_gradient(value, backend):
    inputs, keep = poisoned(5, value, True, True, False, torch.float32)
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    _, entropy, squares, gradient = run(op, inputs, upstream(inputs, keep, everywhere=True))
    others = torch.ones(len(entropy), dtype=torch.bool, device=keep.device)
    others[keep] = False
    for result in (entropy, squares, gradient):
        assert (result[others] == 0).all()
        assert result.isfinite().all()


def test_every_other_row_has_its_entropy(backend):
    logits = torch.randn(3, 20)
    ids = torch.tensor([4, IGNORED, IGNORED])
    _, entropy = lvrpo.gather_logprobs(logits, ids, return_entropy=True, backend=backend)
    p = logits.double().softmax(dim=1)
    check_against_plain(
        entropy,
        -(p * p.log()).sum(dim=1),
        torch.distributions.Categorical(logits=logits).entropy(),
        scale=8.0,
    )


@pytest.mark.parametrize("mutant", UNGUARDED.values(), ids=UNGUARDED.keys())
def test_rule_rejects_mutant(mutant):
    inputs, keep = poisoned(5, math.nan, True, False, False, torch.float32)
    with pytest.raises(AssertionError):
        check_rows(mutant, inputs, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 30.0, 1e30])
@pytest.mark.parametrize("vocab", [4, 3000, 20_000])
def test_a_used_row_at_the_ends_of_a_dtype_gives_finite_numbers(vocab, softcap, dtype, backend):
    ends = torch.tensor(
        [[1e38, -1e38, 0.0, 5.0], [-1e38] * 4, [1e38] * 4, [1e38, 1e38, -1e38, -1e38]], dtype=dtype
    )
    # Each value in a block of its own, and by turns.
    for logits in (ends.repeat(1, vocab // 4), ends.repeat_interleave(vocab // 4, dim=1)):
        inputs = {"logits": logits, "token_ids": torch.tensor([0, 0, 1, 0])}
        inputs |= {} if softcap is None else {"softcap": softcap}
        keep = torch.arange(4)
        given = upstream(inputs, keep)
        ours = run(functools.partial(lvrpo.gather_logprobs, backend=backend), inputs, given)
        gold, plain = (deleted(inputs, keep, given, d) for d in (torch.float64, dtype))
        assert all(x.isfinite().all() for x in ours)
        if dtype == torch.float32:  # gold has no more digits than fp64
            # Triton's gradient knows the log-sum-exp alone: as exact as the largest logit.
            found = ours[:3] if backend == "triton" else ours
            for a, b, c in zip(found, gold, plain, strict=False):
                check_against_plain(a, b, c, scale=b.abs() + 100.0)


UNFIT = {
    "token above the vocabulary": {"token_ids": torch.tensor([3, 37, 5])},
    "negative token": {"token_ids": torch.tensor([3, -7, 5])},
    "token outside its range": {"vocab_range": torch.tensor([[0, 37], [0, 9], [0, 37]])},
    "empty range": {"vocab_range": torch.tensor([[0, 37], [9, 9], [0, 37]])},
    "row above the rows": {"row_index": torch.tensor([0, 3, 2])},
    "negative row": {"row_index": torch.tensor([0, -1, 2])},
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT.keys())
def test_a_token_that_does_not_fit_counts_as_ignored_where_no_value_is_read(change, backend):
    torch._dynamo.reset()
    device = torch.empty(0).device
    inputs = {"logits": torch.randn(3, 37), "token_ids": torch.tensor([3, 20, 5])}
    inputs |= {name: x.to(device) for name, x in change.items()}
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    with pytest.raises(ValueError, match=r"\[1\] is"):
        op(**inputs)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    given = [torch.ones(3), torch.tensor([0.3, 0.0, 0.3])]
    if backend == "cpp":  # its kernels read indices before they read memory
        with pytest.raises(RuntimeError, match=r"lvrpo: (token_ids|row_index)\[1\] is"):
            run(compiled, inputs, given)
        return
    ours = run(compiled, inputs, given)
    expected = run(op, {**inputs, "token_ids": torch.tensor([3, IGNORED, 5])} | NO_RANGE, given)
    for a, b in zip(ours, expected, strict=True):
        keep = [0, 2] if len(a) == 3 and a.dim() == 1 else slice(None)
        torch.testing.assert_close(a[keep], b[keep])
    assert ours[0][1] == 0


NO_RANGE = {"vocab_range": None, "row_index": None}


def test_a_bad_range_reads_no_memory_beyond_the_row(backend):
    if backend == "cpp":
        pytest.skip("its kernel raises")
    torch._dynamo.reset()
    logits = torch.randn(2, 16)
    ranges = torch.tensor([[0, 10**6], [-(10**6), 16]])
    op = functools.partial(lvrpo.gather_logprobs, return_entropy=True, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    ours = compiled(logits, torch.tensor([3, 5]), vocab_range=ranges)
    expected = op(logits, torch.tensor([3, 5]))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("shared", [False, True])
def test_indices_of_any_integer_dtype_and_lists(integer, shared, backend):
    inputs = make_inputs(4, 30, 9 if shared else None, torch.float32)
    inputs["vocab_range"] = torch.tensor([[0, 30]] * 4)
    op = functools.partial(lvrpo.gather_logprobs, backend=backend)
    names = ["token_ids", "vocab_range", *["row_index"] * shared]
    expected = op(**inputs)
    for change in (
        {name: inputs[name].to(integer) for name in names},
        {name: inputs[name].tolist() for name in names},
    ):
        ours = op(**inputs | change)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("sliced", [False, True])
def test_padded_rows(sliced, backend):
    logits, ids = torch.randn(3, 6, 30), torch.randint(0, 30, (3, 5))
    ids[1, 3:] = IGNORED
    logits[1, 3:] = math.nan
    logits = logits[:, :5] if sliced else logits[:, :5].contiguous()
    ranges = torch.tensor([0, 30]).expand(3, 5, 2)
    op = functools.partial(lvrpo.gather_logprobs, **FULL, backend=backend)
    leaves = [logits.clone().requires_grad_(), logits.reshape(15, 30).clone().requires_grad_()]
    padded = op(leaves[0], ids, vocab_range=ranges)
    packed = op(leaves[1], ids.reshape(15), vocab_range=ranges.reshape(15, 2))
    for a, b in zip(padded, packed, strict=True):
        assert a.shape == (3, 5)
        assert torch.equal(a.reshape(15), b)
    for results in (padded, packed):
        (results[0].sum() + results[1].sum()).backward()
    assert torch.equal(leaves[0].grad.reshape(15, 30), leaves[1].grad)
    # A row of the padded ones may be picked by its place among all of them.
    picked = op(logits, torch.tensor([[4], [7]]), torch.tensor([[0], [14]]))
    rows = op(logits.reshape(15, 30)[[0, 14]], torch.tensor([4, 7]))
    assert picked[0].shape == (2, 1)
    assert torch.equal(picked[0].reshape(2), rows[0])


def test_an_overlapping_view_is_refused_in_place():
    logits = torch.randn(1, 30).expand(4, 30)
    with pytest.raises(ValueError, match="strides"):
        lvrpo.gather_logprobs(logits, torch.zeros(4, dtype=torch.int32), inplace_backward=True)
