"""Tokens whose log-prob and advantage are far above their means together, of which entropy dies.

Clip-Cov and KL-Cov, https://arxiv.org/abs/2505.22617. [B, C] padded tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvrpo.params.policy_loss import LossParams


def clip_cov_tokens(
    old_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    active: Tensor,
    options: Any,
    params: LossParams,
) -> Tensor:
    """[B, C] bool, the tokens that Clip-Cov takes the policy term from.

    At random, of those that the clip does not hold and whose covariance is between `clip_cov_lb`
    and `clip_cov_ub`, the share `clip_cov_ratio` of the active tokens, but at least one.
    """
    ratio = (logprobs - old_logprobs).exp()
    above, below = ratio > 1 + params.clip_high, ratio < 1 - params.clip_low
    held = torch.where(advantages > 0, above, below & (advantages < 0))
    covariance = _covariance(logprobs, advantages, active)
    inside = (covariance > options.clip_cov_lb) & (covariance < options.clip_cov_ub)
    chance = torch.rand(logprobs.shape, device=logprobs.device)
    share = _share(options.clip_cov_ratio, active)
    return _largest(chance.masked_fill(~(inside & active & ~held), -torch.inf), share)


def kl_cov_tokens(logprobs: Tensor, advantages: Tensor, active: Tensor, options: Any) -> Tensor:
    """[B, C] bool, the tokens that KL-Cov holds to the old policy.

    The share `kl_cov_ratio` of the active tokens with the largest covariance, but at least one.
    """
    covariance = _covariance(logprobs, advantages, active)
    return _largest(covariance, _share(options.kl_cov_ratio, active))


def _covariance(logprobs: Tensor, advantages: Tensor, active: Tensor) -> Tensor:
    """What each active token has of it; -inf for the others."""

    def centred(x: Tensor) -> Tensor:
        x = torch.where(active, x, 0.0)
        return x - x.sum() / active.sum().clamp(min=1)

    return (centred(advantages) * centred(logprobs)).masked_fill(~active, -torch.inf)


def _share(fraction: float, active: Tensor) -> Tensor:
    return (fraction * active.sum().double()).floor().clamp(min=1)


def _largest(x: Tensor, count: Tensor) -> Tensor:
    """The `count` largest elements that are not -inf; the first ones of equals."""
    rank = x.reshape(-1).argsort(descending=True, stable=True).argsort().reshape(x.shape)
    return (rank < count) & (x > -torch.inf)
