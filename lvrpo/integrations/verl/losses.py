"""verl's policy losses by `lvrpo.grpo_loss`. B responses of C columns, padded: [B, C]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.covariance import clip_cov_weights, kl_cov_reference
from lvrpo.ops.grpo_loss import grpo_loss
from lvrpo.params.from_verl import OWN_KL, policy_fields, refuse
from lvrpo.params.loss_metrics import LossMetrics
from lvrpo.params.policy_loss import LossParams

#: Added to a weight before its logarithm, as in verl.
SMALLEST_WEIGHT = 1e-10


def policy_loss(
    loss: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """One of verl's losses, with the arguments that verl calls a registered loss with.

    KL to the reference and entropy bonus are no part of it: verl adds them.

    Args:
        loss: what verl calls it, without "lvrpo_".
        old_log_prob: [B, C] under the policy before the update, nats.
        log_prob: [B, C] under the policy, differentiated.
        advantages: [B, C].
        response_mask: [B, C], 1 for tokens that are trained on; the others may hold anything.
        loss_agg_mode: as `actor.loss_agg_mode`; "geo_mean" and "sapo" have their own.
        config: an `ActorConfig`; what `global_batch_info` counts is what the loss is divided by.
        rollout_is_weights: [B, C] importance weights, constants; or None.

    Returns:
        The loss, and metrics by the names of verl: actor/pg_clipfrac, actor/pg_clipfrac_lower,
        actor/ppo_kl.

    Raises:
        ValueError: as `LossParams.from_verl` and `grpo_loss`; importance weights are given for a
            loss with a divergence of its own, which verl weighs too.
    """
    params = LossParams(**policy_fields(config, loss, loss_agg_mode, log_prob.shape[1]))
    if loss in OWN_KL and rollout_is_weights is not None:
        why = f"but {loss!r} has a divergence, which verl would weigh too"
        refuse("rollout_is_weights", "given", why, "None, or another loss_mode")
    weights, reference = rollout_is_weights, None
    active, new = response_mask > 0, log_prob.detach()
    if loss == "geo_mean":
        advantages, weights = _of_sequences(advantages, active, weights), None
    elif loss == "clip_cov":
        chosen = clip_cov_weights(
            *(new, old_log_prob, advantages),
            fraction=config.policy_loss.clip_cov_ratio,
            low=config.policy_loss.clip_cov_lb,
            high=config.policy_loss.clip_cov_ub,
            mask=response_mask,
            params=params,
        )
        weights = chosen if weights is None else chosen * weights
    elif loss == "kl_cov":
        share = config.policy_loss.kl_cov_ratio
        reference = kl_cov_reference(
            *(new, old_log_prob, advantages), fraction=share, mask=response_mask
        )
    elif loss == "dro":
        reference = old_log_prob
    result = grpo_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask=response_mask,
        policy_weights=weights,
        level="sequence" if loss == "geo_mean" else "token",
        ref_logprobs=reference,
        denominator=None if loss == "geo_mean" else _denominator(params, config.global_batch_info),
        params=params,
    )
    gap = torch.where(active, old_log_prob - new, 0.0)
    gap = gap.abs() if loss == "kl_cov" else gap
    return result.loss, _metrics(result.metrics, gap.sum() / active.sum().clamp(min=1))


def _denominator(params: LossParams, info: dict[str, Any]) -> float | Tensor | None:
    """What an optimiser step divides by, for ranks that verl averages the gradients of."""
    ranks = info.get("dp_size") or 1
    name = {"token_mean": "batch_num_tokens", "token_sum": None}.get(
        params.aggregation, "global_batch_size"
    )
    count = 1 if name is None else info.get(name)
    if count is None:
        if ranks > 1:
            why = f"but dp_size is {ranks}"
            refuse(f"global_batch_info[{name!r}]", None, why, "the count of all ranks")
        return None
    return count / ranks


def _of_sequences(advantages: Tensor, active: Tensor, weights: Tensor | None) -> Tensor:
    """[B], the mean over each response, times the geometric mean of its weights."""
    count = active.sum(1).clamp(min=1)
    a = torch.where(active, advantages, 0.0)
    if checks.check_values(a) and bool(((a > 0).any(1) & (a < 0).any(1)).any()):
        why = "of both signs in one response, but 'geo_mean' clips by the sign of a response"
        refuse("advantages", "given", why, "an estimator with one advantage per response")
    mean = a.sum(1) / count
    if weights is None:
        return mean
    logs = torch.where(active, (weights + SMALLEST_WEIGHT).log(), 0.0)
    return mean * (logs.sum(1) / count).exp()


def _metrics(metrics: LossMetrics, kl: Tensor) -> dict[str, float]:
    found = {
        "actor/pg_clipfrac": metrics.clip_fraction_low + metrics.clip_fraction_high,
        "actor/pg_clipfrac_lower": metrics.clip_fraction_cap,
        "actor/ppo_kl": kl,
    }
    values = torch.stack([value.double() for value in found.values()]).tolist()  # one wait
    return dict(zip(found, values, strict=True))
