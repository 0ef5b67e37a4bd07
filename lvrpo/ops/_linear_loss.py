"""The fused pass behind linear_grpo_loss: what runs when, and when its gradients are handed over.

R rows, H hidden width, V vocabulary, T tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.types import Number

from lvrpo.ops import _fused_loss, _library
from lvrpo.ops import _linear_inputs as _inputs
from lvrpo.ops._linear_head import LinearHead, dtypes_of, fake_gradients
from lvrpo.ops._linear_plan import plan_rows
from lvrpo.ops._linear_rows import OUTSIDE, HeadRows, Softmax
from lvrpo.ops._numbers import numbers
from lvrpo.ops._policy_loss import LossMetrics, LossParams, scalars_of


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    *,
    vocab: _inputs.Slice,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    token_weights: Tensor,
    denominator: float | None,
    params: LossParams,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics as a vector, log-probs and entropy [T], from arguments that were checked."""
    heads = (hidden, weight, bias)
    loss, metrics, logprobs, entropy, lse = _LinearGrpoLoss.apply(  # type: ignore[no-untyped-call]
        *heads,
        _inputs.token_columns(token_ids, vocab.low, ignore_index),
        row_index,
        vocab.ranges,
        old_logprobs,
        advantages,
        cu_seqlens,
        ref_logprobs,
        token_weights,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads],
        (vocab.low, vocab.high, float(temperature), float(softcap or 0.0), most),
        (
            scalars_of(params, denominator),
            # On policy the ratio of a sequence is 1 before its log-probs are known.
            params.sequence_level and old_logprobs is not None,
            params.beta != 0 or params.entropy_coef != 0,
            params.entropy_coef != 0,
            backend,
        ),
    )
    _inputs.refuse_rows("linear_grpo_loss", lse)
    return loss, metrics, logprobs, entropy


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        row_index: Tensor | None,
        vocab_range: Tensor | None,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        cu_seqlens: Tensor,
        ref_logprobs: Tensor | None,
        token_weights: Tensor,
        needs: list[bool],
        head: tuple[Any, ...],
        loss: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        inputs = (
            *(hidden, weight, bias, token_ids, row_index, vocab_range),
            *(old_logprobs, advantages, cu_seqlens, ref_logprobs, token_weights),
        )
        ctx.scalars = needs, *head, *loss
        *results, dhidden, dweight, dbias = torch.ops.lvrpo.linear_grpo_loss_fwd(
            *inputs, *ctx.scalars
        )
        ctx.dtype = hidden.dtype
        _fused_loss.keep(ctx, inputs, [dhidden, dweight, dbias])
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:3]
        run = torch.ops.lvrpo.linear_grpo_loss_fwd
        scaled = _fused_loss.hand_over(
            ctx, dloss, lambda: list(run(*ctx.saved_tensors, *ctx.scalars)[-3:])
        )
        found = (g if wanted else None for g, wanted in zip(scaled, needs, strict=True))
        return *found, *[None] * 11


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    token_weights: Tensor,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    like = hidden.new_empty(0, dtype=dtypes_of(hidden)[1])
    return (
        like.new_empty(()),
        like.new_empty(len(dataclasses.fields(LossMetrics))),
        like.new_empty(token_ids.shape),
        like.new_empty(token_ids.shape),
        like.new_empty(hidden.shape[0]),
        *fake_gradients(hidden, weight, bias, needs, like.dtype),
    )


@_library.compose("linear_grpo_loss_fwd", _fwd_fake)
def _fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    row_index: Tensor | None,
    vocab_range: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    token_weights: Tensor,
    needs: Sequence[bool],
    low: int,
    high: int,
    temperature: float,
    softcap: float,
    most: int,
    loss_scalars: Sequence[Number],
    whole_sequences: bool,
    every_active: bool,
    entropy_bonus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = _fused_loss.tokens_of(row_index, advantages, cu_seqlens, token_weights, every_active)
    plan = plan_rows(
        tokens, len(hidden), most, gradient=any(needs), whole_sequences=whole_sequences
    )
    head = LinearHead(hidden, weight, bias, (low, high), plan.chunks(), needs)
    softmax = Softmax(numbers(temperature, softcap, OUTSIDE), backend)
    rows = HeadRows(head, softmax, token_ids, row_index, vocab_range, plan.order)

    data = old_logprobs, advantages, cu_seqlens, ref_logprobs
    loss, metrics, logprobs, entropy = _fused_loss.run(
        rows, plan, data, token_weights, loss_scalars, entropy_bonus
    )
    dhidden, dweight, dbias = head.finish()
    return loss, metrics, logprobs, entropy, rows.lse, dhidden, dweight, dbias
