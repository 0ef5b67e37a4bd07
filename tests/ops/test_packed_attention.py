from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import pytest
import torch
from mutants.packed_attention import MUTANTS, WINDOW_MUTANTS, reference
from runnable import RUNNABLE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lvrpo import backends
from lvrpo.dtypes import numbers
from lvrpo.masks import SpanMask
from lvrpo.masks.schedule import schedule
from lvrpo.ops.packed_attention import packed_attention
from lvrpo.testing import DEFAULT_ULPS, check_op

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch):
    """Each costs the interpreter as much as its whole tile; the shapes still take several."""
    if "triton" in RUNNABLE and backends.triton_interprets():
        kernels = importlib.import_module("lvrpo.kernels.packed_attention")
        larger = {256: kernels._tiles(64, 64, 1)}
        monkeypatch.setattr(kernels, "WIDE", dict.fromkeys(kernels.WIDE, larger))


QUESTION = ([(9, "full"), (5, "causal")], [[(3, "causal")], [(1, "causal"), (4, "full")], []])
DRAWING = ([(7, "causal")], [[(16, "full")]] * 3)

BAGEL = SpanMask.from_bagel(
    [6, 9, 9, 4, 9, 5, 20],
    ["causal", "noise", "full", "causal", "noise", "causal", "full"],
    [42, 20],
)
TREE = SpanMask.from_spans([3, 0, 5, 2, 0, 6], [-1, 0, 1, 2, 1, 0], ["full", "causal"] * 3)
FOREST = SpanMask.from_spans([90, 40, 70, 30], [-1, 0, 0, 2], ["causal", "full"] * 2)
GROUPS = SpanMask.from_groups([QUESTION, DRAWING])

SOME = [0, 1, 2, 60, 80, 81, 88, 89, 95, 128, 150, 199, 205, 229]

# mask, query heads, key heads, D, Dv
SHAPES = {
    "questions and drawings": (GROUPS, 4, 2, 24, 24),
    "BAGEL pack": (BAGEL, 7, 1, 33, 12),
    "one token": (SpanMask.from_cu_seqlens([0, 1]), 1, 1, 8, 8),
    "tree of depth 4, empty spans": (TREE, 2, 2, 16, 16),
    "many tiles, a parent's keys scattered": (FOREST, 6, 2, 16, 40),
    "one long document, cut into units": (SpanMask.from_cu_seqlens([0, 1000]), 1, 1, 16, 16),
    "more heads per key head than lanes": (SpanMask.from_cu_seqlens([0, 5, 9], False), 70, 1, 8, 8),
    "some queries": (GROUPS.select_queries([3, 11, 15, 29, 30, 70]), 4, 2, 16, 16),
    "padded": (SpanMask.from_groups([QUESTION]).pad_to(30), 2, 1, 16, 16),
    "a group with a window": (GROUPS.with_window(9), 4, 2, 16, 16),
    "many tiles with a window": (FOREST.with_window(40), 6, 2, 16, 16),
    "some queries with a window": (FOREST.with_window(35).select_queries(SOME), 2, 1, 16, 8),
}


def here(mask: SpanMask) -> SpanMask:
    """On the device of the backend that is tested."""
    return mask.to(torch.get_default_device())


def make_inputs(
    mask: SpanMask, heads: int, kv_heads: int, width: int, v_width: int, dtype: torch.dtype
) -> dict[str, Any]:
    torch.manual_seed(mask.length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    return {
        "q": normal(mask.num_queries, heads, width),
        "k": normal(mask.length, kv_heads, width),
        "v": normal(mask.length, kv_heads, v_width),
        "mask": here(mask),
    }


def scales(inputs: dict[str, Any], backend: str = "cpp") -> dict[str, Tensor]:
    # Every result is a sum over keys or queries of probabilities times something; a probability
    # exp(z - lse) has a relative error of |z| ulps. Upstream values are of the order 1 / outputs.
    q, k, v = (inputs[name].double() for name in "qkv")
    repeats = q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scale = inputs.get("scale", q.shape[2] ** -0.5)
    z = scale * torch.einsum("qhd,khd->hqk", q, wide_k)
    p = z.masked_fill(~inputs["mask"].to_dense(), -torch.inf).softmax(-1).nan_to_num(0.0)
    largest = 2 + float(z.abs().max())
    narrow = torch.finfo(inputs["q"].dtype).eps / torch.finfo(torch.float32).eps
    if backend == "triton":
        # Tensor cores take probabilities, and ds, in the dtype of the inputs.
        largest += max(narrow, 1.0) / DEFAULT_ULPS
    out = torch.einsum("hqk,khd->qhd", p, wide_v.abs())
    dout, dlse = 1 / max(1, out.numel()), 1 / max(1, out[:, :, 0].numel())
    dp = dout * wide_v.abs().sum(-1).T[:, None]
    # delta = sum dout * out is formed from the output as stored: half a unit in the last place of a
    # narrow dtype is in every ds, and counts DEFAULT_ULPS times less where that many are allowed.
    ulps = max(DEFAULT_ULPS, narrow)
    delta = (p * dp).sum(-1, keepdim=True)
    ds = p * (largest * (dp + delta + dlse) + ulps / DEFAULT_ULPS / 2 * delta)
    dk = scale * torch.einsum("hqk,qhd->khd", ds, q.abs()).unflatten(1, (-1, repeats)).sum(2)
    dv = dout * p.sum(1).T.unflatten(1, (-1, repeats)).sum(2)[:, :, None].expand_as(v)
    return {
        "out0": out * largest,
        "out1": torch.tensor(2 + float(z.abs().max())),
        "dq": scale * torch.einsum("hqk,khd->qhd", ds, wide_k.abs()),
        "dk": dk,
        "dv": dv * largest,
    }


def check(function: Any, inputs: dict[str, Any], backend: str = "cpp") -> None:
    check_op(function, reference, inputs, differentiable="qkv", scales=scales(inputs, backend))


def op(backend: str | None) -> Any:
    return functools.partial(packed_attention, return_lse=True, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(backend, shape, dtype):
    check(op(backend), make_inputs(*shape, dtype), backend)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"softcap": 1.5}, {"scale": 0.0}], ids=str)
def test_options(backend, options):
    inputs = make_inputs(*SHAPES["questions and drawings"], torch.float32) | options
    check(op(backend), inputs, backend)


def test_equals_dense_attention(backend):
    inputs = make_inputs(*SHAPES["questions and drawings"], torch.float64)
    q, k, v = (inputs[name].transpose(0, 1) for name in "qkv")
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=inputs["mask"].to_dense(), enable_gqa=True
    )
    out = packed_attention(**inputs, backend=backend)
    torch.testing.assert_close(out, dense.transpose(0, 1))


def test_shared_prompt_equals_one_copy_per_completion(backend):
    lengths = [5, 1, 8]
    shared = SpanMask.from_groups([([(20, "causal")], [[(n, "causal")] for n in lengths])])
    q, k, v = (torch.randn(shared.length, 2, 16, dtype=torch.float64) for _ in range(3))
    out = packed_attention(q, k, v, here(shared), backend=backend)
    start = 20
    for length in lengths:
        rows = [*range(20), *range(start, start + length)]
        alone = here(SpanMask.from_cu_seqlens([0, len(rows)]))
        expected = packed_attention(q[rows], k[rows], v[rows], alone, backend=backend)
        torch.testing.assert_close(out[start : start + length], expected[20:])
        start += length


def test_keys_that_no_query_sees_are_not_read(backend):
    mask = SpanMask.from_groups([([(4, "causal")], [[(6, "causal")]] * 3)])
    inputs = make_inputs(mask, 2, 1, 8, 8, torch.float32)
    full = packed_attention(**inputs, backend=backend)
    # Decoding: the third token of children 0 and 2; nothing behind it was written yet.
    rows = [4 + 2, 16 + 2]
    unwritten = [7, 8, 9, *range(10, 16), 19, 20, 21]
    k, v = inputs["k"].clone(), inputs["v"].clone()
    k[unwritten] = v[unwritten] = torch.nan
    q = inputs["q"][rows].requires_grad_()
    leaves = (q, k.requires_grad_(), v.requires_grad_())
    out = packed_attention(*leaves, here(mask).select_queries(rows), backend=backend)
    torch.testing.assert_close(out, full[rows])
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()


def test_a_row_that_sees_no_key(backend):
    mask = here(SpanMask.from_cu_seqlens([0, 3])).pad_to(5)
    leaves = [torch.randn(5, 2, 4, requires_grad=True) for _ in range(3)]
    out, lse = packed_attention(*leaves, mask, return_lse=True, backend=backend)
    assert (out[3:] == 0).all()
    assert (lse[3:] == -torch.inf).all()
    for gradient in torch.autograd.grad(out.sum() + lse[:3].sum(), leaves):
        assert (gradient[3:] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "mask", [SpanMask.from_spans([], [], []), SpanMask.from_cu_seqlens([0, 0])]
)
def test_empty_input(backend, mask):
    leaves = [torch.randn(0, 2, 8, requires_grad=True) for _ in range(3)]
    out, lse = packed_attention(*leaves, here(mask), return_lse=True, backend=backend)
    (out.sum() + lse.sum()).backward()
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)
    assert leaves[0].grad.shape == (0, 2, 8)


@pytest.mark.parametrize(("heads", "width", "v_width"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_no_heads_or_no_width(backend, heads, width, v_width):
    # With padding, whose rows are filled with zeros.
    mask = here(SpanMask.from_cu_seqlens([0, 3])).pad_to(5000)
    shapes = [(5000, heads, width), (5000, 1, width), (5000, 1, v_width)]
    leaves = [torch.zeros(s, requires_grad=True) for s in shapes]
    out, lse = packed_attention(*leaves, mask, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(out.sum() + lse[:3].sum(), leaves)
    assert out.shape == (5000, heads, v_width)
    for gradient, shape in zip(gradients, shapes, strict=True):
        assert gradient.shape == shape


def test_no_query_selected(backend):
    mask = here(SpanMask.from_cu_seqlens([0, 3])).select_queries([])
    k = torch.randn(3, 1, 8, requires_grad=True)
    out = packed_attention(torch.randn(0, 2, 8), k, torch.randn(3, 1, 8), mask, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    assert (k.grad == 0).all()


def test_strides_and_stride_0_gradient(backend):
    mask = here(GROUPS)
    packed = torch.randn(mask.length, 8, 16, requires_grad=True)
    transposed = torch.randn(16, 2, mask.length, requires_grad=True)

    def run(function: Any) -> list[Tensor]:
        q, k = packed[:, :4], packed[:, 4::2]
        out, lse = function(q, k, transposed.permute(2, 1, 0), mask)
        upstream = (torch.ones(1).expand_as(out), torch.ones(1).expand_as(lse))
        return list(torch.autograd.grad((out, lse), (packed, transposed), upstream))

    for ours, expected in zip(run(op(backend)), run(reference), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_on_any_number_of_threads(threads):
    def run() -> list[Tensor]:
        results = []
        for name in ("one long document, cut into units", "questions and drawings"):
            inputs = make_inputs(*SHAPES[name], torch.float32)
            leaves = [inputs[x].requires_grad_() for x in "qkv"]
            out, lse = op(None)(**inputs)
            results += [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)]
        return results

    expected, before = run(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(backend, softcap):
    mask = SpanMask.from_spans([2, 2, 1, 2], [-1, 0, 0, -1], ["causal", "full", "causal", "full"])
    shapes = [(7, 2, 3), (7, 1, 3), (7, 1, 2)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    function = functools.partial(op(backend), mask=here(mask), softcap=softcap)
    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", ["questions and drawings", "a group with a window"])
def test_opcheck(name):
    mask, *shape = SHAPES[name]
    inputs = make_inputs(mask, *shape, torch.float32)
    tensors = [inputs[name] for name in "qkv"]
    tables = (mask.q_lo, mask.q_hi, mask.rows, mask.spans, mask.runs, mask.positions)
    forward = torch.ops.lvrpo.packed_attention_fwd
    values = numbers(0.2, 0.0, mask.window or 0)
    torch.library.opcheck(forward.default, (*tensors, *tables, None, values))
    out, lse = forward(*tensors, *tables, None, values)
    arguments = (
        torch.randn_like(out),
        torch.randn_like(lse),
        *tensors,
        out,
        lse,
        *tables,
        *[None] * 4,
        values,
    )
    torch.library.opcheck(torch.ops.lvrpo.packed_attention_bwd.default, arguments)


def as_on_a_gpu(mask: SpanMask) -> SpanMask:
    """With the schedule that the interpreter otherwise makes in the call."""
    return dataclasses.replace(mask, schedule=mask.schedule or schedule(mask))


def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs(*SHAPES["questions and drawings"], torch.float32)
    mask = as_on_a_gpu(inputs.pop("mask"))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = packed_attention(q, k, v, mask, return_lse=True, backend=backend)
        return out.sum() + lse.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in inputs.values()]
    ours = torch.autograd.grad(compiled(*leaves), leaves)
    for gradient, expected in zip(
        ours, torch.autograd.grad(function(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_a_new_layout_does_not_recompile(backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = functools.partial(packed_attention, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    # The interpreter is slow; the reference is traced document by document.
    step, most = {"triton": (20, 4), "torch": (100, 3)}.get(backend, (1, 2))
    for length in range(2, 202, step):
        children = [[(length, "full")]] * (2 + length % 5)
        mask = SpanMask.from_groups([([(length, "causal")], children)])
        q, k, v, mask = make_inputs(mask, 4, 2, 8, 8, torch.float32).values()
        compiled(q, k, v, as_on_a_gpu(mask))
    # For the first length, for all others, and for those tables that the first two had alike.
    assert counter.frame_count <= most


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allowance", ["cpp", "triton"], ids=["vectors", "tensor cores"])
def test_rule_rejects_mutant(mutant, dtype, allowance):
    mask = SpanMask.from_groups([QUESTION, DRAWING])
    inputs = make_inputs(mask, 4, 2, 16, 16, dtype) | {"softcap": 3.0}
    with pytest.raises(AssertionError):
        check(mutant, inputs, allowance)


@pytest.mark.parametrize("mutant", WINDOW_MUTANTS.values(), ids=WINDOW_MUTANTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allowance", ["cpp", "triton"], ids=["vectors", "tensor cores"])
def test_rule_rejects_mutant_of_a_window(mutant, dtype, allowance):
    mask = SpanMask.from_groups([QUESTION, DRAWING]).with_window(5)
    inputs = make_inputs(mask, 4, 2, 16, 16, dtype)
    with pytest.raises(AssertionError):
        check(mutant, inputs, allowance)


def rows_of(
    count: int, heads: int = 2, width: int = 4, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.zeros(count, heads, width, dtype=dtype)


BAD = {
    "q of another length": ({"q": rows_of(4)}, "q has 4 rows, the mask 5 queries"),
    "k of another length": ({"k": rows_of(6)}, "k has 6 rows, the mask 5"),
    "v of another length": ({"v": rows_of(0)}, "v has 0 rows, the mask 5"),
    "no heads": ({"q": torch.zeros(5, 4)}, r"q has shape \(5, 4\), expected \[Lq, Hq, D\]"),
    "k of another dtype": ({"k": rows_of(5, dtype=torch.float64)}, "k is torch.float64, q is"),
    "8 bits": ({n: rows_of(5).to(torch.float8_e5m2) for n in "qkv"}, "q is torch.float8_e5m2"),
    "integers": ({"q": rows_of(5, dtype=torch.int64)}, "q is torch.int64"),
    "k of another width": ({"k": rows_of(5, width=3)}, "k has head width 3, q has 4"),
    "heads not a multiple": ({"q": rows_of(5, heads=3)}, "q has 3 heads, not a multiple of k's 2"),
    "k and v heads differ": ({"v": rows_of(5, heads=1)}, "k has 2 heads, v has 1"),
    "not a mask": ({"mask": torch.ones(5, 5)}, "mask is a Tensor"),
    "scale NaN": ({"scale": float("nan")}, "scale is nan"),
    "scale infinite": ({"scale": float("inf")}, "scale is inf"),
    "negative softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "dropout": ({"dropout_p": 0.1}, "dropout_p is 0.1, expected 0"),
    "window_size": ({"window_size": (128, 0)}, r"is \(128, 0\), expected None.*mask.with_window"),
    "unknown backend": ({"backend": "cudnn"}, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, change, message):
    mask = here(SpanMask.from_cu_seqlens([0, 2, 5]))
    arguments = {name: rows_of(5) for name in "qkv"} | {"mask": mask, "backend": backend}
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments | change)


def test_heads_that_no_kernel_holds_go_to_another_backend():
    q = torch.randn(3, 1, 300)
    mask = SpanMask.from_cu_seqlens([0, 3])
    assert packed_attention(q, q, q, mask).shape == q.shape
    if "triton" in RUNNABLE:
        q = torch.zeros(3, 1, 300, device=torch.get_default_device())
        for dtype, widest in ((torch.float32, 256), (torch.float64, 128)):
            x = q.to(dtype)
            with pytest.raises(ValueError, match=f"up to {widest} wide, got 300"):
                packed_attention(x, x, x, here(mask), backend="triton")


def test_the_op_refuses_tables_that_do_not_fit():
    mask = SpanMask.from_groups([DRAWING])
    q = torch.zeros(mask.length, 1, 8)
    tables = [mask.q_lo, mask.q_hi, mask.rows, mask.spans, mask.runs]
    no_window, values = (None, None), numbers(1.0, 0.0, 0)
    for broken, value in ((2, mask.rows + 1), (3, mask.spans + 1), (4, mask.runs + mask.length)):
        changed = [value if i == broken else table for i, table in enumerate(tables)]
        with pytest.raises(RuntimeError, match="lvrpo"):
            torch.ops.lvrpo.packed_attention_fwd(q, q, q, *changed, *no_window, values)


def test_the_op_refuses_runs_that_do_not_ascend():
    mask = SpanMask.from_spans([2, 2, 2, 2], [-1, 0, 0, 2], ["causal"] * 4)
    assert mask.runs.tolist() == [[0, 2], [0, 2], [4, 6]]
    last = mask.select_spans([3])
    backwards = mask.runs[[0, 2, 1]]
    q, k, values = torch.zeros(2, 1, 8), torch.zeros(8, 1, 8), numbers(1.0, 0.0, 0)
    with pytest.raises(RuntimeError, match="do not ascend"):
        torch.ops.lvrpo.packed_attention_fwd(
            q, k, k, last.q_lo, last.q_hi, last.rows, last.spans, backwards, None, None, values
        )
