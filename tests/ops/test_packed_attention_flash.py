"""The flash backend: on the CPU with a varlen attention in plain torch, on a GPU with real ones."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from masks.layouts import masks
from ops.test_packed_attention import (
    BAGEL,
    FOREST,
    GROUPS,
    QUESTION,
    SHAPES,
    TREE,
    make_inputs,
    scales,
)
from torch import Tensor

from lvrpo import backends
from lvrpo.backends.flash import attention as _flash_attention
from lvrpo.backends.flash import plan as _flash_plan
from lvrpo.backends.flash import varlen as flash_varlen
from lvrpo.masks import SpanMask
from lvrpo.ops.packed_attention import packed_attention
from lvrpo.reference.packed_attention import packed_attention as reference
from lvrpo.testing import DEFAULT_ULPS, check_op

gather_attention = _flash_attention.gather_attention


def runnable() -> list[flash_varlen.Implementation]:
    if flash_varlen.why_unavailable():
        return []
    major, _ = torch.cuda.get_device_capability()
    return [found for found in flash_varlen.installed() if not found.why_not(major, 64, 0, False)]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    softcap: float,
    window: int | None,
    *,
    diagonal: Callable[[int, int], int] = lambda queries, keys: keys - queries,
) -> Tensor:
    """What flash attention computes, and what it expects of its arguments."""
    for x, cu, longest in ((q, cu_q, max_q), (k, cu_k, max_k), (v, cu_k, max_k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert cu[0] == 0
        assert cu[-1] == len(x)
        assert type(longest) is int
        assert cu.diff().min() > 0, "an empty sequence"
        assert cu.diff().max() == longest
        assert x.stride(-1) == 1 or x.shape[-1] == 1
    assert cu_q.shape == cu_k.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert not causal or q1 - q0 <= k1 - k0, "a query without keys"
        keys, values = (x[k0:k1].to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
        z = scale * torch.einsum("qhd,khd->hqk", q[q0:q1].to(wide), keys)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        if causal:
            seen = torch.ones(q1 - q0, k1 - k0).bool().tril(diagonal(q1 - q0, k1 - k0))
            z = z.masked_fill(~seen, -torch.inf)
        if window is not None:
            near = torch.ones(q1 - q0, k1 - k0).bool().triu(k1 - k0 - (q1 - q0) - window + 1)
            z = z.masked_fill(~near, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", z.softmax(-1), values))
    return torch.cat(outs).to(q.dtype)


def emulated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    varlen: flash_varlen.Varlen = varlen_attention,
) -> Tensor:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return gather_attention(q, k, v, mask, varlen=varlen, scale=scale, softcap=softcap)


def check(function: Any, inputs: dict[str, Any], on_tensor_cores: bool = False) -> None:
    allowed = scales(inputs)
    rounding = torch.finfo(inputs["q"].dtype).eps / torch.finfo(torch.float32).eps / DEFAULT_ULPS
    if rounding > 1:
        # Of sums that `scales` says are at least twice as large: half a unit for the gradient of
        # every copy. Tensor cores take probabilities and their gradients in the inputs' dtype too.
        exact = scales(inputs | {name: inputs[name].float() for name in "qkv"})
        rounded = ("out0", "dq", "dk", "dv") if on_tensor_cores else ("dk", "dv")
        units = 1.0 if on_tensor_cores else 0.25
        allowed |= {name: allowed[name] + units * rounding * exact[name] for name in rounded}
    check_op(function, reference, inputs, differentiable="qkv", scales=allowed)


@pytest.fixture(params=["plain torch", *[found.name for found in runnable()]])
def varlen(request: pytest.FixtureRequest) -> Iterator[flash_varlen.Varlen]:
    """The attention above and every installed one, whose tensors are on the GPU."""
    found = {implementation.name: implementation for implementation in runnable()}
    if request.param == "plain torch":
        yield varlen_attention
    else:
        with torch.device("cuda"):
            yield found[request.param].load()


#: Those whose windows it takes.
ALIGNED = {
    name: shape
    for name, shape in SHAPES.items()
    if shape[0].window is None or _flash_plan.plan_of(shape[0]).aligned
}


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ALIGNED.values(), ids=ALIGNED.keys())
def test_matches_reference(shape, dtype):
    check(emulated, make_inputs(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "mask", [GROUPS, BAGEL, TREE, FOREST], ids=["groups", "BAGEL", "tree", "forest"]
)
def test_heads_of_models(varlen, mask, width, dtype):
    function = functools.partial(emulated, varlen=varlen)
    inputs = make_inputs(mask, 14, 2, width, width, dtype)
    check(function, inputs, on_tensor_cores=varlen is not varlen_attention)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"softcap": 1.5}], ids=str)
def test_options(options):
    check(emulated, make_inputs(*SHAPES["questions and drawings"], torch.float32) | options)


def outputs_and_gradients(function: Any, mask: SpanMask) -> list[Tensor]:
    torch.manual_seed(1)
    sizes = [(mask.num_queries, 4), (mask.length, 2), (mask.length, 2)]
    leaves = [torch.randn(*s, 8, dtype=torch.float64, requires_grad=True) for s in sizes]
    out = function(*leaves, mask)
    return [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]


@settings(max_examples=200, deadline=None)
@given(mask=masks() | masks(windows=True))
def test_random_layouts(mask):
    if mask.window and not _flash_plan.plan_of(mask).aligned:
        mask = mask.select_queries(range(mask.length))
    ours = outputs_and_gradients(emulated, mask)
    for found, expected in zip(ours, outputs_and_gradients(reference, mask), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_more_than_two_calls():
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments[7])
        return varlen_attention(*arguments)

    for mask in (BAGEL, FOREST, TREE, GROUPS):
        emulated(*(torch.randn(mask.length, 1, 8) for _ in range(3)), mask, varlen=counted)
    assert calls == [True, False] * 4


def test_documents_are_not_copied():
    seen = []

    def spy(*arguments: Any) -> Tensor:
        seen.extend(arguments[:3])
        return varlen_attention(*arguments)

    inputs = [torch.randn(12, 1, 8) for _ in range(3)]
    # A causal span that continues another is one sequence with it.
    mask = SpanMask.from_spans([4, 0, 3, 5], [-1, 0, 1, -1], ["causal"] * 4)
    assert [block.rows for block in _flash_plan.blocks_of(mask)] == [(0, 7), (7, 12)]
    emulated(*inputs, mask, varlen=spy)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in inputs]


def test_keys_beyond_the_window_are_not_copied():
    mask = SpanMask.from_groups([([(50, "full")], [[(4, "causal")], [(3, "full")]])])
    assert _flash_plan.blocks_of(mask.with_window(6)) == [
        ((0, 50), [(0, 50)], False),
        ((50, 54), [(45, 50), (50, 54)], True),
        ((54, 57), [(45, 50), (54, 57)], False),
    ]


def test_selected_rows_are_sequences_that_end_with_their_keys():
    mask = SpanMask.from_spans([4, 3, 5], [-1, 0, 1], ["full", "causal", "causal"])
    mask = mask.select_queries([1, 3, 4, 6, 7, 8, 11])
    assert _flash_plan.blocks_of(mask) == [
        ((0, 2), [(0, 4)], False),
        ((2, 3), [(0, 4), (4, 5)], True),
        ((3, 6), [(0, 7), (7, 9)], True),
        ((6, 7), [(0, 7), (7, 12)], True),
    ]


def test_strides_and_stride_0_gradient():
    mask = GROUPS
    packed = torch.randn(mask.length, 8, 16, requires_grad=True)
    transposed = torch.randn(16, 2, mask.length, requires_grad=True)

    def run(function: Any) -> tuple[Tensor, ...]:
        out = function(packed[:, :4], packed[:, 4::2], transposed.permute(2, 1, 0), mask)
        return torch.autograd.grad(out, (packed, transposed), torch.ones(1).expand_as(out))

    for ours, expected in zip(run(emulated), run(reference), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_plan_is_made_once_and_dies_with_its_mask():
    mask = SpanMask.from_cu_seqlens([0, 3])
    plan = _flash_plan.plan_of(mask)
    assert _flash_plan.plan_of(mask) is plan
    assert plan.tables is plan.tables
    before = len(_flash_plan._PLANS)
    del mask
    gc.collect()
    assert len(_flash_plan._PLANS) < before


def test_a_plan_is_made_on_the_host_whatever_the_default_device():
    mask = SpanMask.from_groups([QUESTION]).to("meta")
    with torch.device("meta"):
        tables = _flash_plan.plan_of(mask).tables
        assert tables.keys.sources.is_meta
        assert [call.max_k for call in tables.calls] == [17, 19]


def test_a_plan_made_in_a_rollout_serves_the_backward_pass():
    mask = SpanMask.from_groups([([(4, "causal")], [[(2, "causal")]] * 2)])
    q = torch.randn(mask.length, 1, 8)
    with torch.inference_mode():
        emulated(q, q, q, mask)
    emulated(q.requires_grad_(), q, q, mask).sum().backward()
    assert q.grad.isfinite().all()


class SumInBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(x, sources)
        return x[sources]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, sources = ctx.saved_tensors
        summed = torch.zeros_like(x)
        for source, row in zip(sources, gradient, strict=True):
            summed[source] += row
        return summed, None


def summed_in_bf16(x: Tensor, gather: _flash_plan.Gather) -> Tensor:
    return SumInBf16.apply(x, gather.sources)


@pytest.mark.parametrize(
    ("gather", "expected"),
    [(_flash_attention._gather, 256 + 60), (summed_in_bf16, 256)],
    ids=["ours", "a mutant that sums in bf16"],
)
def test_gradients_of_copies_are_summed_in_fp32(gather, expected):
    mask = SpanMask.from_groups([([(1, "causal")], [[(1, "causal")]] * 61)])
    plan = _flash_plan.plan_of(mask).tables.keys
    x = torch.zeros(mask.length, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    copies = gather(x, plan)
    # bf16 has the even numbers only from 256 to 512: 256 + 1 is 256 again.
    upstream = torch.ones_like(copies)
    upstream[0] = 256
    upstream[plan.sources != 0] = 0
    (gradient,) = torch.autograd.grad(copies, x, upstream)
    assert (gradient[0] == expected).all()


def test_same_bits_in_every_run(varlen):
    def run() -> list[Tensor]:
        inputs = make_inputs(GROUPS, 14, 2, 64, 64, torch.bfloat16)
        leaves = [inputs[x].requires_grad_() for x in "qkv"]
        out = emulated(*leaves, inputs["mask"], varlen=varlen)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch's own attention has no other switch
    try:
        assert all(map(torch.equal, run(), run()))
    finally:
        torch.use_deterministic_algorithms(before)


def test_frozen_spans_get_no_gradient():
    mask = SpanMask.from_cu_seqlens([0, 3, 5]).freeze([0])
    leaves = [torch.randn(5, 1, 8, requires_grad=True) for _ in range(3)]
    dq, dk, dv = torch.autograd.grad(emulated(*leaves, mask).square().sum(), leaves)
    assert (dq[[1, 2, 4]] != 0).all()
    for gradient in (dk, dv):
        assert (gradient[:3] == 0).all()
        assert (gradient[3:] != 0).all()


# A question with an image and two answers; a text, a noisy image and the text that follows.
LENGTHS, PARENTS = (9, 5, 3, 1, 4, 7, 16, 4), (-1, 0, 1, 1, 3, -1, 5, 5)
MODES = ("full", "causal", "causal", "causal", "full", "causal", "full", "causal")
MIXED = SpanMask.from_spans(LENGTHS, PARENTS, MODES)


def with_parents(*parents: int) -> Any:
    other = SpanMask.from_spans(LENGTHS, parents, MODES).with_window(4)
    return lambda mask, **inputs: emulated(mask=other, **inputs)


def with_window(window: int | None) -> Any:
    return lambda mask, **inputs: emulated(mask=mask.with_window(window), **inputs)


def full_as_causal(*arguments: Any) -> Tensor:
    return varlen_attention(*arguments[:7], True, *arguments[8:])


def heads_mixed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    return varlen_attention(q, k.repeat(1, repeats, 1), v.repeat(1, repeats, 1), *rest)


def one_child_without(name: str) -> Any:
    def mutant(mask: SpanMask, **inputs: Any) -> Tensor:
        start = mask.span_offsets[-2]
        frozen = emulated(mask=mask, **inputs | {name: inputs[name].detach()})
        return torch.cat([emulated(mask=mask, **inputs)[:start], frozen[start:]])

    return mutant


MUTANTS: dict[str, Any] = {
    "diagonal aligned at the top left": functools.partial(
        emulated, varlen=functools.partial(varlen_attention, diagonal=lambda queries, keys: 0)
    ),
    "child sees its sibling": with_parents(-1, 0, 1, 2, 3, -1, 5, 5),
    "image span leaks into text": with_parents(-1, 0, 1, 1, 3, -1, 5, 6),
    "documents see each other": with_parents(-1, 0, 1, 1, 3, 1, 5, 5),
    "full treated as causal": functools.partial(emulated, varlen=full_as_causal),
    "scale ignored": lambda **inputs: emulated(**inputs | {"scale": 1.0}),
    "softcap ignored": lambda **inputs: emulated(**inputs | {"softcap": 0.0}),
    "GQA heads mixed": functools.partial(emulated, varlen=heads_mixed),
    "window ignored": with_window(None),
    "window longer by one": with_window(5),
    "dk misses one child": one_child_without("k"),
    "dv misses one child": one_child_without("v"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_rejects_mutant(mutant, dtype):
    inputs = make_inputs(MIXED.with_window(4), 4, 2, 16, 16, dtype) | {"softcap": 3.0}
    check(emulated, inputs)
    with pytest.raises(AssertionError, match="worst element"):
        check(mutant, inputs)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Takes no memory."""
    return torch.zeros(1, dtype=dtype).expand(shape)


LONG = SpanMask.from_groups([([(100_000, "causal")], [[(1, "causal")]] * 100)])
PAIR = SpanMask.from_cu_seqlens([0, 3])
DEFAULTS = {"mask": PAIR, "scale": 0.1, "softcap": 0.0, "return_lse": False}
REFUSED = {
    "fp32": ({"q": zeros(3, 1, 8, dtype=torch.float32)}, "takes fp16 and bf16, got torch.float32"),
    "log-sum-exp": ({"return_lse": True}, "its log-sum-exp has no gradient"),
    "wider values": ({"v": zeros(3, 1, 16)}, "values are as wide as its keys, got 16 and 8"),
    "odd width": ({name: zeros(3, 1, 12) for name in "qkv"}, "multiples of 8 wide, got 12"),
    "packing-invariant": ({"mask": PAIR.packing_invariant()}, "independent of the packing"),
    "half an image under a window": (
        {"mask": SpanMask.from_cu_seqlens([0, 3], False).with_window(2).select_queries([0, 1])},
        "the rows of a full span from some row to its last",
    ),
    "negative scale": ({"scale": -1.0}, "it takes scale > 0, got -1.0"),
    "too many copies": (
        {"mask": LONG} | {name: zeros(LONG.length, 8, 128) for name in "qkv"},
        "would copy the 100100 keys to 10000100 x 8 x 128 elements, beyond 2^31",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_a_reason(change, message):
    accepted = DEFAULTS | {name: zeros(3, 1, 8) for name in "qkv"}
    assert _flash_attention.why_not(**accepted) == ""
    assert message in _flash_attention.why_not(**accepted | change)


def test_runs_only_by_name_and_on_a_gpu():
    q = torch.randn(3, 1, 8)
    assert backends.resolve("packed_attention", [q], None).name != "flash"
    with pytest.raises(ValueError, match=r"flash: (torch sees no NVIDIA GPU|it takes fp16)"):
        packed_attention(q, q, q, PAIR, backend="flash")
    if runnable():
        with torch.device("cuda"), torch.no_grad():
            inputs = make_inputs(GROUPS, 4, 2, 64, 64, torch.bfloat16)
            expected = emulated(**inputs, varlen=runnable()[0].load())
            assert torch.equal(packed_attention(**inputs, backend="flash"), expected)


def test_no_other_op_has_it():
    with pytest.raises(ValueError, match="flash: grpo_loss has no flash kernel"):
        backends.resolve("grpo_loss", [torch.zeros(1)], "flash")
