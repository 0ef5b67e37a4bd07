"""log p(token) from logits, with the entropy of the same softmax: one pass over the logits.

R rows of logits, T target tokens, V vocabulary. Derivation: docs/ops/gather_logprobs.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo.ops import _backend, _checks, _library
from lvrpo.reference.gather_logprobs import gather_logprobs as reference_gather_logprobs

OP = "gather_logprobs"


@overload
def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None = None,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: Tensor | tuple[int, int] | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None = None,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: Tensor | tuple[int, int] | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: Tensor | tuple[int, int] | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[token] with z = softcap * tanh(logits / softcap) / temperature.

    Args:
        logits: [R, V] fp32, fp64, bf16 or fp16; any row stride.
        token_ids: [T] int64. `ignore_index` marks a token without a target: log-prob 0, gradient 0.
        row_index: [T] int64, the row that predicts each token. A row may serve many tokens (the
            last prompt row of a group predicts G first tokens): it is reduced once and its gradient
            sums over them. None: token t is predicted by row t, and R equals T.
        temperature: divides the logits; finite, > 0.
        softcap: cap of `softcap * tanh(logits / softcap)`, applied before the temperature; > 0.
        vocab_range: [R, 2] int64 or one (low, high) pair: columns outside [low, high) have
            probability zero, as when a unified vocabulary is sampled for one modality.
        ignore_index: see `token_ids`.
        return_entropy: also return the entropy of every row.
        backend: "cpp", "torch", or None for the first that can run.

    Returns:
        logprobs: [T] fp32 (fp64 from fp64 logits), nats.
        entropy: [R] same dtype, nats, only with `return_entropy`. Differentiable too.

    Raises:
        ValueError: shapes or dtypes do not match; on a CPU also when a token is outside the
            vocabulary or its row's range, a row index is out of range, or a row has no finite
            log-sum-exp over its range (NaN, +inf, nothing but -inf).
    """
    vocab_range = _as_row_ranges(vocab_range, logits)
    _check(logits, token_ids, row_index, temperature, softcap, vocab_range, ignore_index)
    chosen = _backend.resolve(OP, (logits, token_ids, row_index, vocab_range), backend)
    if chosen == "torch":
        if _checks.check_values(logits):
            largest = _largest(logits, vocab_range, softcap)
            _refuse_rows(~torch.isfinite(largest), logits, vocab_range, softcap)
        return reference_gather_logprobs(
            logits,
            token_ids,
            row_index,
            temperature=temperature,
            softcap=softcap,
            vocab_range=vocab_range,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
        )
    logprobs, entropy, lse = _GatherLogprobs.apply(
        logits,
        token_ids,
        row_index,
        vocab_range,
        float(temperature),
        float(softcap or 0.0),
        ignore_index,
        return_entropy,
        chosen,
    )
    if _checks.check_values(lse):
        _refuse_rows(~torch.isfinite(lse), logits, vocab_range, softcap)
    return (logprobs, entropy) if return_entropy else logprobs


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        row_index: Tensor | None,
        vocab_range: Tensor | None,
        temperature: float,
        softcap: float,
        ignore_index: int,
        with_entropy: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, lse, entropy, _ = _library.op("gather_logprobs_fwd", backend)(
            logits,
            token_ids,
            row_index,
            vocab_range,
            temperature,
            softcap,
            ignore_index,
            with_entropy,
            False,
        )
        ctx.save_for_backward(logits, token_ids, row_index, vocab_range, lse, entropy)
        ctx.scalars = temperature, softcap, ignore_index
        ctx.with_entropy = with_entropy
        ctx.backend = backend
        ctx.mark_non_differentiable(lse)
        return logprobs, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor, _: Tensor) -> tuple[Any, ...]:
        logits, token_ids, row_index, vocab_range, lse, entropy = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        _library.op("gather_logprobs_bwd", ctx.backend)(
            dlogits,
            dlogprobs,
            dentropy if ctx.with_entropy else None,
            logits,
            token_ids,
            row_index,
            vocab_range,
            lse,
            entropy if ctx.with_entropy else None,
            *ctx.scalars,
        )
        return dlogits, *[None] * 8


@_library.register("gather_logprobs_fwd", triton=OP)
def _fwd_fake(
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
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


@_library.register("gather_logprobs_bwd", triton=OP, mutates=["dlogits"])
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
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> None:
    return None


def _as_row_ranges(vocab_range: Tensor | tuple[int, int] | None, logits: Tensor) -> Tensor | None:
    if vocab_range is None or isinstance(vocab_range, Tensor):
        return vocab_range
    pair = torch.tensor(vocab_range, dtype=torch.int64, device=logits.device)
    return pair.expand(logits.shape[0], 2)


def _check(
    logits: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_range: Tensor | None,
    ignore_index: int,
) -> None:
    _checks.check_shape(OP, "logits", logits, ("R", "V"))
    _checks.check_floating(OP, "logits", logits)
    _checks.check_shape(OP, "token_ids", token_ids, ("T",))
    _checks.check_integer(OP, "token_ids", token_ids)
    _checks.check_same_device(
        OP, logits=logits, token_ids=token_ids, row_index=row_index, vocab_range=vocab_range
    )
    rows, vocab = logits.shape
    if rows and not vocab:
        raise ValueError(f"{OP}: logits has shape ({rows}, 0), expected at least one column")
    if row_index is None:
        if len(token_ids) != rows:
            raise ValueError(
                f"{OP}: {len(token_ids)} token_ids for {rows} rows of logits; give row_index when "
                "they are not one to one"
            )
    else:
        _checks.check_shape(OP, "row_index", row_index, (len(token_ids),))
        _checks.check_integer(OP, "row_index", row_index)
    if vocab_range is not None:
        _checks.check_shape(OP, "vocab_range", vocab_range, (rows, 2))
        _checks.check_integer(OP, "vocab_range", vocab_range)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{OP}: temperature is {temperature}, expected finite and > 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{OP}: softcap is {softcap}, expected > 0, or None for no cap")
    if _checks.check_values(logits):
        _check_values(token_ids, row_index, vocab_range, ignore_index, rows, vocab)


def _check_values(
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    ignore_index: int,
    rows: int,
    vocab: int,
) -> None:
    if row_index is not None:
        _refuse_first(row_index, (row_index < 0) | (row_index >= rows), "row_index", f"[0, {rows})")
    low, high = 0, vocab
    if vocab_range is not None:
        low_high = vocab_range.unbind(1)
        bad = (low_high[0] < 0) | (low_high[1] > vocab) | (low_high[0] >= low_high[1])
        _refuse_first(vocab_range, bad, "vocab_range", f"0 <= low < high <= {vocab}")
        of_token = low_high if row_index is None else tuple(side[row_index] for side in low_high)
        outside = (token_ids < of_token[0]) | (token_ids >= of_token[1])
    else:
        outside = (token_ids < low) | (token_ids >= high)
    outside &= token_ids != ignore_index
    expected = f"[0, {vocab})" if vocab_range is None else "the range of its row in vocab_range"
    _refuse_first(token_ids, outside, "token_ids", expected)


def _largest(logits: Tensor, vocab_range: Tensor | None, softcap: float | None) -> Tensor:
    """[R]: finite iff the row's log-sum-exp is."""
    z = logits.detach() if softcap is None else logits.detach().tanh()
    if vocab_range is not None:
        column = torch.arange(z.shape[1], device=z.device)
        outside = (column < vocab_range[:, :1]) | (column >= vocab_range[:, 1:])
        z = z.masked_fill(outside, -torch.inf)
    return z.amax(dim=-1) if z.shape[1] else z.new_zeros(len(z))


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


def _refuse_first(values: Tensor, bad: Tensor, name: str, expected: str) -> None:
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(f"{OP}: {name}[{at}] is {values[at].tolist()}, expected {expected}")
