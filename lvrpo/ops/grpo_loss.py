"""The policy loss of GRPO and its relatives: loss, metrics and gradient in one pass.

T packed tokens or [B, C] padded ones, B sequences. Derivation: docs/ops/grpo_loss.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvrpo import backends, checks
from lvrpo.backends import library
from lvrpo.backends.bound import bind
from lvrpo.dtypes import widen
from lvrpo.ops.head.as_given import GivenTerms, given_terms
from lvrpo.ops.head.loss_inputs import Numbers, loss_inputs
from lvrpo.params.loss_metrics import STATISTICS, LossMetrics
from lvrpo.params.policy_loss import LOSS_NUMBERS, LOSS_PRESETS, LossParams, PolicyLoss
from lvrpo.reference.grpo_loss import grpo_loss as reference_grpo_loss
from lvrpo.token_layout import Level

OP = "grpo_loss"
__all__ = ["LOSS_PRESETS", "LossMetrics", "LossParams", "PolicyLoss", "grpo_loss"]

_DEFAULT = LossParams()
_DROPPED = STATISTICS.index("dropped_tokens")
library.check_table(OP, "numbers", LOSS_NUMBERS)
library.check_table(OP, "statistics", STATISTICS)


@checks.replaced(token_weights=checks.MASK_AND_WEIGHTS)
def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Numbers,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    mask: Numbers | None = None,
    policy_weights: Numbers | None = None,
    level: Level | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    denominator: float | Tensor | None = None,
    top_entropy: float | None = None,
    entropy_threshold: float | Tensor | None = None,
    off_policy_threshold: float | None = None,
    sampler_logprobs: Numbers | None = None,
    params: LossParams = _DEFAULT,
    backend: str | None = None,
) -> PolicyLoss:
    """Surrogate(ratio, A) + beta KL - entropy_coef H of every token, aggregated.

    Differentiable in `logprobs` and `entropy`; everything else is data. Under autocast inputs are
    taken as they are, as those of torch's own losses that run in fp32.

    Args:
        logprobs: log-probs of the sampled tokens under the policy, nats, any floating dtype: [T]
            packed, or [B, C] with a sequence a row.
        old_logprobs: the same, in the same shape, under the policy that sampled them. None: that is
            this policy, the ratio is exactly 1 and its gradient is that of the log-prob.
        advantages: [B] or [B, 1] per sequence, or in the shape of the tokens one for each. The
            ratios "seq_mean" and "seq_sum" take one per sequence only.
        cu_seqlens: [B + 1] offsets of packed sequences, int32 or int64; a sequence may be empty.
            None for padded tokens.
        mask: in the shape of the tokens, of any dtype: what is above 0 counts in denominators, KL,
            entropy and metrics. The other tokens are left out altogether, and may hold anything.
            None: all count.
        policy_weights: in the shape of the tokens, >= 0: factors of the policy term alone, such as
            those of `sampler_weights` or `top_entropy_mask`. 0 drops that term; the token counts,
            and has its KL and entropy, all the same.
        level: "sequence" or "token", what the advantages are given for; needed where [B] and [T]
            are one size.
        ref_logprobs: log-probs under the reference policy; needed when beta > 0, and otherwise only
            for the KL metric.
        entropy: entropy at each token, nats; needed when entropy_coef is not 0, and by
            `top_entropy` and `entropy_threshold`.
        denominator: replaces the number that the outer mean divides by: the active tokens for
            "token_mean", 1 for "token_sum", the sequences for the others. Give the count of the
            whole optimiser step when a call sees a part of it (gradient accumulation, ranks,
            modalities); a sum of such losses is then the loss of the whole. A tensor is not read on
            the host. 0 is the count of a step without active tokens, whose loss is 0.
        top_entropy: in [0, 1]: only this fraction of the active tokens of the call, those of
            largest entropy, keeps its policy term (`top_entropy_mask`; 80/20 training). The others
            count, and have their KL, all the same. Needs `entropy`.
        entropy_threshold: instead of `top_entropy`, nats: tokens with at least this entropy keep
            their policy term. A number or a scalar tensor, such as the `top_entropy_threshold` of a
            whole step, of which calls see parts.
        off_policy_threshold: nats per token, >= 0: tokens with a negative advantage lose their
            policy term where the mean of sampler_logprobs - logprobs over the active tokens of
            their sequence is above it (`off_policy_sequence_mask`).
        sampler_logprobs: for that, log-probs in the shape of the tokens as the sampler reported
            them, NaN where it did not; None: `old_logprobs`.
        params: the loss.
        backend: a name of `lvrpo.backends.ALL`, or None for the first that can run.

    Returns:
        PolicyLoss in fp32 (fp64 from fp64 log-probs).

    Raises:
        TypeError: `token_weights` is given, which `mask` and `policy_weights` replaced.
        ValueError: shapes or dtypes do not match, or `params` asks for an input that is not given;
            on a CPU also when an input of an active token is not finite, a policy weight is
            negative, offsets do not fit, the denominator is 0 though tokens are active, or ratios
            overflow without `params.log_ratio_limit`. Where values are not read, such a token is
            dropped, and counted in `metrics.dropped_tokens`; offsets are clamped to [0, T], and a
            token that no sequence has counts nowhere.
    """
    selects = top_entropy, entropy_threshold, off_policy_threshold, sampler_logprobs
    if level is None and all(x is None for x in selects):
        quick = _as_given(
            given_terms(
                *(OP, logprobs, old_logprobs, advantages, cu_seqlens, ref_logprobs, entropy),
                *(mask, policy_weights, denominator, params),
            ),
            *(logprobs, entropy, params, backend),
        )
        if quick is not None:
            return quick
    checks.check_floating(OP, "logprobs", logprobs)
    logp = widen(logprobs)
    data = loss_inputs(
        OP,
        ("logprobs", logprobs),
        logp.dtype,
        old_logprobs=old_logprobs,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        mask=mask,
        policy_weights=policy_weights,
        level=level,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        denominator=denominator,
        top_entropy=top_entropy,
        entropy_threshold=entropy_threshold,
        off_policy_threshold=off_policy_threshold,
        sampler_logprobs=sampler_logprobs,
        params=params,
    )
    if entropy is None and params.entropy_coef != 0:
        raise ValueError(f"{OP}: entropy is None, but entropy_coef is {params.entropy_coef}")
    if entropy is None and data.selection.by_entropy:
        raise ValueError(
            f"{OP}: entropy is None, but top_entropy is {top_entropy} and entropy_threshold is "
            f"{entropy_threshold}"
        )
    logp = logp if logp.dim() == 1 else logp.reshape(-1)
    tensors = (logprobs, *data.tensors())
    chosen = backends.resolve(OP, tensors, backend, choices=params.choices())
    functional = chosen.functional(OP, reference_grpo_loss)
    if functional is not None:
        loss, statistics = functional(logp, entropy=data.entropy, **data.for_reference())
    else:
        found = _GrpoLoss.apply(logp, data.entropy, data.terms(), chosen)  # type: ignore[no-untyped-call]
        loss, statistics = data.divided(*found)
    return PolicyLoss(*data.finish(loss, statistics, logp))


def _as_given(
    terms: GivenTerms | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    params: LossParams,
    backend: str | None,
) -> PolicyLoss | None:
    """The result, if kernels check their arguments, take these, and find nothing at fault."""
    if terms is None:
        return None
    bound = bind((OP, "grpo_loss_fwd"), reference_grpo_loss, params, logprobs, backend)
    reads, runs = checks.check_values(logprobs), bound.backend
    if reads:
        ready = runs.checks_offsets
    else:
        ready = runs.checks_arguments or terms.fit(logprobs, entropy)
    if bound.functional is not None or not ready:
        return None
    try:
        if torch.is_grad_enabled():
            loss, statistics = _GrpoLoss.apply(logprobs, entropy, terms, bound)  # type: ignore[no-untyped-call]
        else:
            loss, statistics, _, _ = terms.run(bound, logprobs, entropy)
    except RuntimeError:
        return None
    if reads and (statistics.tolist()[_DROPPED] > 0 or not math.isfinite(loss.item())):
        return None
    return PolicyLoss(loss, LossMetrics.from_statistics(statistics))


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logprobs: Tensor, entropy: Tensor | None, terms: Any, backend: Any
    ) -> tuple[Tensor, Tensor]:
        loss, statistics, dlogprobs, dentropy = terms.run(backend, logprobs, entropy)
        ctx.save_for_backward(dlogprobs, dentropy)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dlogprobs, dentropy = ctx.saved_tensors
        to_entropy = dloss * dentropy if ctx.needs_input_grad[1] else None
        return dloss * dlogprobs, to_entropy, None, None


@library.register("grpo_loss_fwd", kernels=OP)
def _fwd_fake(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    policy_weights: Tensor | None,
    numbers: Tensor,
    advantage_per_token: bool,
    count_empty: bool,
    ratio: str,
    surrogate: str,
    kl: str,
    kl_factor: str,
    kl_gradient: str,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(len(STATISTICS), dtype=torch.float64),
        logprobs.new_empty(logprobs.shape),
        logprobs.new_empty(0 if entropy is None else entropy.shape[0]),
    )
