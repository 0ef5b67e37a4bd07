"""log p(token) from hidden states and the weight of the output layer: no [R, V] tensor.

R rows of hidden states, H hidden width, V vocabulary, T target tokens. How the rows are chunked:
docs/ops/linear_logprobs.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo.ops import _backend, _checks, _library, _targets
from lvrpo.ops import _linear_inputs as _inputs
from lvrpo.ops._linear_head import LinearHead, dtypes_of, fake_gradients, split
from lvrpo.ops._linear_rows import HeadRows, Softmax
from lvrpo.reference.linear_logprobs import linear_logprobs as reference_linear_logprobs

OP = "linear_logprobs"


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None = None,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: Tensor | tuple[int, int] | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    memory_budget: int | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None = None,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_range: Tensor | tuple[int, int] | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    memory_budget: int | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    row_index: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: Tensor | tuple[int, int] | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gather_logprobs(hidden @ weight.T + bias, ...)`, a chunk of rows at a time.

    Differentiable in `hidden`, `weight` and `bias`. The backward projects the rows again, which
    makes four GEMMs in all; `linear_grpo_loss` needs three, and does more.

    Args:
        hidden: [R, H] fp32, fp64, bf16 or fp16.
        weight: [V, H] of the same dtype; may be shared with the embedding.
        token_ids: [T] int64. `ignore_index` marks a token without a target: log-prob 0, gradient 0.
        row_index: [T] int64, the row that predicts each token; None: token t belongs to row t.
        bias: [V] of the same dtype.
        temperature: divides the logits; finite, > 0.
        softcap: cap of `softcap * tanh(logits / softcap)`, applied before the temperature; > 0.
        vocab_range: columns outside [low, high) have probability zero. One (low, high) pair
            multiplies that slice of the weight only; [R, 2] int64 gives each row its own.
        ignore_index: see `token_ids`.
        return_entropy: also return the entropy of every row.
        memory_budget: bytes of the logits that exist at a time. None: 3.8 GB on a GPU; on a CPU 12
            MiB or what 112 rows take, whichever is more.
        backend: "cpp", "triton", "torch" (all logits at once), or None for the first that can run.

    Returns:
        logprobs: [T] fp32 (fp64 from fp64), nats. Logits are sums in fp32 that nothing rounds.
        entropy: [R] same dtype, nats, only with `return_entropy`. Differentiable too.

    Raises:
        ValueError: as `gather_logprobs`; also when the dtypes or widths of hidden, weight and bias
            differ, or memory_budget is too small for one row.
    """
    _inputs.check_head(OP, hidden, weight, bias)
    vocab = _inputs.vocab_slice(OP, vocab_range, weight.shape[0])
    ranges = vocab.ranges
    if _checks.check_values(token_ids):  # elsewhere a pair would be copied to the device
        ranges = _targets.as_row_ranges(vocab_range, hidden)
    _targets.check_scale(OP, temperature, softcap)
    rows, columns = hidden.shape[0], weight.shape[0]
    _targets.check_targets(OP, rows, columns, token_ids, row_index, ranges, ignore_index)
    most = _inputs.rows_at_once(OP, hidden, vocab.high - vocab.low, memory_budget)
    tensors = (hidden, weight, bias, token_ids, row_index, vocab.ranges)
    chosen = _backend.resolve(OP, tensors, backend)
    if chosen == "torch":
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs, entropy = reference_linear_logprobs(
                hidden,
                weight,
                token_ids,
                row_index,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                vocab_range=_targets.as_row_ranges(vocab_range, hidden),
                ignore_index=ignore_index,
                return_entropy=True,
            )
        _inputs.refuse_rows(OP, entropy)
    else:
        logprobs, entropy, lse = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            _inputs.token_columns(token_ids, vocab.low, ignore_index),
            row_index,
            vocab.ranges,
            return_entropy,
            (vocab.low, vocab.high, float(temperature), float(softcap or 0.0), most, chosen),
        )
        _inputs.refuse_rows(OP, lse)
    return (logprobs, entropy) if return_entropy else logprobs


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        row_index: Tensor | None,
        vocab_range: Tensor | None,
        with_entropy: bool,
        scalars: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (hidden, weight, bias, token_ids, row_index, vocab_range)
        logprobs, lse, entropy = torch.ops.lvrpo.linear_logprobs_fwd(
            *inputs, with_entropy, *scalars
        )
        ctx.save_for_backward(*inputs, lse, entropy)
        ctx.with_entropy, ctx.scalars = with_entropy, scalars
        ctx.mark_non_differentiable(lse)
        return logprobs, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor, _: Tensor) -> tuple[Any, ...]:
        *inputs, lse, entropy = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = torch.ops.lvrpo.linear_logprobs_bwd(
            dlogprobs,
            dentropy if ctx.with_entropy else None,
            *inputs,
            lse,
            entropy,
            needs,
            *ctx.scalars,
        )
        found = (g if wanted else None for g, wanted in zip(gradients, needs, strict=True))
        return *found, None, None, None, None, None


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    with_entropy: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = dtypes_of(hidden)[1]
    rows = hidden.shape[0]
    return (
        hidden.new_empty(token_ids.shape, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows if with_entropy else 0, dtype=dtype),
    )


@_library.compose("linear_logprobs_fwd", _fwd_fake)
def _fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    with_entropy: bool,
    low: int,
    high: int,
    temperature: float,
    softcap: float,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = split(0, len(hidden), most)
    head = LinearHead(hidden, weight, bias, (low, high), chunks)
    softmax = Softmax(temperature, softcap, backend)
    rows = HeadRows(head, softmax, token_ids, row_index, vocab_range)
    for chunk in chunks:
        rows.forward(chunk, with_entropy)
    return rows.logprobs, rows.lse, rows.entropy if with_entropy else head.like


def _bwd_fake(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, bias, needs, hidden.dtype)


@_library.compose("linear_logprobs_bwd", _bwd_fake)
def _bwd(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    low: int,
    high: int,
    temperature: float,
    softcap: float,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = split(0, len(hidden), most)
    head = LinearHead(hidden, weight, bias, (low, high), chunks, needs)
    softmax = Softmax(temperature, softcap, backend)
    rows = HeadRows(head, softmax, token_ids, row_index, vocab_range)
    rows.lse, rows.entropy = lse, entropy
    for chunk in chunks:
        rows.backward(chunk, dlogprobs, dentropy)
    dhidden, dweight, dbias = (gradient.to(hidden.dtype) for gradient in head.finish())
    return dhidden, dweight, dbias
