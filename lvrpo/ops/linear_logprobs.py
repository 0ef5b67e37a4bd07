"""log p(token) from hidden states and the weight of the output layer: no [R, V] tensor.

R rows of hidden states, H hidden width, V vocabulary, T target tokens. How the rows are chunked:
docs/ops/linear_logprobs.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import library
from lvrpo.dtypes import numbers
from lvrpo.ops.head import logprobs as results
from lvrpo.ops.head.linear import LinearHead, dtypes_of, empty_gradients, project, split
from lvrpo.ops.head.rows import OUTSIDE, HeadRows, refuse_rows
from lvrpo.ops.head.targets import Ids, VocabRange
from lvrpo.reference.linear_logprobs import linear_logprobs as reference_linear_logprobs

OP = "linear_logprobs"
#: For messages.
LOGITS = "hidden @ weight.T + bias"


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: VocabRange = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    return_sum_squares: Literal[False] = ...,
    memory_budget: int | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: VocabRange = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    return_sum_squares: Literal[False] = ...,
    memory_budget: int | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: VocabRange = ...,
    ignore_index: int = ...,
    return_entropy: bool = ...,
    return_sum_squares: Literal[True],
    memory_budget: int | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, ...]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: VocabRange = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_sum_squares: bool = False,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`gather_logprobs(hidden @ weight.T + bias, ...)`, a chunk of rows at a time.

    Differentiable in `hidden`, `weight` and `bias`. The backward projects the rows again, which
    makes four GEMMs in all; `linear_grpo_loss` needs three, and does more.

    The rows of hidden states are [R], or padded [B, C]: what holds for R below holds for any
    leading shape. Under autocast as F.linear: hidden, weight and bias go to its dtype (fp64 does
    not), sums stay fp32, gradients come back in the dtypes that were given.

    Args:
        hidden: [R, H] or [B, C, H] fp32, fp64, bf16 or fp16.
        weight: [V, H] of the same dtype (of any, under autocast); may be shared with the embedding.
        token_ids: one for each row, of any integer dtype. `ignore_index` marks a token without a
            target: log-prob 0, gradient 0.
        row_index: the row (of the flattened ones) that predicts each token, of the shape of
            token_ids, which then is free.
        bias: [V] of the same dtype.
        temperature: divides the logits; finite, > 0. A model whose logits are multiplied by a
            `logit_scale` s takes temperature / s and softcap / s.
        softcap: cap of `softcap * tanh(logits / softcap)`, applied before the temperature; > 0.
        vocab_range: columns outside [low, high) have probability zero. One (low, high) pair
            multiplies that slice of the weight only; [R, 2] of integers gives each row its own.
        ignore_index: see `token_ids`.
        return_entropy: also return the entropy of every row. A row that no token uses may hold
            anything: without a finite log-sum-exp its entropy is 0 and has no gradient.
        return_sum_squares: also return the sum of squared probabilities of every row; 0 for such a
            row.
        memory_budget: bytes of the logits that exist at a time. None: 3.8 GB on a GPU; on a CPU 12
            MiB or what 112 rows take, whichever is more.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run; the
            reference, "torch", has all logits at once.

    Returns:
        logprobs: of the shape of token_ids, fp32 (fp64 from fp64), nats. Logits are sums in fp32
            that nothing rounds.
        entropy: [R] same dtype, nats, only with `return_entropy`. Differentiable too.
        sum_squares: [R] same dtype, in (0, 1], only with `return_sum_squares`; no gradient.

    Raises:
        ValueError: as `gather_logprobs`; also when the dtypes or widths of hidden, weight and bias
            differ, or memory_budget is too small for one row.
    """
    checks.check_scale(OP, temperature, softcap)
    head = project(
        OP, hidden, weight, bias, token_ids, row_index, vocab_range, ignore_index, memory_budget
    )
    targets = head.targets
    chosen = backends.resolve(OP, (*head.factors(), *targets.indices()), backend)
    functional = chosen.functional(OP, reference_linear_logprobs)
    of_rows: list[Tensor]
    if functional is not None:
        with checks.without_autocast(head.hidden):
            logprobs, entropy, *others = functional(
                *(head.hidden, head.weight, targets.token_ids, targets.row_index),
                bias=head.bias,
                temperature=temperature,
                softcap=softcap,
                vocab_range=targets.ranges,
                ignore_index=ignore_index,
                return_entropy=True,
                return_sum_squares=return_sum_squares,
            )
        refuse_rows(OP, entropy, LOGITS)
        of_rows = [*[entropy] * return_entropy, *others]
    else:
        options = _Options(
            indices=head.indices(),
            numbers=numbers(temperature, softcap or 0.0, OUTSIDE),
            wanted=(return_entropy, return_sum_squares),
            how=(*head.columns, head.most, chosen.name),
        )
        logprobs, entropy, sum_squares, lse = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
            *head.factors(), options
        )
        of_rows = [*[entropy] * return_entropy, *[sum_squares] * return_sum_squares]
        of_rows = results.settle(
            *(targets, lse, of_rows),
            lambda bad: refuse_rows(OP, torch.where(bad, lse, 0.0), LOGITS),
        )
    return results.shape_results(targets, logprobs, of_rows)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `lvrpo::linear_logprobs_fwd` takes besides the factors, in its order.

    Attributes:
        indices: as `HeadRows` takes targets.
        numbers: of the softmax.
        wanted: whether entropies, and whether sums of squares.
        how: the first column and one past the last, rows at once, and the backend.
    """

    indices: tuple[Tensor, Tensor | None, Tensor | None]
    numbers: Tensor
    wanted: tuple[bool, bool]
    how: tuple[int, int, int, str]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (hidden, weight, bias, *options.indices, options.numbers)
        logprobs, lse, entropy, sum_squares = torch.ops.lvrpo.linear_logprobs_fwd(
            *inputs, *options.wanted, *options.how
        )
        ctx.save_for_backward(*inputs, lse, entropy)
        ctx.with_entropy, ctx.how = options.wanted[0], options.how
        ctx.mark_non_differentiable(sum_squares, lse)
        return logprobs, entropy, sum_squares, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor, dentropy: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        gradients = torch.ops.lvrpo.linear_logprobs_bwd(
            *(dlogprobs, dentropy if ctx.with_entropy else None),
            *(*ctx.saved_tensors, needs, *ctx.how),
        )
        dhidden, dweight, dbias = (
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )
        return dhidden, dweight, dbias, None


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    numbers: Tensor,
    with_entropy: bool,
    with_sum_squares: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = dtypes_of(hidden)[1]
    rows = hidden.shape[0]
    return (
        hidden.new_empty(token_ids.shape, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if with_entropy else 0, dtype=dtype),
        hidden.new_empty(rows if with_sum_squares else 0, dtype=dtype),
    )


@library.composite("linear_logprobs_fwd", _fwd_fake, of=["gather_logprobs"])
def _fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    numbers: Tensor,
    with_entropy: bool,
    with_sum_squares: bool,
    low: int,
    high: int,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chunks = split(0, len(hidden), most)
    head = LinearHead(hidden, weight, bias, (low, high), chunks)
    rows = HeadRows(head, backends.named(backend), numbers, token_ids, row_index, vocab_range)
    for chunk in chunks:
        rows.forward(chunk, with_entropy, with_sum_squares)
    entropy = rows.entropy if with_entropy else head.like
    # The op may not return one tensor twice.
    sum_squares = rows.sum_squares if with_sum_squares else head.like.new_empty(0)
    return rows.logprobs, rows.lse, entropy, sum_squares


def _bwd_fake(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    numbers: Tensor,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, bias, needs, hidden.dtype)


@library.composite("linear_logprobs_bwd", _bwd_fake, of=["gather_logprobs"])
def _bwd(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    numbers: Tensor,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    low: int,
    high: int,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = split(0, len(hidden), most)
    head = LinearHead(hidden, weight, bias, (low, high), chunks, needs)
    rows = HeadRows(head, backends.named(backend), numbers, token_ids, row_index, vocab_range)
    rows.lse, rows.entropy = lse, entropy
    for chunk in chunks:
        rows.backward(chunk, dlogprobs, dentropy)
    dhidden, dweight, dbias = (gradient.to(hidden.dtype) for gradient in head.finish())
    return dhidden, dweight, dbias
