"""packed_attention inside what trainers put around it, and beside rows that nobody uses.

The judge is dense attention in fp64, over masks that are formed pair by pair.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masks.layouts import dense_forest, dense_window, forests
from ops.test_packed_attention import as_on_a_gpu, check, here, make_inputs
from ops.test_packed_attention_flash import varlen_attention
from runnable import RUNNABLE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lvrpo import backends
from lvrpo.backends.flash import attention as _flash_attention
from lvrpo.masks import SpanMask
from lvrpo.ops.packed_attention import packed_attention
from lvrpo.testing import DEFAULT_ULPS, check_against_plain

LAYOUT = [4, 3, 2, 5, 3], [-1, 0, 0, 2, -1], ["causal", "full", "causal", "causal", "full"]
INTERPRETS = backends.triton_interprets()
NOTHING = (math.nan, math.inf, -math.inf, 1e38)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(*dtypes: torch.dtype) -> list[Tensor]:
    """Leaves q, k and v for LAYOUT."""
    generator = torch.Generator().manual_seed(1)
    length, shapes = sum(LAYOUT[0]), [(4, 8), (2, 8), (2, 8)]
    device = torch.get_default_device()
    return [
        torch.randn(length, *shape, generator=generator, device="cpu")
        .to(device, dtype)
        .requires_grad_()
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def dense(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None, cap: float = 0.0
) -> Tensor:
    """[q, heads, width] fp64, a row at a time."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    outs = []
    for row, sees in zip(q, visible, strict=True):
        z = scale * torch.einsum("hd,khd->hk", row, k[sees])
        z = cap * torch.tanh(z / cap) if cap else z
        outs.append(torch.einsum("hk,khd->hd", z.softmax(-1), v[sees]))
    return torch.stack(outs) if outs else q.new_zeros(q.shape)


@pytest.fixture(params=[*RUNNABLE, "flash"])
def attention(request: pytest.FixtureRequest) -> Iterator[Attention]:
    """Every backend with the mask of LAYOUT; flash attention by what stands in for it."""
    if request.param == "flash":
        mask = SpanMask.from_spans(*LAYOUT)
        yield functools.partial(
            _flash_attention.gather_attention,
            mask=mask,
            varlen=varlen_attention,
            scale=0.4,
            softcap=0.0,
        )
        return
    with torch.device(backends.named(request.param).device or "cpu"):
        mask = here(SpanMask.from_spans(*LAYOUT))
        yield functools.partial(packed_attention, mask=mask, scale=0.4, backend=request.param)


def gradients(run: Callable[..., Any], leaves: list[Tensor], times: int = 1) -> list[Tensor]:
    """Of a sum that weighs every element; after `times` backward passes through one graph."""
    out = run(*leaves)
    upstream = torch.linspace(-1, 2, out.numel()).view_as(out).to(out.dtype)
    for step in range(times):
        found = torch.autograd.grad(out, leaves, upstream, retain_graph=step + 1 < times)
    return [out.detach(), *found]


def autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under it, and its backward pass outside, as torch asks for."""

    def forward(*leaves: Tensor) -> Any:
        with torch.autocast(leaves[0].device.type, torch.bfloat16):
            return run(*leaves)

    return forward


WRAPPED: dict[str, Callable[[Attention, list[Tensor]], list[Tensor]]] = {
    "checkpoint": lambda run, leaves: gradients(
        lambda *x: checkpoint(run, *x, use_reentrant=False), leaves
    ),
    "reentrant checkpoint": lambda run, leaves: backward(
        lambda *x: checkpoint(run, *x, use_reentrant=True), leaves
    ),
    "nested checkpoints": lambda run, leaves: gradients(
        lambda *x: checkpoint(
            lambda *y: checkpoint(run, *y, use_reentrant=False), *x, use_reentrant=False
        ),
        leaves,
    ),
    "retained graph": lambda run, leaves: gradients(run, leaves, times=2),
    "forward twice": lambda run, leaves: (run(*leaves), gradients(run, leaves))[1],
    "saved on the CPU": lambda run, leaves: saved_on_cpu(run, leaves),
}


def backward(run: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """`gradients` by .backward(), for autograd.grad is refused by reentrant checkpoints."""
    out = run(*leaves)
    out.backward(torch.linspace(-1, 2, out.numel()).view_as(out).to(out.dtype))
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [out.detach(), *found]


def saved_on_cpu(run: Attention, leaves: list[Tensor]) -> list[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        out = run(*leaves)
    return gradients(lambda *_: out, leaves)


@pytest.mark.parametrize("under", [lambda run: run, autocast], ids=["", "autocast"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_same_bits_however_it_is_wrapped(attention, wrap, under):
    leaves, run = tensors(*[torch.float32] * 3), under(attention)
    expected, ours = gradients(run, leaves), wrap(run, leaves)
    assert all(map(torch.equal, ours, expected))


HALF = torch.bfloat16
MIXES = {
    "fp32": (torch.float32,) * 3,
    "bf16 values": (torch.float32, torch.float32, HALF),
    "bf16 keys and values": (torch.float32, HALF, HALF),
    "bf16": (HALF,) * 3,
    "fp16 queries": (torch.float16, HALF, torch.float32),
}


@pytest.mark.parametrize("dtypes", MIXES.values(), ids=MIXES.keys())
def test_autocast_does_what_it_does_with_dense_attention(backend, dtypes):
    leaves, mask = tensors(*dtypes), here(SpanMask.from_spans(*LAYOUT))
    run = functools.partial(packed_attention, mask=mask, backend=backend)
    ours = gradients(autocast(run), leaves)
    cast = gradients(run, [x.detach().bfloat16().requires_grad_() for x in leaves])
    assert ours[0].dtype == torch.bfloat16
    assert [x.dtype for x in ours[1:]] == list(dtypes)
    for found, lowered in zip(ours, cast, strict=True):
        assert torch.equal(found, lowered.to(found.dtype))
    q, k, v = (x.detach().bfloat16().double() for x in leaves)
    visible = dense_forest(*LAYOUT).to(q.device)
    with torch.autocast(q.device.type, torch.bfloat16):
        of_torch = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in leaves), attn_mask=visible, enable_gqa=True
        )
    # Tensor cores take probabilities in bf16, which is a part in 2^8 of every summand.
    summands = dense(q, k, v.abs(), visible) * (2 + 2**16 / DEFAULT_ULPS)
    check_against_plain(
        ours[0], dense(q, k, v, visible), of_torch.detach().transpose(0, 1), scale=summands
    )


def test_autocast_leaves_fp64_alone_and_off_is_off(backend):
    leaves, mask = tensors(*[torch.float64] * 3), here(SpanMask.from_spans(*LAYOUT))
    run = functools.partial(packed_attention, mask=mask, backend=backend)
    expected = run(*leaves)
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        assert torch.equal(run(*leaves), expected)
        with torch.autocast(leaves[0].device.type, enabled=False):
            narrow = tensors(*[torch.float32] * 3)
            assert run(*narrow).dtype == torch.float32
            with pytest.raises(ValueError, match=r"v is torch.bfloat16, q is torch.float32"):
                run(narrow[0], narrow[1], narrow[2].bfloat16())


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_that_changes_compiles_nothing_anew(backend, name):
    """Every number at once would hide one of them: each has its own graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    leaves, mask = tensors(*[torch.float64] * 3), as_on_a_gpu(here(SpanMask.from_spans(*LAYOUT)))
    visible = dense_forest(*LAYOUT).to(leaves[0].device)
    run = functools.partial(packed_attention, mask=mask, backend=backend)
    compiled = torch.compile(
        lambda q, k, v, value: run(q, k, v, **{name: value}), fullgraph=True, backend=counter
    )
    for value in [0.1 + 0.17 * step for step in range(12)]:
        ours = gradients(lambda *x, value=value: compiled(*x, value), leaves)
        options = {"scale": value} if name == "scale" else {"cap": value}
        right = gradients(lambda *x, options=options: dense(*x, visible, **options), leaves)
        for found, expected in zip(ours, right, strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2


def test_autocast_compiles(backend):
    leaves, mask = tensors(*MIXES["bf16 values"]), as_on_a_gpu(here(SpanMask.from_spans(*LAYOUT)))
    run = functools.partial(packed_attention, mask=mask, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, expected = gradients(autocast(compiled), leaves), gradients(autocast(run), leaves)
    # A graph's backward pass through torch's own ops is traced under autocast, unlike an eager one.
    kinds = 1 if backend == "torch" else 4
    assert [x.dtype for x in ours] == [x.dtype for x in expected]
    for found, eager in zip(ours[:kinds], expected[:kinds], strict=True):
        torch.testing.assert_close(found, eager)


def test_what_a_rollout_made_serves_a_backward_pass(backend):
    """A mask laid out in inference mode, and a cache of keys that was filled there."""
    q, k, v = tensors(*[torch.float32] * 3)
    with torch.inference_mode():
        offsets = torch.tensor(sum(LAYOUT[0]), device="cpu")
        mask = SpanMask.from_spans(*LAYOUT).pad_to(offsets.item()).packing_invariant().freeze([1])
        mask = here(mask.select_queries(torch.arange(3, 17, device="cpu")))
        cached = k.clone(), v.clone()
    assert cached[0].is_inference()
    run = functools.partial(packed_attention, mask=mask, backend=backend)
    (ours,) = torch.autograd.grad(run(q[3:], *cached).sum(), q)
    (expected,) = torch.autograd.grad(run(q[3:], k.detach(), v.detach()).sum(), q)
    assert torch.equal(ours, expected)


@st.composite
def unused_rows(draw: st.DrawFn) -> tuple[Any, int, list[bool], list[bool], int, float]:
    """A forest, a window, which of its rows are queries, which are used, padding, and a value."""
    layout = draw(forests(spans=7))
    padding = draw(st.integers(0, 3))
    rows = sum(layout[0]) + padding
    some = st.lists(st.sampled_from([True, True, False]), min_size=rows, max_size=rows)
    queries = draw(st.one_of(st.just([True] * rows), some)) if not padding else [True] * rows
    window = draw(st.sampled_from([2, 5, 1000]))
    return layout, window, queries, draw(some), padding, draw(st.sampled_from(NOTHING))


@given(unused_rows(), st.sampled_from([torch.float32, torch.float64]), st.booleans())
@settings(
    max_examples=10 if INTERPRETS else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_rows_that_nobody_uses_are_not_looked_at(backend, drawn, dtype, capped):
    """NaN, inf and 1e38 in them, and upstream gradients of 0: all is as if they were not there."""
    layout, window, queries, wanted, padding, nothing = drawn
    packed = sum(layout[0])
    mask = SpanMask.from_spans(*layout).with_window(window).pad_to(packed + padding)
    rows = [row for row, chosen in enumerate(queries) if chosen]
    used = [row for row in rows if wanted[row] and row < packed]
    visible = dense_window(*layout, window)
    seen = visible[used].any(dim=0)
    keys = seen.nonzero()[:, 0]
    cap = 3.0 if capped else 0.0

    torch.manual_seed(len(rows))
    q, k, v = (torch.randn(mask.length, heads, 4, device="cpu").to(dtype) for heads in (4, 2, 2))
    upstream = torch.randn(mask.length, 4, 4, device="cpu").to(dtype)
    right = [x.clone().double().requires_grad_() for x in (q, k, v)]
    out = dense(right[0][used], right[1][keys], right[2][keys], visible[used][:, keys], cap=cap)
    expected: Any = (None, None, None)
    if used:
        expected = torch.autograd.grad((out * upstream[used]).sum(), right, allow_unused=True)

    unused = torch.ones(mask.length, dtype=torch.bool, device="cpu")
    unused[used] = False
    q[unused], upstream[unused] = nothing, 0.0
    k[keys_outside(mask, keys)] = v[keys_outside(mask, keys)] = nothing
    device = torch.get_default_device()
    leaves = [x.to(device).requires_grad_() for x in (q[rows], k, v)]
    ours = packed_attention(*leaves, here(mask.select_queries(rows)), softcap=cap, backend=backend)
    found = torch.autograd.grad(ours, leaves, upstream[rows].to(device))

    at = [rows.index(row) for row in used]
    close = torch.testing.assert_close
    close(ours[at].cpu(), out.detach().to(dtype))
    for gradient, wide, index in zip(
        found, expected, (rows, slice(None), slice(None)), strict=True
    ):
        if wide is None:
            assert (gradient == 0).all()
        else:
            close(gradient.cpu(), wide[index].to(dtype))


def keys_outside(mask: SpanMask, keys: Tensor) -> Tensor:
    outside = torch.ones(mask.length, dtype=torch.bool, device="cpu")
    outside[keys] = False
    return outside


def test_unused_rows_do_not_count_where_values_cannot_be_read(backend):
    mask = as_on_a_gpu(here(SpanMask.from_spans(*LAYOUT)))
    leaves = tensors(*[torch.float32] * 3)
    run = functools.partial(packed_attention, mask=mask, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    # The rows of span 1 are seen by themselves alone.
    span = slice(*mask.span_offsets[1:3])
    upstream = torch.ones_like(leaves[0])
    upstream[span] = 0.0
    expected = torch.autograd.grad(run(*leaves), leaves, upstream)
    broken = [x.detach().clone() for x in leaves]
    for x in broken:
        x[span] = torch.nan
        x.requires_grad_()
    for call in (run, compiled):
        found = torch.autograd.grad(call(*broken), broken, upstream)
        for gradient, right in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, right)


def test_a_used_row_that_is_not_finite_is_not_hidden(backend):
    mask = here(SpanMask.from_spans(*LAYOUT))
    for name in range(3):
        leaves = tensors(*[torch.float32] * 3)
        with torch.no_grad():
            leaves[name][0] = torch.nan
        out = packed_attention(*leaves, mask, backend=backend)
        assert out[0].isnan().all()
        # Keys and values of row 0 are seen by its whole document, and by nobody else.
        assert out[1:14].isnan().all() == (name > 0)
        assert out[14:].isfinite().all()
        found = torch.autograd.grad(out.sum(), leaves)
        assert all(gradient[14:].isfinite().all() for gradient in found)
        assert all(gradient[0].isnan().any() for gradient in found[:2])


def test_rule_rejects_unseen_keys_that_are_multiplied_in():
    mask = SpanMask.from_spans(*LAYOUT)
    inputs = make_inputs(mask, 4, 2, 8, 8, torch.float32)
    span = slice(*mask.span_offsets[1:3])
    visible = dense_forest(*LAYOUT)

    def multiplied(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        z = torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5
        z = z.masked_fill(~visible, -torch.inf)
        return torch.einsum("hqk,khd->qhd", z.softmax(-1), v), z.logsumexp(-1).T

    check(multiplied, inputs)
    inputs["v"][span] = torch.nan
    with pytest.raises(AssertionError):
        check(multiplied, inputs)
