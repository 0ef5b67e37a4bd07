"""The policy losses as one writes them in plain PyTorch, by docs/ops/grpo_loss.md alone.

A loop over sequences that looks at their active tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def softmax_terms(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens and entropies, [R]."""
    log_p = torch.log_softmax(logits, dim=-1)
    return log_p.gather(1, token_ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)


def policy_loss(
    logp: Tensor,  # [T], like all that follows but `lengths`
    entropy: Tensor,
    lengths: Sequence[int],  # [B]
    *,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    ref: Tensor | None = None,
    denominator: float | None = None,
    params: Any,
) -> Tensor:
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    weights = torch.ones_like(logp) if weights is None else weights
    sums, counts = [], []
    for at in torch.arange(len(logp)).split(list(lengths)):
        at = at[mask[at]]
        x, before = logp[at], logp[at].detach() if old is None else old[at]
        terms = weights[at] * surrogate(x, before, advantages[at], params)
        if params.beta:
            terms = terms + params.beta * kl(x, before, ref[at], params)
        terms = terms - params.entropy_coef * entropy[at]
        inner = {
            "seq_mean_token_mean": max(len(at), 1),
            "seq_mean_token_sum_norm": params.max_length,
        }
        sums.append(terms.sum() / inner.get(params.aggregation, 1))
        counts.append(len(at))
    if denominator is None:
        of_sequences = len(counts) if params.count_empty else sum(map(bool, counts))
        whole = {"token_mean": sum(counts), "token_sum": 1}
        denominator = max(whole.get(params.aggregation, of_sequences), 1)
    return torch.stack(sums).sum() / denominator


def surrogate(x: Tensor, old: Tensor, a: Tensor, p: Any) -> Tensor:
    """The terms of the active tokens of one sequence."""
    if p.ratio == "none" or not len(x):
        return -a * x
    limit = math.inf if p.log_ratio_limit is None else p.log_ratio_limit
    low, high = p.clip_low, p.clip_high
    cap = math.inf if p.ratio_cap is None else p.ratio_cap
    d = x - old
    if p.surrogate == "gamma":
        w = d.detach().clamp(-20, 20).sum().clamp(math.log(1e-8), 20).clamp(-limit, limit).exp()
        k, rate = (torch.where(a > 0, *pair) for pair in zip(p.gamma_pos, p.gamma_neg, strict=True))
        return -a * (rate + k * w.log() - rate * w).exp() * x
    if p.surrogate == "log_clip":
        d = torch.where(a > 0, d.clamp(max=high), d.clamp(min=-low))
    level = {
        "token": lambda: d,
        "seq_mean": lambda: d.mean().expand_as(d),
        "seq_mean_token": lambda: d.detach().mean() + d - d.detach(),
        "seq_sum": lambda: d.sum().expand_as(d),
    }[p.ratio]()
    if p.surrogate == "sigmoid":
        tau = torch.where(a > 0, p.gate_pos, p.gate_neg).to(x)
        rho = level.clamp(-limit, min(limit, 20.0)).exp()
        return -a * 4 / tau * torch.sigmoid(tau * (rho - 1))
    rho = level.clamp(-limit, limit).exp()
    if p.surrogate == "log_clip":
        return -a * rho
    if p.surrogate == "clip":
        return -torch.minimum(rho.clamp(max=cap) * a, rho.clamp(1 - low, 1 + high) * a)
    if p.surrogate == "detached":
        return -a * rho.detach().clamp(1 - low, 1 + high) * x
    new, before = x.detach().exp(), old.exp()
    inside = torch.where(a > 0, new - before <= high, new - before >= -low)
    if p.surrogate == "binary_kl":
        far = before * (old - x.detach())
        far = far + (1 - before) * ((1 - before + 1e-8) / (1 - new + 1e-8)).log()
        back = torch.where(a > 0, new <= before, new >= before)
        inside = (far <= torch.where(a > 0, high, low)) | back
    return -a * rho.detach().clamp(max=cap) * x * inside


def kl(x: Tensor, old: Tensor, ref: Tensor, p: Any) -> Tensor:
    """The estimator at each token, times its factor."""
    limit = math.inf if p.log_ratio_limit is None else p.log_ratio_limit
    d = ref - x
    near = d.clamp(max=limit)
    value = {
        "k1": lambda: -d,
        "k2": lambda: d.square() / 2,
        "k3": lambda: torch.expm1(near) - near,
        "abs": lambda: d.abs(),
    }[p.kl]()
    if p.kl_gradient == "k2":
        value = value.detach() + (d.square() - d.square().detach()) / 2
    if p.kl_factor == "none" or not len(x):
        return value
    gap = x - old
    gap = gap.mean() if p.kl_factor == "sequence_ratio" else gap
    ratio = gap.clamp(-limit, limit).exp()
    return value * (ratio.detach() if p.kl_factor == "detached_ratio" else ratio)
