"""The row kernels on a part of the columns, as ranks that share a vocabulary run them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runnable import WITH_KERNELS
from torch import Tensor

from lvrpo import backends
from lvrpo.distributed.plain import PlainKernels
from lvrpo.distributed.rows import of_all, with_targets_elsewhere
from lvrpo.dtypes import numbers
from lvrpo.ops.head.rows import OUTSIDE
from lvrpo.reference.gather_logprobs import gather_logprobs
from lvrpo.testing import check_against_plain

pytestmark = pytest.mark.usefixtures("poison_empty")

ROWS, TOKENS = 6, 15


def of_parts(
    name: str,
    logits: Tensor,
    ids: Tensor,
    index: Tensor,
    cuts: list[int],
    upstream: tuple[Tensor, Tensor | None],
    scale: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps, entropies and the gradient, a part of the columns at a time."""
    found = PlainKernels() if name == "torch" else backends.named(name)
    given = numbers(*scale, OUTSIDE)
    bounds = list(itertools.pairwise(cuts))
    own = [torch.where((ids >= a) & (ids < b), ids - a, OUTSIDE) for a, b in bounds]
    parts = [
        found.op("gather_logprobs_fwd")(logits[:, a:b], token, index, None, given, True, True)[1:]
        for (a, b), token in zip(bounds, own, strict=True)
    ]
    _, lse, entropy, _ = of_all(*(torch.stack(x) for x in zip(*parts, strict=True)))
    dlogprobs, dentropy = upstream
    dlogits = torch.full_like(logits, torch.nan)
    for (a, b), token in zip(bounds, own, strict=True):
        away = torch.where((token == OUTSIDE) & (ids >= 0), dlogprobs, 0.0)
        elsewhere = lse.new_zeros(ROWS).index_add(0, index, away)
        kernel_takes = with_targets_elsewhere(dentropy, entropy, elsewhere)
        found.op("gather_logprobs_bwd")(
            *(dlogits[:, a:b], dlogprobs, kernel_takes[0], logits[:, a:b], token, index, None),
            *(lse, kernel_takes[1], given),
        )
    return lse, entropy, dlogits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.sets(st.integers(1, 40), min_size=1, max_size=3),
    # Of the entropy, from what outweighs the targets' to what cannot carry them.
    weight=st.sampled_from([None, 0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e4]),
    scale=st.sampled_from([(1.0, 0.0), (0.7, 5.0)]),
)
def test_the_gradient_of_parts_is_that_of_the_whole(backend, dtype, seed, cuts, weight, scale):
    if backend not in (*WITH_KERNELS, "torch"):
        pytest.skip(f"backend {backend} has no row kernels")
    torch.manual_seed(seed)
    logits = (torch.randn(ROWS, 41) * 3).to(dtype)
    ids, index = torch.randint(0, 41, (TOKENS,)), torch.randint(0, ROWS - 1, (TOKENS,))
    ids[4] = -100
    dlogprobs = torch.randn(TOKENS).to(dtype) / TOKENS
    dentropy = None if weight is None else (weight * torch.randn(ROWS)).to(dtype)
    upstream = dlogprobs, dentropy
    bounds = [0, *sorted(cuts), 41]
    ours = of_parts(
        *(backend, logits, torch.where(ids == -100, OUTSIDE, ids), index, bounds, upstream, scale)
    )

    def whole(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.detach().to(dtype).requires_grad_()
        temperature, softcap = scale
        options = {"temperature": temperature, "softcap": softcap or None, "return_entropy": True}
        logprobs, entropy = gather_logprobs(leaf, ids, index, **options)
        total = (logprobs * dlogprobs.to(dtype)).sum()
        if dentropy is not None:
            total = total + (entropy * dentropy.to(dtype)).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        y = softcap * (leaf / softcap).tanh() if softcap else leaf
        return (y / temperature).logsumexp(dim=1).detach(), entropy.detach(), gradient

    gold, plain = whole(torch.float64), whole(dtype)
    z = logits.detach().double() / scale[0]
    size = 1 + 2 * float(z.abs().max())
    sent = torch.zeros(ROWS).to(z).index_add(0, index, dlogprobs.double().abs())
    sent = sent + (0.0 if dentropy is None else dentropy.double().abs() * size)
    capped = scale[1] * (logits.double() / scale[1]).tanh() if scale[1] else logits.double()
    summands = (capped / scale[0]).softmax(dim=1) * sent[:, None]
    asked = ids != -100
    summands.index_put_((index[asked], ids[asked]), dlogprobs[asked].double().abs(), True)
    scales = size, size, summands * size / scale[0]
    for x, y, z, of_x in zip(ours, gold, plain, scales, strict=True):
        check_against_plain(x, y, z, scale=of_x)
