"""The policy loss from hidden states: projection, log-probs, loss and gradient at three GEMMs.

R rows of hidden states, H hidden width, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/linear_grpo_loss.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import library
from lvrpo.ops.head import fused
from lvrpo.ops.head.linear import LinearHead, dtypes_of, empty_gradients, project
from lvrpo.ops.head.loss_inputs import Numbers, loss_inputs
from lvrpo.ops.head.rows import refuse_rows
from lvrpo.ops.head.targets import Ids, VocabRange
from lvrpo.params.policy_loss import FusedPolicyLoss, LossParams
from lvrpo.reference.linear_grpo_loss import linear_grpo_loss as reference_linear_grpo_loss
from lvrpo.token_layout import Level

OP = "linear_grpo_loss"
_DEFAULT = LossParams()


@checks.replaced(token_weights=checks.MASK_AND_WEIGHTS)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Ids,
    old_logprobs: Tensor | None,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    row_index: Ids | None = None,
    bias: Tensor | None = None,
    mask: Numbers | None = None,
    policy_weights: Numbers | None = None,
    level: Level | None = None,
    ref_logprobs: Tensor | None = None,
    denominator: float | Tensor | None = None,
    top_entropy: float | None = None,
    entropy_threshold: float | Tensor | None = None,
    off_policy_threshold: float | None = None,
    sampler_logprobs: Numbers | None = None,
    params: LossParams = _DEFAULT,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_range: VocabRange = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> FusedPolicyLoss:
    """`grpo_loss` of the log-probs and entropies of `linear_logprobs`, with its gradient.

    Differentiable in `hidden`, `weight` and `bias`. What a token adds to the loss depends on its
    own row (or sequence) only, so the forward forms the gradient of each chunk of logits while they
    are there: none are kept and none computed twice. Rows whose gradient is zero whatever their
    logits (advantage 0, no KL, no entropy bonus) are projected for the metrics and no more; rows
    without an unmasked token are left out, and may hold anything. Under autocast as F.linear:
    hidden, weight and bias go to its dtype (fp64 does not), sums stay fp32, gradients come back in
    the dtypes that were given.

    The gradients wait in fp32 for the backward, which gives them away: a second one computes them
    anew. On a GPU one small read before the first GEMM says how many rows have a gradient; while a
    CUDA graph is captured nothing is read, and every row counts as such.

    Args:
        hidden: [R, H], or [B, C, H] for padded tokens; fp32, fp64, bf16 or fp16.
        weight: [V, H] of the same dtype (of any, under autocast); may be shared with the embedding.
            Frozen (`requires_grad=False`) it costs no gradient GEMM and no buffer, and so does
            `hidden`.
        token_ids: [T] packed or [B, C] padded, of any integer dtype. A token of `ignore_index` is
            masked.
        old_logprobs: as `grpo_loss` takes them, like everything below up to `params`.
        advantages: [B] per sequence or in the shape of the tokens.
        cu_seqlens: [B + 1] offsets of packed sequences in the tokens; None for padded ones.
        row_index: the row (of the flattened ones) that predicts each token, in the shape of the
            tokens; None: token t belongs to row t.
        bias: [V] of the dtype of the weight.
        mask: what counts in denominators, KL, entropy and metrics.
        policy_weights: factors >= 0 of the policy term alone.
        level: what the advantages are given for.
        ref_logprobs: in the shape of the tokens.
        denominator: replaces the number that the outer mean divides by.
        top_entropy: the fraction of tokens that keeps its policy term, by the entropies of this
            pass. What it drops depends on all of them: rows are projected first, and all but the
            last chunk of those with a gradient a second time for it, a fourth GEMM.
        entropy_threshold: instead of it, nats, at three GEMMs.
        off_policy_threshold: nats per token; a fourth GEMM as for a ratio per sequence.
        sampler_logprobs: for that, in the shape of the tokens; None: `old_logprobs`.
        params: the loss. The entropy that `entropy_coef` needs is computed here. A ratio per
            sequence costs a fourth GEMM where a sequence does not fit the budget.
        temperature: divides the logits; finite, > 0.
        softcap: as in `linear_logprobs`.
        vocab_range: likewise; a pair multiplies that slice of the weight only.
        ignore_index: see `token_ids`.
        memory_budget: likewise; the one thing to tune. Larger chunks touch the weight and its
            gradient less often.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run; the
            reference, "torch", has all logits at once.

    Returns:
        FusedPolicyLoss in fp32 (fp64 from fp64).

    Raises:
        ValueError: as `linear_logprobs` and `grpo_loss`.
    """
    checks.check_scale(OP, temperature, softcap)
    head = project(
        OP, hidden, weight, bias, token_ids, row_index, vocab_range, ignore_index, memory_budget
    )
    targets, strange = head.targets.without_strangers(len(head.weight))
    head = dataclasses.replace(head, targets=targets)
    data = loss_inputs(
        OP,
        ("token_ids", targets.token_ids.reshape(targets.tokens)),
        dtypes_of(head.hidden)[1],
        old_logprobs=old_logprobs,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        policy_weights=policy_weights,
        level=level,
        ref_logprobs=ref_logprobs,
        denominator=denominator,
        top_entropy=top_entropy,
        entropy_threshold=entropy_threshold,
        off_policy_threshold=off_policy_threshold,
        sampler_logprobs=sampler_logprobs,
        params=params,
    ).of_targets(targets, strange)
    tensors = (*head.factors(), *targets.indices(), *data.tensors())
    chosen = backends.resolve(OP, tensors, backend, choices=params.choices())
    functional = chosen.functional(OP, reference_linear_grpo_loss)
    if functional is not None:
        with checks.without_autocast(head.hidden):
            result = functional(
                head.hidden,
                head.weight,
                targets.token_ids,
                bias=head.bias,
                row_index=targets.row_index,
                vocab_range=targets.ranges,
                temperature=temperature,
                softcap=softcap,
                ignore_index=ignore_index,
                **data.for_reference(),
            )
    else:
        differentiates = torch.is_grad_enabled()
        needs = [differentiates and x is not None and x.requires_grad for x in head.factors()]
        tensors_of_loss, *loss = fused.loss_arguments(head.indices(), data, temperature, softcap)
        options = (*loss, needs, *head.columns, head.most, chosen.name)
        *result, lse = _LinearGrpoLoss.apply(*head.factors(), tensors_of_loss, options)  # type: ignore[no-untyped-call]
        result[:2] = data.divided(*result[:2])
        refuse_rows(OP, lse, "hidden @ weight.T + bias")
    return data.finish_fused(*result)


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: list[Tensor | None],
        options: tuple[Any, ...],  # what else the op takes
    ) -> tuple[Tensor, ...]:
        run = torch.ops.lvrpo.linear_grpo_loss_fwd
        *results, dhidden, dweight, dbias = run(hidden, weight, bias, tensors, *options)
        ctx.dtype, ctx.options = hidden.dtype, options
        fused.save_gradients(ctx, (hidden, weight, bias, *tensors), [dhidden, dweight, dbias])
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        def recompute() -> list[Tensor]:
            hidden, weight, bias, *tensors = ctx.saved_tensors
            run = torch.ops.lvrpo.linear_grpo_loss_fwd
            return list(run(hidden, weight, bias, tensors, *ctx.options)[-3:])

        backend = backends.named(ctx.options[-1])
        gradients = fused.release_gradients(ctx, dloss, ctx.dtype, backend, recompute)
        needs = ctx.needs_input_grad[:3]
        wanted = (x if needed else None for x, needed in zip(gradients, needs, strict=True))
        return *wanted, None, None


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    names: str,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    like = hidden.new_empty(0, dtype=dtypes_of(hidden)[1])
    gradients = empty_gradients(hidden, weight, bias, needs, like.dtype)
    return *fused.empty_results(like, tensors[0], hidden.shape[0]), *gradients


@library.composite("linear_grpo_loss_fwd", _fwd_fake, of=["gather_logprobs", "grpo_loss"])
def _fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor | None],
    flags: Sequence[bool],
    names: str,
    needs: Sequence[bool],
    low: int,
    high: int,
    most: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = fused.FusedLoss.from_arguments(tensors, flags, names)
    plan = fused.plan_rows(call, len(hidden), most, gradient=any(needs))
    head = LinearHead(hidden, weight, bias, (low, high), plan.chunks(), needs)
    rows = call.rows(head, backends.named(backend), plan.order)
    results = call.run(rows, plan)
    dhidden, dweight, dbias = head.finish()
    return *results, rows.lse, dhidden, dweight, dbias
