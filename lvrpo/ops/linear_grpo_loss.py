"""The policy loss from hidden states: projection, log-probs, loss and gradient at three GEMMs.

R rows of hidden states, H hidden width, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/linear_grpo_loss.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.types import Number

from lvrpo.ops import _backend, _checks, _library, _targets
from lvrpo.ops import _linear_inputs as _inputs
from lvrpo.ops import grpo_loss as _loss
from lvrpo.ops._linear_head import LinearHead, dtypes_of, fake_gradients
from lvrpo.ops._linear_plan import Tokens, plan_rows
from lvrpo.ops._linear_rows import HeadRows, Softmax
from lvrpo.ops._policy_loss import LossMetrics, LossParams, scalars_of
from lvrpo.reference.linear_grpo_loss import linear_grpo_loss as reference_linear_grpo_loss

OP = "linear_grpo_loss"
_DEFAULT = LossParams()


class LinearPolicyLoss(NamedTuple):
    """Result of `linear_grpo_loss`.

    Attributes:
        loss: scalar to call backward on.
        metrics: detached scalars from the same pass.
        logprobs: [T] detached log-probs of the tokens, nats; 0 for a token of weight 0.
        entropy: [T] detached entropy where each token was sampled, nats; 0 for a token of weight 0.
    """

    loss: Tensor
    metrics: LossMetrics
    logprobs: Tensor
    entropy: Tensor


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    params: LossParams = _DEFAULT,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: Tensor | tuple[int, int] | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> LinearPolicyLoss:
    """`grpo_loss` of the log-probs and entropies of `linear_logprobs`, with its gradient.

    Differentiable in `hidden`, `weight` and `bias`. What a token adds to the loss depends on its
    own row (or sequence) only, so the forward forms the gradient of each chunk of logits while they
    are there: none are kept and none computed twice. Rows whose gradient is zero whatever their
    logits (advantage 0, no KL, no entropy bonus) are projected for the metrics and no more; rows
    without a token of nonzero weight are left out.

    The gradients wait, unscaled and in fp32, for the backward, which scales them by its upstream
    gradient and gives them away; a second backward computes them anew. On a GPU one small read
    before the first GEMM says how many rows have a gradient (for ratios per sequence also where
    chunks may end). While a CUDA graph is captured nothing is read and every row counts as such.

    Args:
        hidden: [R, H] fp32, fp64, bf16 or fp16.
        weight: [V, H] of the same dtype; may be shared with the embedding. Frozen
            (`requires_grad=False`) it costs no gradient GEMM and no buffer, and so does `hidden`.
        token_ids: [T] int64, packed sequences. A token of `ignore_index` has weight 0.
        old_logprobs: [T] as `grpo_loss` takes them, like everything below up to `params`.
        advantages: [B] or [T].
        cu_seqlens: [B + 1] int64 offsets of the sequences in the tokens.
        row_index: [T] int64, the row that predicts each token; None: token t belongs to row t.
        bias: [V] of the same dtype.
        ref_logprobs: [T].
        token_weights: [T] factors >= 0, or a bool mask.
        denominator: replaces the number that the outer mean divides by.
        params: the loss. The entropy that `entropy_coef` needs is computed here. A ratio per
            sequence costs a fourth GEMM where a sequence does not fit the budget.
        temperature: divides the logits; finite, > 0.
        softcap: as in `linear_logprobs`.
        vocab_range: likewise; a pair multiplies that slice of the weight only.
        ignore_index: see `token_ids`.
        memory_budget: likewise; the one thing to tune. Larger chunks touch the weight and its
            gradient less often.
        backend: "cpp", "triton", "torch" (all logits at once), or None for the first that can run.

    Returns:
        LinearPolicyLoss in fp32 (fp64 from fp64).

    Raises:
        ValueError: as `linear_logprobs` and `grpo_loss`.
    """
    _inputs.check_head(OP, hidden, weight, bias)
    vocab = _inputs.vocab_slice(OP, vocab_range, weight.shape[0])
    ranges = _targets.as_row_ranges(vocab_range, hidden)
    _targets.check_scale(OP, temperature, softcap)
    rows, columns = hidden.shape[0], weight.shape[0]
    _targets.check_targets(OP, rows, columns, token_ids, row_index, ranges, ignore_index)
    most = _inputs.rows_at_once(OP, hidden, vocab.high - vocab.low, memory_budget)
    data = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "token_weights": token_weights,
    }
    _, dtype = dtypes_of(hidden)
    later = hidden.new_empty(token_ids.shape, dtype=dtype)  # logprobs and entropy, to be computed
    _loss._check(later, advantages, cu_seqlens, data | {"entropy": later}, denominator, params)
    tensors = (hidden, weight, bias, token_ids, row_index, vocab.ranges, advantages, cu_seqlens)
    chosen = _backend.resolve(OP, (*tensors, *data.values()), backend)
    data = {name: x if x is None else x.detach().to(dtype) for name, x in data.items()}
    weights = torch.ones_like(later) if token_weights is None else token_weights.detach().to(dtype)
    data["token_weights"] = torch.where(token_ids == ignore_index, 0.0, weights)
    # Dividing by a tensor afterwards keeps the op free of a read from the device.
    host = 1.0 if isinstance(denominator, Tensor) else denominator
    if chosen == "torch":
        with torch.autocast(hidden.device.type, enabled=False):
            loss, values, logprobs, entropy = reference_linear_grpo_loss(
                hidden,
                weight,
                token_ids,
                advantages=advantages.detach().to(dtype),
                cu_seqlens=cu_seqlens,
                row_index=row_index,
                bias=bias,
                denominator=host,
                params=params,
                temperature=temperature,
                softcap=softcap,
                vocab_range=ranges,
                ignore_index=ignore_index,
                **data,
            )
    else:
        loss, values, logprobs, entropy, lse = _LinearGrpoLoss.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            _inputs.token_columns(token_ids, vocab.low, ignore_index),
            row_index,
            vocab.ranges,
            data["old_logprobs"],
            advantages.detach().to(dtype),
            cu_seqlens,
            data["ref_logprobs"],
            data["token_weights"],
            [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:3]],
            (vocab.low, vocab.high, float(temperature), float(softcap or 0.0), most),
            (
                scalars_of(params, host),
                # On policy a sequence's ratio is 1 before its log-probs are known.
                params.sequence_level and old_logprobs is not None,
                params.beta != 0 or params.entropy_coef != 0,
                params.entropy_coef != 0,
                chosen,
            ),
        )
        _inputs.refuse_rows(OP, lse)
    if _checks.check_values(loss) and not bool(loss.detach().isfinite()):
        _loss._refuse_tokens(logprobs, data)
    fields = list(values.unbind())
    if isinstance(denominator, Tensor):
        divisor = denominator.detach().to(dtype).reshape(())
        loss, fields[0] = loss / divisor, fields[0] / divisor
    return LinearPolicyLoss(loss, LossMetrics(*fields), logprobs, entropy)


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
        ctx.traced = torch.compiler.is_compiling()
        if ctx.traced:
            ctx.save_for_backward(dhidden, dweight, dbias)
        else:
            ctx.save_for_backward(*inputs)
            ctx.kept = [dhidden, dweight, dbias]
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:3]
        if ctx.traced:  # a graph may not write to what it saved
            scaled = [(g * dloss).to(ctx.dtype) for g in ctx.saved_tensors]
        else:
            # Given away: the one buffer that is as large as the weight becomes its gradient.
            gradients, ctx.kept = ctx.kept, None
            if gradients is None:
                run = torch.ops.lvrpo.linear_grpo_loss_fwd
                gradients = list(run(*ctx.saved_tensors, *ctx.scalars)[-3:])
            scaled = _scale(gradients, dloss, ctx.dtype)
        found = (g if wanted else None for g, wanted in zip(scaled, needs, strict=True))
        return *found, *[None] * 11


def _scale(gradients: list[Tensor], dloss: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """In place, then in `dtype`; the list is emptied, so that no two copies outlive the loop."""
    scaled = []
    by_one = _checks.check_values(dloss) and float(dloss) == 1.0
    while gradients:
        gradient = gradients.pop(0)
        scaled.append((gradient if by_one else gradient.mul_(dloss)).to(dtype))
    return scaled


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
    tokens = _tokens(row_index, advantages, cu_seqlens, token_weights, any(needs), every_active)
    plan = plan_rows(tokens, len(hidden), most, whole_sequences=whole_sequences)
    head = LinearHead(hidden, weight, bias, (low, high), plan.chunks(), needs)
    softmax = Softmax(temperature, softcap, backend)
    rows = HeadRows(head, softmax, token_ids, row_index, vocab_range, plan.order)

    def loss_so_far() -> tuple[Tensor, ...]:
        """Loss, metrics and slopes, true of the tokens whose log-probs are known."""
        result: tuple[Tensor, ...] = _library.op("grpo_loss_fwd", backend)(
            rows.logprobs,
            old_logprobs,
            advantages,
            cu_seqlens,
            ref_logprobs,
            rows.entropy_of_tokens(),
            token_weights,
            *loss_scalars,
        )
        return result

    for chunk in plan.counted:
        rows.forward(chunk)
    for group in plan.groups:
        for chunk in group:
            logits = rows.forward(chunk)
        _, _, dlogprobs, dentropy = loss_so_far()
        of_rows = rows.sum_over_rows(dentropy) if entropy_bonus else None
        # From the back: the last chunk's logits are still there.
        for chunk in reversed(group):
            rows.backward(chunk, dlogprobs, of_rows, logits if chunk == group[-1] else None)
    loss, metrics, _, _ = loss_so_far()
    active = token_weights != 0
    logprobs = torch.where(active, rows.logprobs, 0.0)
    entropy = torch.where(active, rows.entropy_of_tokens(), 0.0)
    dhidden, dweight, dbias = head.finish()
    return loss, metrics, logprobs, entropy, rows.lse, dhidden, dweight, dbias


def _tokens(
    row_index: Tensor | None,
    advantages: Tensor,  # [B] or [T]
    cu_seqlens: Tensor,
    token_weights: Tensor,
    wanted: bool,
    every_active: bool,
) -> Tokens:
    """Which tokens count, and which of them can pull at the weights."""
    sequences = len(cu_seqlens) - 1
    position = torch.arange(len(token_weights), device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1
    active = token_weights != 0
    pulls = active & wanted
    if not every_active:
        of_token = advantages[sequence] if len(advantages) == sequences else advantages
        pulls = pulls & (of_token != 0)
    return Tokens(row_index, sequence, sequences, active, pulls)
