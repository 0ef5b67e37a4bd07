"""How the work is laid out must not show: parts, frozen spans, and what a span is packed with."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ops.test_packed_attention import (
    DRAWING,
    FOREST,
    GROUPS,
    QUESTION,
    check,
    here,
    make_inputs,
    op,
)
from torch import Tensor

from lvrpo.masks import SpanMask
from lvrpo.masks import schedule as _mask_schedule
from lvrpo.ops.packed_attention import packed_attention
from lvrpo.reference.packed_attention import packed_attention as reference
from lvrpo.testing import check_op

pytestmark = pytest.mark.usefixtures("poison_empty")
PROMPT = 70


def gradients(backend: str | None, inputs: dict[str, Any]) -> list[Tensor]:
    """The results and, for ones upstream, the gradients of q, k and v."""
    leaves = [inputs[name].detach().requires_grad_() for name in "qkv"]
    out, lse = op(backend)(*leaves, inputs["mask"])
    seen = lse.isfinite()
    return [out, lse, *torch.autograd.grad(out.sum() + lse[seen].sum(), leaves)]


def assert_same_bits(backend: str, ours: Tensor, expected: Tensor) -> None:
    """The reference leaves the order of its sums to torch's matrix products."""
    if backend == "torch":
        torch.testing.assert_close(ours, expected)
    else:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 150])
def test_columns_in_parts(backend, monkeypatch, rows, dtype):
    """Of a few rows each, however many parts that makes."""
    monkeypatch.setattr(_mask_schedule, "ROWS", rows)
    monkeypatch.setattr(_mask_schedule, "PARTS", 1 << 20)
    assert len(_mask_schedule.schedule(FOREST).key_parts) > 1
    check(op(backend), make_inputs(FOREST, 2, 1, 16, 8, dtype), backend)


@pytest.mark.parametrize("chosen", [[0], [1], [2, 5], [0, 1, 2, 3, 4, 5, 6, 7]], ids=str)
def test_frozen_spans(backend, chosen):
    mask = GROUPS.freeze(chosen)
    inputs = make_inputs(mask, 4, 2, 24, 24, torch.float32)
    check(op(backend), inputs, backend)
    live, free = (gradients(backend, inputs | {"mask": here(m)}) for m in (mask, GROUPS))
    frozen = here(mask).frozen_keys()
    assert frozen.any()
    for ours, without in zip(live[3:], free[3:], strict=True):
        assert (ours[frozen] == 0).all()
        torch.testing.assert_close(ours[~frozen], without[~frozen])
    for ours, without in zip(live[:3], free[:3], strict=True):
        assert torch.equal(ours, without)


def test_frozen_spans_are_detached_keys():
    """The reference, which everything else is held to."""
    mask = SpanMask.from_groups([QUESTION]).freeze([0]).pad_to(25)
    inputs = make_inputs(mask, 2, 1, 8, 8, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    q, k, v = leaves
    prompt, rest = slice(0, 9), slice(9, None)
    k, v = (torch.cat([x[prompt].detach(), x[rest]]) for x in (k, v))
    plain = SpanMask.from_groups([QUESTION]).pad_to(25)
    results = [reference(q, k, v, plain), reference(*leaves, mask)]
    expected, ours = (torch.autograd.grad(out.square().sum(), leaves) for out in results)
    for gradient, detached in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, detached)


def frozen_ignored(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Any:
    return reference(q, k, v, GROUPS, return_lse=True)


def neighbour_frozen(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> Any:
    """The key after the frozen span, too."""
    k = torch.cat([k[:9], k[9:10].detach(), k[10:]])
    return reference(q, k, v, mask, return_lse=True)


@pytest.mark.parametrize("mutant", [frozen_ignored, neighbour_frozen])
def test_rule_rejects_mutant(mutant):
    inputs = make_inputs(GROUPS.freeze([0]), 4, 2, 16, 16, torch.float32)
    with pytest.raises(AssertionError):
        check_op(
            mutant, functools.partial(reference, return_lse=True), inputs, differentiable="qkv"
        )


@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 192, 256])
def test_head_widths(backend, width):
    mask = SpanMask.from_groups([QUESTION])
    check(op(backend), make_inputs(mask, 2, 1, width, width, torch.bfloat16), backend)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025])
def test_lengths_around_those_of_tiles(backend, length):
    half = length // 2
    mask = SpanMask.from_groups([([(half, "full")], [[(length - half, "causal")]])])
    check(op(backend), make_inputs(mask, 1, 1, 16, 16, torch.float32), backend)


def test_again_the_same_bits(backend):
    """A kernel that does not wait for the one before it is right most of the time."""
    inputs = make_inputs(GROUPS, 4, 2, 24, 24, torch.bfloat16)
    first = gradients(backend, inputs)
    for _ in range(100 if inputs["q"].is_cuda else 2):
        assert all(map(torch.equal, gradients(backend, inputs), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
def test_a_document_alone_equals_the_document_in_a_pack(backend, window, dtype):
    pack = SpanMask.from_groups([QUESTION, DRAWING, QUESTION]).with_window(window)
    inputs = make_inputs(pack, 2, 1, 16, 16, dtype)
    together = gradients(backend, inputs)
    rows = slice(*pack.documents[1:3])
    document = {name: inputs[name][rows] for name in "qkv"}
    mask = SpanMask.from_groups([DRAWING]).with_window(window)
    alone = gradients(backend, document | {"mask": here(mask)})
    for ours, expected in zip(together, alone, strict=True):
        assert_same_bits(backend, ours[rows], expected)


@pytest.mark.parametrize(
    "completion",
    [[(140, "causal")], [(33, "full")], [(10, "causal"), (12, "full"), (9, "causal")]],
    ids=["text", "image", "text, image, text"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_a_span_has_the_same_bits_with_any_siblings(backend, window, dtype, completion):
    prompt = [(40, "full"), (PROMPT - 40, "causal")]
    elder, younger = [(77, "causal")], [(130, "full"), (5, "causal")]
    length = sum(rows for rows, _ in completion)
    torch.manual_seed(0)
    own = [torch.randn(length, 2, 16, dtype=dtype) for _ in range(3)]
    shared = [torch.randn(PROMPT, 2, 16, dtype=dtype) for _ in range(3)]
    found = []
    # What comes before it and after it.
    for before, after in (([], []), ([elder], []), ([elder, younger], [elder])):
        mask = SpanMask.from_groups([(prompt, [*before, completion, *after])]).with_window(window)
        start = PROMPT + sum(rows for chain in before for rows, _ in chain)
        x = [torch.randn(mask.length, 2, 16, dtype=dtype) for _ in range(3)]
        rows = slice(start, start + length)
        for buffer, of_prompt, of_rows in zip(x, shared, own, strict=True):
            buffer[:PROMPT], buffer[rows] = of_prompt, of_rows
        inputs = dict(zip("qkv", x, strict=True)) | {"mask": here(mask.packing_invariant())}
        out, lse, dq, *_ = gradients(backend, inputs)
        found.append([result[rows] for result in (out, lse, dq)])
    for results in found[1:]:
        for ours, expected in zip(results, found[0], strict=True):
            assert_same_bits(backend, ours, expected)


def test_without_asking_siblings_may_show():
    """What `packing_invariant` is for: tiles otherwise begin with the document."""
    mask = SpanMask.from_groups([([(PROMPT, "causal")], [[(5, "causal")], [(9, "causal")]])])
    tiles = _mask_schedule.schedule(mask).query_tiles
    assert tiles.tolist() == [[0, 84, 0, 2]]
    tiles = _mask_schedule.schedule(mask.packing_invariant()).query_tiles
    assert tiles.tolist() == [[75, 84, 2, 2], [70, 75, 1, 1], [0, 70, 0, 0]]


def test_packing_invariance_changes_no_value(backend):
    inputs = make_inputs(FOREST, 4, 2, 16, 8, torch.float64)
    plain = packed_attention(**inputs, backend=backend)
    mask = here(FOREST).packing_invariant()
    torch.testing.assert_close(packed_attention(**inputs | {"mask": mask}, backend=backend), plain)


def test_constant_keys(backend):
    """The gradient of q alone is the same, and asks for no others."""
    inputs = make_inputs(GROUPS, 4, 2, 24, 24, torch.float32)
    _, _, dq, _, _ = gradients(backend, inputs)
    q = inputs["q"].requires_grad_()
    out, lse = op(backend)(q, inputs["k"], inputs["v"], inputs["mask"])
    (alone,) = torch.autograd.grad(out.sum() + lse.sum(), q)
    assert torch.equal(alone, dq)
