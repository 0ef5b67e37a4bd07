"""The fused pass behind linear_grpo_loss: what runs when, and when its gradients are handed over.

R rows, H hidden width, V vocabulary, T tokens, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends
from lvrpo.backends import library
from lvrpo.ops._loss_inputs import LossInputs
from lvrpo.ops._numbers import numbers
from lvrpo.ops.grpo_loss import numbers_of
from lvrpo.ops.head import budget as _inputs
from lvrpo.ops.head import loss as _fused_loss
from lvrpo.ops.head.gemm import LinearHead, dtypes_of, fake_gradients
from lvrpo.ops.head.loss import LossCall, choices_by_name
from lvrpo.ops.head.plan import plan_rows
from lvrpo.ops.head.rows import OUTSIDE, HeadRows, Softmax
from lvrpo.ops.head.targets import Targets
from lvrpo.params.loss_metrics import STATISTICS


def fused_loss(
    factors: tuple[Tensor, Tensor, Tensor | None],  # hidden, weight, bias
    targets: Targets,
    vocab: _inputs.Slice,
    data: LossInputs,
    *,
    temperature: float,
    softcap: float | None,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, log-probs and entropy [T], from arguments that were checked."""
    params, mask = data.params, data.mask
    assert mask is not None
    loss, statistics, logprobs, entropy, lse = _LinearGrpoLoss.apply(  # type: ignore[no-untyped-call]
        *factors,
        _inputs.token_columns(targets.token_ids, vocab.low, targets.ignore_index),
        targets.row_index,
        vocab.ranges,
        *(data.old_logprobs, data.advantages, data.layout.offsets, data.ref_logprobs),
        *(mask, data.policy_weights),
        numbers(temperature, softcap or 0.0, OUTSIDE),
        numbers_of(params, data.denominator),
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in factors],
        (vocab.low, vocab.high, most),
        (
            data.per_token,
            params.count_empty,
            # On policy the ratio of a sequence is 1 before its log-probs are known.
            params.sequence_level and data.old_logprobs is not None,
            params.sequence_level,
            params.beta != 0 or params.entropy_coef != 0,
            params.entropy_coef != 0,
            backend,
        ),
        params.choices(),
    )
    _inputs.refuse_rows("linear_grpo_loss", lse)
    return loss, statistics, logprobs, entropy


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
        mask: Tensor,
        policy_weights: Tensor | None,
        head_numbers: Tensor,
        loss_numbers: Tensor,
        needs: list[bool],
        head: tuple[Any, ...],
        loss: tuple[Any, ...],
        choices: dict[str, str],
    ) -> tuple[Tensor, ...]:
        inputs = (
            *(hidden, weight, bias, token_ids, row_index, vocab_range),
            *(old_logprobs, advantages, cu_seqlens, ref_logprobs, mask, policy_weights),
            *(head_numbers, loss_numbers),
        )
        ctx.how, ctx.choices = (needs, *head, *loss), choices
        *results, dhidden, dweight, dbias = torch.ops.lvrpo.linear_grpo_loss_fwd(
            *inputs, *ctx.how, **choices
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
            ctx, dloss, lambda: list(run(*ctx.saved_tensors, *ctx.how, **ctx.choices)[-3:])
        )
        found = (g if wanted else None for g, wanted in zip(scaled, needs, strict=True))
        return *found, *[None] * 15


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
    mask: Tensor,
    policy_weights: Tensor | None,
    head_numbers: Tensor,
    loss_numbers: Tensor,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    like = hidden.new_empty(0, dtype=dtypes_of(hidden)[1])
    return (
        like.new_empty(()),
        like.new_empty(len(STATISTICS), dtype=torch.float64),
        like.new_empty(token_ids.shape),
        like.new_empty(token_ids.shape),
        like.new_empty(hidden.shape[0]),
        *fake_gradients(hidden, weight, bias, needs, like.dtype),
    )


@library.composite("linear_grpo_loss_fwd", _fwd_fake, of=["gather_logprobs", "grpo_loss"])
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
    mask: Tensor,
    policy_weights: Tensor | None,
    head_numbers: Tensor,
    loss_numbers: Tensor,
    needs: Sequence[bool],
    low: int,
    high: int,
    most: int,
    advantage_per_token: bool,
    count_empty: bool,
    whole_sequences: bool,
    per_sequence: bool,
    every_active: bool,
    entropy_bonus: bool,
    backend: str,
    ratio: str,
    surrogate: str,
    kl: str,
    kl_factor: str,
    kl_gradient: str,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss_call = LossCall(
        *(old_logprobs, advantages, cu_seqlens, ref_logprobs, mask, policy_weights),
        *(loss_numbers, advantage_per_token, count_empty),
        choices_by_name(ratio, surrogate, kl, kl_factor, kl_gradient, aggregation),
    )
    tokens = loss_call.tokens(row_index, every_active, per_sequence)
    plan = plan_rows(
        tokens, len(hidden), most, gradient=any(needs), whole_sequences=whole_sequences
    )
    head = LinearHead(hidden, weight, bias, (low, high), plan.chunks(), needs)
    softmax = Softmax(head_numbers, backends.named(backend))
    rows = HeadRows(head, softmax, token_ids, row_index, vocab_range, plan.order)
    results = _fused_loss.run(rows, plan, loss_call, entropy_bonus)
    dhidden, dweight, dbias = head.finish()
    return *results, rows.lse, dhidden, dweight, dbias
