"""The policy loss from hidden states: projection, log-probs, loss and gradient at three GEMMs.

R rows of hidden states, H hidden width, V vocabulary, T target tokens, B sequences. How and why:
docs/ops/linear_grpo_loss.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from lvrpo import backends, checks
from lvrpo.ops._linear_loss import fused_loss
from lvrpo.ops._loss_inputs import Level, Numbers, loss_inputs
from lvrpo.ops.head import budget as _inputs
from lvrpo.ops.head import targets as _targets
from lvrpo.ops.head.gemm import dtypes_of
from lvrpo.ops.head.targets import Ids, VocabRange
from lvrpo.params.policy_loss import FusedPolicyLoss, LossParams
from lvrpo.reference.linear_grpo_loss import linear_grpo_loss as reference_linear_grpo_loss

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

    The gradients wait, unscaled and in fp32, for the backward, which scales them by its upstream
    gradient and gives them away; a second backward computes them anew. On a GPU one small read
    before the first GEMM says how many rows have a gradient (for ratios per sequence also where
    chunks may end). While a CUDA graph is captured nothing is read and every row counts as such.

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
        FusedPolicyLoss in fp32 (fp64 from fp64).

    Raises:
        ValueError: as `linear_logprobs` and `grpo_loss`.
    """
    shaped = hidden
    hidden, weight, bias = factors = _inputs.as_factors(OP, hidden, weight, bias)
    pair = vocab_range if _targets.is_pair(vocab_range) else None
    vocab = _inputs.vocab_slice(OP, pair, weight.shape[0])
    _targets.check_scale(OP, temperature, softcap)
    targets, strange = _targets.as_targets(
        *(OP, "hidden", shaped, weight.shape[0]),
        *(token_ids, row_index, vocab_range, ignore_index),
    ).without_strangers(weight.shape[0])
    most = _inputs.rows_at_once(OP, hidden, vocab.high - vocab.low, memory_budget)
    data = loss_inputs(
        OP,
        ("token_ids", targets.token_ids.reshape(targets.tokens)),
        dtypes_of(hidden)[1],
        old_logprobs=old_logprobs,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        policy_weights=policy_weights,
        level=level,
        ref_logprobs=ref_logprobs,
        entropy=None,
        denominator=denominator,
        params=params,
    ).of_targets(targets, strange)
    indices = targets.token_ids, targets.row_index, targets.ranges
    tensors = (*factors, *indices, *data.tensors())
    chosen = backends.resolve(OP, tensors, backend, choices=params.choices())
    functional = chosen.functional(OP, reference_linear_grpo_loss)
    if functional is not None:
        with checks.without_autocast(hidden):
            result = functional(
                hidden,
                weight,
                targets.token_ids,
                bias=bias,
                row_index=targets.row_index,
                vocab_range=targets.ranges,
                temperature=temperature,
                softcap=softcap,
                ignore_index=ignore_index,
                **data.for_reference(),
            )
    else:
        result = fused_loss(
            factors,
            targets,
            vocab if pair is not None else dataclasses.replace(vocab, ranges=targets.ranges),
            data,
            temperature=temperature,
            softcap=softcap,
            most=most,
            backend=chosen.name,
        )
    return data.finish_fused(*result)
