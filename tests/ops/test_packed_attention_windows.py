"""Sliding windows in packed_attention: any tree, any backend, and no more work than they leave."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masks.layouts import dense_window, forests
from ops.test_packed_attention import as_on_a_gpu, here, make_inputs
from runnable import RUNNABLE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lvrpo import backends
from lvrpo.masks import SpanMask
from lvrpo.ops.packed_attention import packed_attention

INTERPRETS = "triton" in RUNNABLE and backends.triton_interprets()


@st.composite
def windowed(draw: st.DrawFn) -> tuple[Any, int, set[int], list[int] | None, int]:
    """A forest, a window, frozen spans, which rows are queries if not all, and padding."""
    layout, window = draw(forests(spans=8)), draw(st.integers(1, 9))
    rows = sum(layout[0])
    some = st.sets(st.integers(0, rows - 1)).map(sorted) if rows else st.just([])
    frozen = st.sets(st.integers(0, len(layout[0]) - 1)) if layout[0] else st.just(set())
    return layout, window, draw(frozen), draw(st.none() | some), draw(st.integers(0, 3))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Of 4 query heads over 2 key heads; rows that see nothing are 0."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    z = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    p = z.masked_fill(~visible, -1e300).softmax(-1).masked_fill(~visible, 0.0)
    return torch.einsum("hqk,khd->qhd", p, v)


@given(windowed())
@settings(
    max_examples=20 if INTERPRETS else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_tree_with_any_window(backend, drawn):
    layout, window, frozen, chosen, padding = drawn
    mask = SpanMask.from_spans(*layout).with_window(window).freeze(sorted(frozen))
    visible = dense_window(*layout, window)
    if chosen is None:
        mask = mask.pad_to(mask.length + padding)
        visible = torch.nn.functional.pad(visible, (0, padding, 0, padding))
    else:
        mask, visible = mask.select_queries(chosen), visible[chosen]
    inputs = make_inputs(mask, 4, 2, 8, 8, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    out = packed_attention(*leaves, inputs["mask"], backend=backend)
    constant = inputs["mask"].frozen_keys()[:, None, None]
    keys = (torch.where(constant, x.detach(), x) for x in leaves[1:])
    expected = dense_attention(leaves[0], *keys, visible.to(out.device))
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    gradients = (torch.autograd.grad(x, leaves, upstream) for x in (out, expected))
    for ours, right in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, right)


def test_a_completion_equals_the_sequence_that_it_is_alone(backend):
    lengths, prompt, window = [90, 30, 150], 100, 60
    group = SpanMask.from_groups([([(prompt, "causal")], [[(n, "causal")] for n in lengths])])
    inputs = make_inputs(group.with_window(window), 2, 1, 16, 16, torch.float64)
    together = packed_attention(**inputs, backend=backend)
    start = prompt
    for length in lengths:
        rows = [*range(prompt), *range(start, start + length)]
        mask = here(SpanMask.from_cu_seqlens([0, len(rows)]).with_window(window))
        alone = packed_attention(*(inputs[name][rows] for name in "qkv"), mask, backend=backend)
        torch.testing.assert_close(together[start : start + length], alone[prompt:])
        start += length


LAYOUTS = {
    "a long text": SpanMask.from_cu_seqlens([0, 900]),
    "long answers": SpanMask.from_groups([([(300, "causal")], [[(250, "causal")]] * 3)]),
    "decoding": SpanMask.from_groups([([(300, "causal")], [[(250, "causal")]] * 3)]).select_queries(
        [400, 650, 900]
    ),
}


@pytest.fixture
def visits(monkeypatch):
    """By kernel, of how many tiles of queries and keys it formed the scores."""
    if not INTERPRETS:
        pytest.skip("what a compiled kernel visits cannot be counted")
    found: dict[str, int] = {}

    def counted(name: str, scores: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            found[name] = found.get(name, 0) + 1
            return scores(*arguments, **options)

        return count

    for name in ("packed_attention", "_attention_dq", "_attention_dkv"):
        module = importlib.import_module(f"lvrpo.kernels.{name}")
        monkeypatch.setattr(module, "scores", counted(name, module.scores))
    return found


@pytest.mark.parametrize("mask", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tiles_beyond_the_window_are_not_visited(visits, mask):
    mask = mask.with_window(64)
    inputs = make_inputs(mask, 1, 1, 8, 8, torch.float32)
    leaves = [inputs[x].requires_grad_() for x in "qkv"]
    packed_attention(*leaves, inputs["mask"], backend="triton").sum().backward()
    # Tiles of 32 x 32 (`WIDE`), of which a window of two begins in one and ends in another; the
    # schedule's tiles of keys are four times as long. Without a window there are 400 and more.
    pairs = int(mask.to_dense().sum())
    assert len(visits) == 3
    assert max(visits.values()) <= 24 + 5 * pairs / 32**2


def test_a_new_window_does_not_recompile(backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = functools.partial(packed_attention, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for step in range(6 if backend == "triton" else 20):
        mask = SpanMask.from_groups([([(20 + step, "causal")], [[(15, "causal")]] * 2)])
        q, k, v, mask = make_inputs(mask.with_window(5 + step), 4, 2, 8, 8, torch.float32).values()
        compiled(q, k, v, as_on_a_gpu(mask))
    # The reference is traced document by document, and its windows are masks.
    assert counter.frame_count <= (3 if backend == "torch" else 2)
