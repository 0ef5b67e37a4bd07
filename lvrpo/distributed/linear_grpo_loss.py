"""`lvrpo.linear_grpo_loss` of a weight whose rows ranks share.

R rows of hidden states, H hidden width, V rows of the whole weight, T tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import Backend
from lvrpo.distributed import ranks
from lvrpo.distributed.linear import LOGITS, ShardProjection, project_shard
from lvrpo.distributed.plain import loss_of, with_kernels
from lvrpo.distributed.rows import ShardRows
from lvrpo.distributed.shards import VocabShards, local_shard, replicated
from lvrpo.distributed.targets import refuse_rows
from lvrpo.ops.head import fused
from lvrpo.ops.head.linear import LinearHead, dtypes_of
from lvrpo.ops.head.loss_inputs import LossInputs, Numbers, loss_inputs
from lvrpo.ops.head.targets import Ids, VocabRange
from lvrpo.params.policy_loss import FusedPolicyLoss, LossParams
from lvrpo.token_layout import Level

OP = "distributed.linear_grpo_loss"
_DEFAULT = LossParams()


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Ids,
    old_logprobs: Tensor | None,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    shards: VocabShards | None = None,
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
    """`lvrpo.linear_grpo_loss` of the whole weight, of which each rank has some rows.

    Every rank has all hidden states, tokens and data of the loss, and gets the same loss, metrics,
    log-probs and entropies, of the same bits. The forward, which forms the gradient, sends one
    message for each chunk of rows, and adds the gradient of the hidden states up over ranks, in
    fp32. The backward sends none; the gradient of weight and bias is the rank's own. Metrics are of
    all that there is: not to be reduced over this group.

    Args:
        hidden: as `lvrpo.linear_grpo_loss` takes it, the same on all ranks; a DTensor is to be
            replicated.
        weight: [V of this rank, H]; or a DTensor [V, H] that is split in its first dimension.
        token_ids: as `lvrpo.linear_grpo_loss` takes them; ids count through the whole vocabulary.
        old_logprobs: likewise, as everything below but for `shards` and `bias`.
        advantages: [B] per sequence or in the shape of the tokens.
        cu_seqlens: [B + 1] offsets of packed sequences in the tokens; None for padded ones.
        shards: from `VocabShards.of(weight)`; None for a DTensor.
        row_index: the row that predicts each token.
        bias: [V of this rank], or a DTensor like the weight.
        mask: what counts in denominators, KL, entropy and metrics.
        policy_weights: factors >= 0 of the policy term alone.
        level: what the advantages are given for.
        ref_logprobs: in the shape of the tokens.
        denominator: replaces the number that the outer mean divides by.
        top_entropy: the fraction of tokens that keeps its policy term.
        entropy_threshold: instead of it, nats.
        off_policy_threshold: nats per token.
        sampler_logprobs: for that, in the shape of the tokens; None: `old_logprobs`.
        params: the loss.
        temperature: divides the logits; finite, > 0.
        softcap: cap of the logits, > 0.
        vocab_range: columns of the whole vocabulary.
        ignore_index: id of a token without a target.
        memory_budget: bytes of a rank's logits that exist at a time.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        FusedPolicyLoss in fp32 (fp64 from fp64).

    Raises:
        ValueError: as `lvrpo.linear_grpo_loss`, and as `lvrpo.distributed.gather_logprobs`.
        RuntimeError: a rank does not answer.
    """
    weight, shards = local_shard(OP, "weight", weight, shards, 0)
    with ranks.agreement(OP, shards.group, weight) as facts:
        checks.check_scale(OP, temperature, softcap)
        head = project_shard(
            *(OP, facts, replicated(OP, "hidden", hidden), weight, bias, token_ids, row_index),
            *(shards, vocab_range, ignore_index, memory_budget),
            temperature=temperature,
            softcap=softcap,
        )
        targets = head.targets
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
        ).of_targets(targets, head.strange)
        tensors = (*head.factors(), *targets.indices(), *data.tensors())
        chosen = backends.resolve("linear_grpo_loss", tensors, backend, choices=params.choices())
        _note_loss(facts, data)
    indices = head.own.token_ids, head.own.row_index, head.own.ranges
    arguments = fused.loss_arguments(indices, data, temperature, softcap)
    kernels = with_kernels(chosen, "linear_grpo_loss")
    options = _Options(head, loss_of(arguments, data, kernels), head.needs(), kernels)
    *result, lse = _LinearGrpoLoss.apply(*head.factors(), options)  # type: ignore[no-untyped-call]
    if kernels is chosen:  # the reference has divided
        result[:2] = data.divided(*result[:2])
    if checks.check_values(lse):
        refuse_rows(OP, LOGITS, ~lse.isfinite())
    return data.finish_fused(*result)


def _note_loss(facts: dict[str, Any], data: LossInputs) -> None:
    """What ranks have to have alike: what decides which rows have a gradient, and the loss."""
    if not checks.check_values(data.advantages):
        return
    facts["params"] = data.params
    selection, threshold = data.selection, data.selection.entropy_threshold
    facts["top_entropy"] = selection.top_entropy
    facts["entropy_threshold"] = None if threshold is None else float(threshold)
    facts["off_policy_threshold"] = selection.off_policy_threshold
    names = "old_logprobs", "ref_logprobs", "mask", "policy_weights", "advantages"
    tensors = {name: getattr(data, name) for name in names}
    for name, tensor in {**tensors, "sampler_logprobs": selection.sampler_logprobs}.items():
        facts[f"the number of {name} that are not 0"] = (
            None if tensor is None else int(tensor.count_nonzero())
        )
    facts["the sum of cu_seqlens"] = data.layout.offsets.sum().item()


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the op needs besides factors."""

    head: ShardProjection
    loss: fused.FusedLoss
    needs: list[bool]
    backend: Backend

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Loss, statistics, log-probs, entropies and log-sum-exps; and the gradients."""
        own, shards = self.head.own, self.head.shards
        plan = fused.plan_rows(self.loss, len(hidden), self.head.most, gradient=any(self.needs))
        head = LinearHead(hidden, weight, bias, own.columns, plan.chunks(), self.needs)
        numbers = self.loss.softmax_numbers
        rows = ShardRows(OP, head, self.backend, numbers, own, shards, plan.order)
        results = self.loss.run(rows, plan)
        gradients = list(head.finish())
        if self.needs[0]:
            ranks.add_up(OP, gradients[0], shards.group)
        return [*results, rows.lse], gradients


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options
    ) -> tuple[Tensor, ...]:
        results, gradients = options.run(hidden, weight, bias)
        ctx.dtype, ctx.options = hidden.dtype, options
        fused.save_gradients(ctx, (hidden, weight, bias), gradients)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        def recompute() -> list[Tensor]:
            options: _Options = ctx.options
            return options.run(*ctx.saved_tensors)[1]

        gradients = fused.release_gradients(ctx, dloss, ctx.dtype, ctx.options.backend, recompute)
        needs = ctx.needs_input_grad[:3]
        wanted = (x if needed else None for x, needed in zip(gradients, needs, strict=True))
        return *wanted, None
