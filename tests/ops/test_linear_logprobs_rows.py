"""Rows of hidden states that no token uses, forms of arguments, and scaled logits."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.linear_logprobs import UNGUARDED
from plain_softmax import softmax_terms
from runnable import ON_HOST
from torch import Tensor

import lvrpo
from lvrpo.testing import check_against_plain

IGNORED = -100
HEADS = ("hidden", "weight", "bias")
FULL = {"return_entropy": True, "return_sum_squares": True}
#: What a row that no token uses may hold, in every column or in one.
ANYTHING = [math.nan, math.inf, -math.inf, 1e38, -3e38]
ROWS, WIDTH, VOCAB = 6, 5, 23


def poisoned(
    seed: int, value: float, whole: bool, shared: bool, dtype: torch.dtype
) -> tuple[dict[str, Any], Tensor]:
    """Inputs, some rows of which are poisoned, and the indices of the others."""
    torch.manual_seed(seed)
    used = torch.rand(ROWS) < 0.6
    used[seed % ROWS], used[(seed + 1) % ROWS] = True, False
    inputs: dict[str, Any] = {
        "hidden": torch.randn(ROWS, WIDTH).to(dtype),
        "weight": (torch.randn(VOCAB, WIDTH) * 2).to(dtype),
        "bias": torch.randn(VOCAB).to(dtype),
    }
    if whole:
        inputs["hidden"][~used] = value
    else:
        inputs["hidden"][~used, seed % WIDTH] = value
    of = torch.arange(ROWS)
    if shared:
        of = torch.randint(0, ROWS, (15,))
        inputs["row_index"] = of
    inputs["token_ids"] = torch.where(used[of], torch.randint(0, VOCAB, (len(of),)), IGNORED)
    keep = torch.zeros(ROWS, dtype=torch.bool)
    keep[of[used[of]]] = True
    return inputs, keep.nonzero()[:, 0]


def upstream(inputs: dict[str, Any], keep: Tensor) -> list[Tensor]:
    """Gradients by log-probs and entropies, 0 by the entropies of rows that nobody uses."""
    by_entropy = torch.zeros(ROWS)
    by_entropy[keep] = 0.3
    return [torch.linspace(-1, 2, len(inputs["token_ids"])), by_entropy]


def run(op, inputs: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in HEADS}
    logprobs, entropy, squares = op(**inputs | FULL | leaves)
    scaled = [g.to(x) for g, x in zip(upstream, (logprobs, entropy), strict=True)]
    gradients = torch.autograd.grad((logprobs, entropy), list(leaves.values()), scaled)
    return [logprobs.detach(), entropy.detach(), squares, *gradients]


def deleted(
    inputs: dict[str, Any], keep: Tensor, upstream: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The same by the formula, as if the rows that nobody uses and their tokens were not there."""
    heads = {name: inputs[name].to(dtype).requires_grad_() for name in ("weight", "bias")}
    hidden = inputs["hidden"][keep].to(dtype).requires_grad_()
    ids = inputs["token_ids"]
    of = inputs.get("row_index", torch.arange(len(ids), device=ids.device))
    asking = ids != IGNORED
    position = torch.full((ROWS,), -1, device=ids.device)
    position[keep] = torch.arange(len(keep), device=ids.device)
    logits = hidden @ heads["weight"].T + heads["bias"]
    options = {k: inputs[k] for k in ("temperature", "softcap") if k in inputs}
    logprobs, entropy, squares = softmax_terms(logits, ids[asking], position[of[asking]], **options)
    total = (logprobs * upstream[0].to(hidden)[asking]).sum()
    total = total + (entropy * upstream[1].to(hidden)[keep]).sum()
    gradients = torch.autograd.grad(total, [hidden, *heads.values()])
    return [logprobs.detach(), entropy.detach(), squares, *gradients]


def check_rows(op, inputs: dict[str, Any], keep: Tensor, name: str = "") -> None:
    given = upstream(inputs, keep)
    ours = run(op, inputs, given)
    gold, plain = (deleted(inputs, keep, given, d) for d in (torch.float64, ours[0].dtype))
    asking = inputs["token_ids"] != IGNORED
    assert (ours[0][~asking] == 0).all()
    others = torch.ones(ROWS, dtype=torch.bool, device=keep.device)
    others[keep] = False
    assert (ours[3][others] == 0).all()
    found = [ours[0][asking], *(x[keep] for x in ours[1:4]), *ours[4:]]
    parts = ("log-probs", "entropy", "squares", *(f"d{head}" for head in HEADS))
    # Sums of up to 15 tokens, and of all columns, of products with factors of up to 10.
    for part, a, b, c in zip(parts, found, gold, plain, strict=True):
        check_against_plain(a, b, c.to(a.dtype), scale=100.0, name=f"{name}{part}")


@given(
    seed=st.integers(0, 2**16),
    value=st.sampled_from(ANYTHING),
    form=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    softcap=st.sampled_from([None, 6.0]),
    most=st.integers(1, 7),
    name=st.sampled_from(ON_HOST),
)
@settings(max_examples=60, deadline=None)
def test_a_row_that_no_token_uses_may_hold_anything(seed, value, form, dtype, softcap, most, name):
    inputs, keep = poisoned(seed, value, *form, dtype)
    inputs |= {"temperature": 0.7, "memory_budget": most * VOCAB * 8}
    inputs |= {} if softcap is None else {"softcap": softcap}
    check_rows(functools.partial(lvrpo.linear_logprobs, backend=name), inputs, keep)


@pytest.mark.parametrize("shared", [False, True])
def test_also_where_no_value_is_read(shared, backend):
    torch._dynamo.reset()
    op = functools.partial(lvrpo.linear_logprobs, memory_budget=200, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for value in ANYTHING:
        for function in (op, compiled):
            inputs, keep = poisoned(3, value, True, shared, torch.float32)
            check_rows(function, inputs, keep, f"{value}, compiled {function is compiled}: ")


@pytest.mark.parametrize("value", ANYTHING)
def test_its_entropy_is_0_and_has_no_gradient(value, backend):
    inputs, keep = poisoned(5, value, True, True, torch.float32)
    inputs["weight"] = inputs["weight"] * 10
    op = functools.partial(lvrpo.linear_logprobs, backend=backend)
    given = upstream(inputs, keep)
    expected = run(op, inputs, given)
    given[1][:] = torch.where(given[1] == 0, 7.0, given[1])
    ours = run(op, inputs, given)
    others = torch.ones(ROWS, dtype=torch.bool, device=keep.device)
    others[keep] = False
    assert all((result[others] == 0).all() for result in ours[1:4])
    for a, b in zip(ours, expected, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize(("mutant", "value"), UNGUARDED.values(), ids=UNGUARDED.keys())
def test_rule_rejects_mutant(mutant, value):
    inputs, keep = poisoned(5, value, True, False, torch.float32)
    inputs["weight"] = inputs["weight"] * 10
    with pytest.raises(AssertionError):
        check_rows(mutant, inputs, keep)


def test_a_used_row_of_nan_is_refused_and_an_unused_one_is_not(backend):
    inputs, keep = poisoned(5, math.nan, True, False, torch.float32)
    used = int(keep[0])
    lvrpo.linear_logprobs(**inputs, backend=backend)
    inputs["hidden"][used] = math.nan
    with pytest.raises(ValueError, match=f"row {used} of hidden @ weight.T"):
        lvrpo.linear_logprobs(**inputs, backend=backend)


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8])
def test_indices_of_any_integer_dtype_and_lists(integer, backend):
    inputs, _ = poisoned(5, 0.0, True, True, torch.float32)
    inputs["token_ids"] = inputs["token_ids"].clamp(0)
    inputs["vocab_range"] = torch.tensor([[0, VOCAB]] * ROWS)
    op = functools.partial(lvrpo.linear_logprobs, **FULL, backend=backend)
    names = ("token_ids", "row_index", "vocab_range")
    expected = op(**inputs)
    for change in (
        {name: inputs[name].to(integer) for name in names},
        {name: inputs[name].tolist() for name in names},
    ):
        ours = op(**inputs | change)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_padded_rows(backend):
    inputs, _ = poisoned(5, math.nan, True, False, torch.float32)
    op = functools.partial(lvrpo.linear_logprobs, **FULL, backend=backend)
    packed = op(**inputs)
    shaped = {"hidden": (2, 3, WIDTH), "token_ids": (2, 3)}
    padded = op(**inputs | {name: inputs[name].view(shape) for name, shape in shaped.items()})
    for a, b in zip(padded, packed, strict=True):
        assert a.shape == (2, 3)
        assert torch.equal(a.reshape(ROWS), b)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scaled_logits_are_a_temperature_and_a_softcap(softcap, backend):
    inputs, keep = poisoned(5, 0.0, True, False, torch.float32)
    scale, temperature = 0.25, 0.7
    options = {} if softcap is None else {"softcap": softcap / scale}
    ours = lvrpo.linear_logprobs(
        **inputs, temperature=temperature / scale, **options, **FULL, backend=backend
    )
    wide = [inputs[name].double() for name in HEADS]
    logits = scale * (wide[0] @ wide[1].T + wide[2])
    options = {} if softcap is None else {"softcap": softcap}
    ids = inputs["token_ids"][keep]
    gold = softmax_terms(logits[keep], ids, torch.arange(len(keep)), temperature=0.7, **options)
    for a, b in zip(ours, gold, strict=True):
        check_against_plain(a[keep], b, b.float(), scale=20.0)
