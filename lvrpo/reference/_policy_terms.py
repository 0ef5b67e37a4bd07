"""The parts of a policy loss at one token, as values; autograd makes their gradients.

No gradient comes from 0 times infinity: what a bound, a limit or a weight of 0 holds does not enter
an exponential at all.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvrpo.dtypes import number
from lvrpo.params.log_ratio import LOG_RATIO_LIMIT
from lvrpo.reference._log_ratio import saturate

if TYPE_CHECKING:
    from lvrpo.params.policy_loss import LossParams

#: VESPO's smallest ratio of a sequence.
GAMMA_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the surrogates see, all [T]: log-prob, log-ratio of the token, and log of the ratio at
    its level, which is within its limit; advantage. `level` carries the gradient of the ratio.
    """

    logp: Tensor
    log_ratio: Tensor
    level: Tensor
    advantage: Tensor

    @property
    def ratio(self) -> Tensor:
        """The ratio as a constant."""
        return self.level.detach().exp()


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequence of each token [T], and the active tokens of each sequence [B]."""

    of_token: Tensor
    count: Tensor

    def sum(self, x: Tensor) -> Tensor:
        """[T] -> [B]."""
        return x.new_zeros(len(self.count)).index_add(0, self.of_token, x)

    def mean(self, x: Tensor) -> Tensor:
        """[T] -> [B]; 0 for a sequence without active tokens."""
        return self.sum(x) / self.count.clamp(min=1)


def level_of(
    log_ratio: Tensor, advantage: Tensor, sequences: Sequences, params: LossParams
) -> Tensor:
    """The log of the ratio that multiplies the advantage, [T], before it saturates."""
    if params.ratio in ("none", "token"):
        return log_ratio
    if params.surrogate == "log_clip":
        low, high = number(-params.clip_low, log_ratio), number(params.clip_high, log_ratio)
        log_ratio = torch.where(advantage > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    elif params.surrogate == "gamma":
        total = sequences.sum(saturate(log_ratio, LOG_RATIO_LIMIT))
        return total.clamp(math.log(GAMMA_FLOOR), LOG_RATIO_LIMIT)[sequences.of_token]
    if params.ratio == "seq_sum":
        return sequences.sum(log_ratio)[sequences.of_token]
    mean = sequences.mean(log_ratio)[sequences.of_token]
    if params.ratio == "seq_mean_token":
        return mean.detach() + (log_ratio - log_ratio.detach())
    return mean


def kl_factor_level(log_ratio: Tensor, sequences: Sequences, params: LossParams) -> Tensor:
    """The log of the ratio that `kl_factor` multiplies the KL estimator by, [T]."""
    if params.kl_factor == "sequence_ratio":
        return sequences.mean(log_ratio)[sequences.of_token]
    return log_ratio


def surrogate(x: Tokens, params: LossParams) -> Tensor:
    """The policy term of each token, for a weight of one."""
    if params.ratio == "none":
        return -x.advantage * x.logp
    return SURROGATES[params.surrogate](x, params)


def clip(x: Tokens, params: LossParams) -> Tensor:
    """max(-min(rho, cap) A, -clip(rho) A): the sign of A picks the one bound that can bind."""
    low, high, cap = held(x, params)
    free = ~(low | high | cap) & (x.advantage != 0)
    bound = torch.ones_like(x.level)
    for by, value in zip((low, high, cap), _bounds(x, params), strict=True):
        bound = torch.where(by, value, bound)
    ratio = torch.where(free, x.level, 0.0).exp()
    return -x.advantage * torch.where(free, ratio, bound)


def detached(x: Tokens, params: LossParams) -> Tensor:
    """-sg(clip(rho)) A log pi: every token keeps a gradient (CISPO)."""
    low, high, _ = _bounds(x, params)
    weight = x.ratio.clamp(low, high)
    return -x.advantage * weight * x.logp


def sigmoid(x: Tokens, params: LossParams) -> Tensor:
    """-(4 / tau) sigmoid(tau (rho - 1)) A (SAPO)."""
    tau = _by_sign(x.advantage, params.gate_pos, params.gate_neg)
    # Past the published limit the gate is open and flat.
    ratio = x.level.clamp(max=LOG_RATIO_LIMIT).exp()
    return -x.advantage * torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau)


def gamma(x: Tokens, params: LossParams) -> Tensor:
    """-sg(e^l w^k e^(-l w)) A log pi, which is 1 at w = 1 (VESPO)."""
    w = x.ratio
    k = _by_sign(x.advantage, params.gamma_pos[0], params.gamma_neg[0])
    rate = _by_sign(x.advantage, params.gamma_pos[1], params.gamma_neg[1])
    return -x.advantage * torch.exp(rate + k * w.log() - rate * w) * x.logp


def trust_region(x: Tokens, params: LossParams) -> Tensor:
    """-sg(min(rho, cap)) A log pi inside the trust region, 0 outside (DPPO)."""
    _, _, cap = _bounds(x, params)
    weight = x.ratio.clamp(max=cap).where(inside_trust_region(x, params), 0.0)
    return -x.advantage * weight * x.logp


def log_clip(x: Tokens, params: LossParams) -> Tensor:
    """-rho A: the clip is inside the ratio already (GMPO)."""
    return -x.advantage * x.level.exp()


SURROGATES = {
    "clip": clip,
    "detached": detached,
    "sigmoid": sigmoid,
    "gamma": gamma,
    "total_variation": trust_region,
    "binary_kl": trust_region,
    "log_clip": log_clip,
}


def inside_trust_region(x: Tokens, params: LossParams) -> Tensor:
    """Whether the token's divergence from the old policy is small, or shrinks with this update."""
    new, old = x.logp.detach(), (x.logp - x.log_ratio).detach()
    change = new.exp() - old.exp()
    up = x.advantage > 0
    low, high = number(params.clip_low, new), number(params.clip_high, new)
    if params.surrogate == "total_variation":
        return torch.where(up, change <= high, change >= -low)
    # Of the token against all others; 1e-8 as in the published code, for a token of probability 1.
    rest_new, rest_old = ((-torch.expm1(p)).clamp(min=0.0) + 1e-8 for p in (new, old))
    divergence = old.exp() * (old - new) + (-torch.expm1(old)) * (rest_old / rest_new).log()
    near = torch.where(up, divergence <= high, divergence <= low)
    return near | torch.where(up, change <= 0, change >= 0)


def held(x: Tokens, params: LossParams) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens the lower bound, the upper bound and the cap hold."""
    negative, positive = x.advantage < 0, x.advantage > 0
    low, high, cap = _bounds(x, params)
    never = torch.zeros_like(negative)
    if params.ratio == "none":
        return never, never, never
    if params.surrogate == "clip":
        return negative & (x.ratio < low), positive & (x.ratio > high), negative & (x.ratio > cap)
    if params.surrogate == "detached":
        return x.ratio < low, x.ratio > high, never
    if params.surrogate == "log_clip":
        low, high = number(-params.clip_low, x.ratio), number(params.clip_high, x.ratio)
        return negative & (x.log_ratio < low), positive & (x.log_ratio > high), never
    if params.surrogate in ("total_variation", "binary_kl"):
        inside = inside_trust_region(x, params)
        return negative & ~inside, positive & ~inside, inside & (x.ratio > cap)
    return never, never, never


def kl_terms(
    logp: Tensor, ref: Tensor, factor_level: Tensor, params: LossParams, limit: float | None
) -> Tensor:
    """KL(policy || reference) of one sampled token, times its factor: what the loss sums.

    `factor_level` is the log of the factor before it saturates; `limit` bounds the log-ratio inside
    the exponentials.
    """
    d = ref - logp
    value = _estimate_kl(_clamp(d, params.kl_log_ratio_limit), params.kl, limit)
    if params.kl_limit is not None:
        most = number(params.kl_limit, value)
        flat = value.detach().abs() > most
        bound = value.detach().clamp(-most, most)
        inner = _clamp(torch.where(flat, 0.0, d), params.kl_log_ratio_limit)
        value = torch.where(flat, bound, _estimate_kl(inner, params.kl, limit))
    if params.kl_gradient == "k2":
        k2 = d.square() / 2
        value = k2 - k2.detach() + value.detach()
    if params.kl_factor != "none":
        factor = saturate(factor_level, limit).exp()
        value = value * (factor.detach() if params.kl_factor == "detached_ratio" else factor)
    return value


def _estimate_kl(d: Tensor, kind: str, limit: float | None) -> Tensor:
    if kind == "k1":
        return -d
    if kind == "abs":
        return d.abs()
    if kind == "k2":
        return d.square() / 2
    # Above alone: a log-ratio far below 0 is no danger to an exponential.
    return excess(d if limit is None else d.clamp(max=number(limit, d)))


def excess(d: Tensor) -> Tensor:
    """e^d - 1 - d; expm1, because e^d - 1 in fp32 keeps nothing of a small d's square."""
    return torch.expm1(d) - d


def _clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-number(limit, x), number(limit, x))


def _bounds(x: Tokens, params: LossParams) -> tuple[Any, Any, Any]:
    """The lower bound, the upper bound and the cap of a ratio."""
    high, cap = 1.0 + params.clip_high, math.inf if params.ratio_cap is None else params.ratio_cap
    if params.surrogate == "clip":  # -min(min(rho, cap) A, clip(rho) A), whichever is the lesser
        high, cap = min(high, cap), max(high, cap)
    low, high, cap = (number(bound, x.level) for bound in (1.0 - params.clip_low, high, cap))
    return low, high, cap


def _by_sign(advantage: Tensor, positive: float, otherwise: float) -> Tensor:
    zero = torch.zeros_like(advantage)
    return torch.where(advantage > 0, zero + positive, zero + otherwise)
