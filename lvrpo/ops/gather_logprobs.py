"""log p(token) from logits, with the entropy of the same softmax: one pass over the logits.

R rows of logits, T target tokens, V vocabulary. Derivation: docs/ops/gather_logprobs.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend, library
from lvrpo.dtypes import numbers, widen
from lvrpo.ops.head import logprobs as results
from lvrpo.ops.head.given import check_logits
from lvrpo.ops.head.targets import Ids, VocabRange, as_rows, as_targets
from lvrpo.reference.gather_logprobs import gather_logprobs as reference_gather_logprobs

OP = "gather_logprobs"


@overload
def gather_logprobs(
    logits: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: VocabRange = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    return_sum_squares: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def gather_logprobs(
    logits: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: VocabRange = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    return_sum_squares: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def gather_logprobs(
    logits: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: VocabRange = ...,
    ignore_index: int = ...,
    return_entropy: bool = ...,
    return_sum_squares: Literal[True],
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, ...]: ...


def gather_logprobs(
    logits: Tensor,
    token_ids: Ids,
    row_index: Ids | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: VocabRange = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_sum_squares: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """log softmax(z)[token] with z = softcap * tanh(logits / softcap) / temperature.

    The rows of logits are [R], or padded [B, C]: what holds for R below holds for any leading
    shape. Autocast: of the list of fp32 ops; logits of any dtype are taken as they are.

    Args:
        logits: [R, V] or [B, C, V] fp32, fp64, bf16 or fp16; any row stride. Padded logits that are
            no view of [B * C, V] (a slice of the columns, for one) are copied.
        token_ids: one for each row, of any integer dtype. `ignore_index` marks a token without a
            target: log-prob 0, gradient 0.
        row_index: the row (of the flattened ones) that predicts each token, of the shape of
            token_ids, which then is free. A row may serve many tokens (the last prompt row of a
            group predicts G first tokens): it is reduced once and its gradient sums over them.
        temperature: divides the logits; finite, > 0.
        softcap: cap of `softcap * tanh(logits / softcap)`, applied before the temperature; > 0.
        vocab_range: [R, 2] of any integer dtype, or one (low, high) pair: columns outside
            [low, high) have probability zero, as when a unified vocabulary is sampled for one
            modality.
        ignore_index: see `token_ids`.
        return_entropy: also return the entropy of every row. A row that no token uses may hold
            anything: without a finite log-sum-exp its entropy is 0 and has no gradient.
        return_sum_squares: also return the sum of squared probabilities of every row, from which
            a variance-optimal baseline is formed; 0 for such a row.
        inplace_backward: the gradient takes the place of the logits in memory. Their values are
            lost in the backward: reading them afterwards reads the gradient, and autograd raises
            where it needs them after that. The torch backend and torch.compile do without.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        logprobs: of the shape of token_ids, fp32 (fp64 from fp64 logits), nats.
        entropy: [R] same dtype, nats, only with `return_entropy`. Differentiable too.
        sum_squares: [R] same dtype, in (0, 1], only with `return_sum_squares`; no gradient.

    Raises:
        ValueError: shapes or dtypes do not match, or the logits have no memory of their own for
            `inplace_backward`; on a CPU also when a token is outside the vocabulary or its row's
            range, a row index is out of range, or a row that a token uses has no finite
            log-sum-exp over its range (NaN, +inf, nothing but -inf, or beyond the dtype after the
            division by the temperature). Where values are not read, such a token counts as ignored
            and such a row gives NaN.
        RuntimeError: in the backward: the logits were changed after the forward.
    """
    checks.check_scale(OP, temperature, softcap)
    shaped, logits = logits, as_rows(OP, "logits", logits, "V")
    check_logits(OP, logits, inplace_backward)
    targets = as_targets(
        *(OP, "logits", shaped, logits.shape[1]),
        *(token_ids, row_index, vocab_range, ignore_index),
    )
    chosen = backends.resolve(OP, (logits, *targets.indices()), backend)
    functional = chosen.functional(OP, reference_gather_logprobs)
    of_rows: list[Tensor]
    if functional is not None:
        if checks.check_values(logits):
            finite = (_largest(logits, targets.ranges, softcap) / temperature).isfinite()
            unusable = results.unusable(targets, finite)
            _refuse_rows(unusable, logits, targets.ranges, softcap)
        found = functional(
            *(logits, targets.token_ids, targets.row_index),
            temperature=temperature,
            softcap=softcap,
            vocab_range=targets.ranges,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
            return_sum_squares=return_sum_squares,
        )
        logprobs, *of_rows = found if isinstance(found, tuple) else (found,)
    else:
        options = _Options(
            *targets.indices(),
            numbers(temperature, softcap or 0.0, ignore_index),
            with_entropy=return_entropy,
            with_sum_squares=return_sum_squares,
            inplace=inplace_backward and not torch.compiler.is_compiling(),
            backend=chosen,
        )
        logprobs, entropy, sum_squares, lse = _GatherLogprobs.apply(logits, options)  # type: ignore[no-untyped-call]
        of_rows = [*[entropy] * return_entropy, *[sum_squares] * return_sum_squares]
        of_rows = results.settle(
            *(targets, lse, of_rows),
            lambda bad: _refuse_rows(bad, logits, targets.ranges, softcap),
        )
    return results.shape_results(targets, logprobs, of_rows)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `lvrpo::gather_logprobs_fwd` takes besides the logits, and how to get a gradient."""

    token_ids: Tensor
    row_index: Tensor | None
    vocab_range: Tensor | None
    numbers: Tensor
    with_entropy: bool
    with_sum_squares: bool
    inplace: bool
    backend: Backend


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        indices = options.token_ids, options.row_index, options.vocab_range
        inputs = logits, *indices, options.numbers
        logprobs, lse, entropy, sum_squares = options.backend.op("gather_logprobs_fwd")(
            *inputs, options.with_entropy, options.with_sum_squares
        )
        ctx.save_for_backward(*inputs, lse, entropy)
        ctx.with_entropy, ctx.inplace = options.with_entropy, options.inplace
        ctx.backend = options.backend
        ctx.mark_non_differentiable(sum_squares, lse)
        return logprobs, entropy, sum_squares, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        # Raises if the logits were changed since the forward.
        logits, token_ids, row_index, vocab_range, numbers, lse, entropy = ctx.saved_tensors
        dlogits = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
        ctx.backend.op("gather_logprobs_bwd")(
            dlogits,
            dlogprobs,
            dentropy if ctx.with_entropy else None,
            logits,
            token_ids,
            row_index,
            vocab_range,
            lse,
            entropy if ctx.with_entropy else None,
            numbers,
        )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return dlogits, None


@library.register("gather_logprobs_fwd", kernels=OP)
def _fwd_fake(
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    numbers: Tensor,
    with_entropy: bool,
    with_sum_squares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    return (
        logits.new_empty(token_ids.shape, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if with_entropy else 0, dtype=dtype),
        logits.new_empty(rows if with_sum_squares else 0, dtype=dtype),
    )


@library.register("gather_logprobs_bwd", kernels=OP, mutates=["dlogits"])
def _bwd_fake(
    dlogits: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    numbers: Tensor,
) -> None:
    return None


def _largest(logits: Tensor, vocab_range: Tensor | None, softcap: float | None) -> Tensor:
    """[R]: finite, after a division by the temperature, iff the row's log-sum-exp is."""
    z = logits.detach() if softcap is None else logits.detach().tanh()
    if vocab_range is not None:
        column = torch.arange(z.shape[1], device=z.device)
        outside = (column < vocab_range[:, :1]) | (column >= vocab_range[:, 1:])
        z = z.masked_fill(outside, -torch.inf)
    return widen(z.amax(dim=-1) if z.shape[1] else z.new_zeros(len(z)))


def _refuse_rows(
    bad: Tensor, logits: Tensor, vocab_range: Tensor | None, softcap: float | None
) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        largest = float(_largest(logits, vocab_range, softcap)[row])
        raise ValueError(
            f"{OP}: row {row} of logits has no finite log-sum-exp (its largest value is "
            f"{largest}); expected finite values, or -inf beside them"
        )
