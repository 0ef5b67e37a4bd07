"""Where the gradient goes: in place of the logits, to memory of the caller, in which dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from runnable import WITH_KERNELS

import lvrpo
from lvrpo import backends
from lvrpo.dtypes import numbers

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poison_empty")


kernels = pytest.mark.parametrize("backend", WITH_KERNELS, indirect=True)


def target_ids():
    return torch.tensor([3, 0, 1999, 77])


def backward_into(dlogits, logits, backend, softcap=0.0, vocab_range=None):
    """The op's backward after its forward, with fixed upstream gradients."""
    given, ids = numbers(1.3, softcap, -100), target_ids()
    op = backends.named(backend).op
    _, lse, entropy, _ = op("gather_logprobs_fwd")(
        logits, ids, None, vocab_range, given, True, False
    )
    dlogprobs, dentropy = torch.linspace(-1, 2, 8).to(lse).view(2, 4)
    saved = (logits, ids, None, vocab_range, lse, entropy)
    op("gather_logprobs_bwd")(dlogits, dlogprobs, dentropy, *saved, given)
    return dlogits


# Not from fp64 to 16 bits, where a compiler may round twice.
PAIRS = [p for p in itertools.product(DTYPES, DTYPES) if p[0] != torch.float64 or p[1].itemsize > 2]


@pytest.mark.parametrize(("dtype", "out"), PAIRS, ids=str)
@kernels
def test_a_gradient_in_another_dtype_is_the_exact_one_rounded_once(backend, dtype, out):
    logits = (torch.randn(4, 2000) * 3).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    wide = backward_into(torch.empty(4, 2000, dtype=acc), logits, backend)
    ours = backward_into(torch.empty(4, 2000, dtype=out), logits, backend)
    assert torch.equal(ours, wide.to(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("ranged", [False, True])
@kernels
def test_in_place_gives_the_same_bits(backend, dtype, softcap, ranged):
    vocab_range = torch.tensor([[0, 2000], [0, 1], [1500, 2000], [70, 80]]) if ranged else None
    options = {"backend": backend, "softcap": softcap, "vocab_range": vocab_range}
    memory = (torch.randn(4, 2050) * 3).to(dtype)
    logits = memory[:, 10:2010]
    beside = memory.clone()
    apart = backward_into(torch.empty(4, 2000, dtype=dtype), logits, **options)
    strided = backward_into(torch.zeros(4, 2100, dtype=dtype)[:, 50:2050], logits, **options)
    assert torch.equal(memory, beside)
    backward_into(logits, logits, **options)
    assert torch.equal(logits, apart)
    assert torch.equal(strided, apart)
    assert torch.equal(memory[:, :10], beside[:, :10])
    assert torch.equal(memory[:, 2010:], beside[:, 2010:])


def unfit_dlogits():
    logits = torch.zeros(4, 2000)
    memory = torch.zeros(4, 2001)
    yield "one column further", memory[:, 1:], memory[:, :-1]
    yield "one row further", memory[1:, :2000], memory[:-1, :2000]
    narrow = memory.view(torch.bfloat16)[:, :2001]
    yield "another dtype in the same memory", narrow, memory
    yield "rows that overlap", torch.zeros(2000).expand(4, 2000), logits
    yield "columns apart", torch.zeros(4, 4000)[:, ::2], logits
    yield "too few rows", torch.zeros(3, 2000), logits
    yield "too few columns", torch.zeros(4, 1999), logits
    yield "integers", torch.zeros(4, 2000, dtype=torch.int32), logits
    yield "one-dimensional", torch.zeros(8000), logits


UNFIT = {name: pair for name, *pair in unfit_dlogits()}


@pytest.mark.parametrize(("dlogits", "logits"), UNFIT.values(), ids=UNFIT.keys())
def test_the_backward_refuses_memory_that_does_not_fit(dlogits, logits):
    rows = len(logits)
    ids, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    with pytest.raises(RuntimeError):
        torch.ops.lvrpo.gather_logprobs_bwd(
            dlogits, ones, None, logits, ids, None, None, ones, None, 1.0, 0.0, -100
        )


def in_place(logits, **options):
    return lvrpo.gather_logprobs(logits, target_ids(), inplace_backward=True, **options)


@kernels
def test_inplace_backward_overwrites_the_logits(backend):
    source = torch.randn(4, 2000, requires_grad=True)
    apart = lvrpo.gather_logprobs(source, target_ids(), backend=backend)
    (expected,) = torch.autograd.grad(apart.sum(), source)
    logits = source * 1.0
    in_place(logits, backend=backend).sum().backward()
    assert torch.equal(source.grad, expected)
    assert torch.equal(logits, expected)


def test_the_default_leaves_the_logits_alone(backend):
    logits = torch.randn(4, 2000, requires_grad=True)
    before = logits.detach().clone()
    lvrpo.gather_logprobs(logits, target_ids(), backend=backend).sum().backward()
    assert torch.equal(logits, before)


@kernels
def test_inplace_backward_is_an_error_where_the_logits_are_needed_later(backend):
    source = torch.randn(4, 2000, requires_grad=True)
    logits = source * 1.0
    # Its backward needs the logits, and runs after that of gather_logprobs, which is newer.
    other = logits.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + in_place(logits, backend=backend).sum()).backward()


@kernels
def test_inplace_backward_is_an_error_after_a_change_of_the_logits(backend):
    logits = torch.randn(4, 2000, requires_grad=True) * 1.0
    logprobs = in_place(logits, backend=backend)
    with torch.no_grad():
        logits.mul_(2.0)
    kept = logits.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()
    assert torch.equal(logits, kept)


@kernels
def test_inplace_backward_runs_once(backend):
    logits = torch.randn(4, 2000, requires_grad=True) * 1.0
    loss = in_place(logits, backend=backend).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(2000).expand(4, 2000), torch.zeros(4, 4000)[:, ::2]],
    ids=["rows", "cols"],
)
def test_inplace_backward_needs_memory_of_its_own(backend, logits):
    with pytest.raises(ValueError, match="logits has strides"):
        in_place(logits, backend=backend)


@kernels
def test_inplace_backward_compiles_and_then_does_without(backend):
    def function(x):
        return in_place(x * 1.0, backend=backend).sum()

    source = torch.randn(4, 2000, requires_grad=True)
    torch.compile(function, fullgraph=True, backend="aot_eager")(source).backward()
    (expected,) = torch.autograd.grad(lvrpo.gather_logprobs(source, target_ids()).sum(), source)
    torch.testing.assert_close(source.grad, expected)
