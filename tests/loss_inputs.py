"""Inputs of grpo_loss that its test files share, and the scales of their rounding errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from presets import LOSS_FORMS
from torch import Tensor

from lvrpo.ops.grpo_loss import LossMetrics, LossParams, grpo_loss
from lvrpo.reference._policy_terms import Sequences, level_of
from lvrpo.reference.grpo_loss import grpo_loss as reference_grpo_loss

INF = math.inf
PARAMS = {
    "grpo": LossParams(),
    "grpo, all terms": LossParams(beta=0.04, entropy_coef=0.01, clip_high=0.28, ratio_cap=1.4),
    "dr_grpo, k1": LossParams.preset("dr_grpo", max_length=64, beta=0.1, kl="k1"),
    "bnpo, k2 times ratio": LossParams.preset("bnpo", beta=0.1, kl="k2", kl_factor="ratio"),
    "dapo, k3 times ratio": LossParams.preset("dapo", beta=0.1, kl_factor="ratio"),
    "token sum, abs": LossParams(aggregation="seq_mean_token_sum", beta=0.1, kl="abs"),
    "gspo": LossParams.preset("gspo", clip_low=0.05, clip_high=0.06),
    "gspo, all terms": LossParams.preset(
        "gspo", clip_low=0.05, clip_high=0.06, ratio_cap=1.1, beta=0.1, entropy_coef=-0.02
    ),
    "reinforce": LossParams.preset("reinforce", beta=0.1),
    "no clip": LossParams(clip_low=INF, clip_high=INF),
    "gspo_token, all terms": LossParams.preset(
        "gspo_token",
        clip_low=0.02,
        clip_high=0.03,
        ratio_cap=1.04,
        beta=0.1,
        kl_gradient="k2",
        entropy_coef=0.01,
    ),
    "cispo, both bounds": LossParams.preset(
        "cispo", clip_low=0.2, clip_high=0.28, beta=0.1, kl_factor="detached_ratio"
    ),
    "cispo of a sequence, below 1": LossParams.preset(
        "cispo", ratio="seq_mean", clip_high=-0.05, beta=0.1, kl_factor="sequence_ratio"
    ),
    "sapo": LossParams.preset("sapo", gate_neg=2.0, entropy_coef=0.01),
    "sapo of a sequence": LossParams.preset("sapo", ratio="seq_mean", gate_neg=2.0),
    "gspo, KL times its ratio": LossParams.preset(
        "gspo", clip_low=0.05, clip_high=0.06, beta=0.5, kl_factor="sequence_ratio"
    ),
    "gmpo, clamped KL times a ratio": LossParams.preset(
        "gmpo", beta=0.5, kl="k1", kl_limit=0.4, kl_factor="sequence_ratio"
    ),
    "vespo, k2 times a ratio": LossParams.preset(
        "vespo", beta=0.5, kl="k2", kl_factor="sequence_ratio", kl_gradient="k2"
    ),
    "ratio of the sequence in the KL alone": LossParams(
        beta=0.5, kl_factor="sequence_ratio", entropy_coef=0.01
    ),
    "cap below the clip": LossParams(clip_high=0.28, ratio_cap=1.1),
    "vespo, clamped KL": LossParams.preset(
        "vespo", beta=0.1, kl_log_ratio_limit=0.5, kl_limit=0.12, kl_factor="ratio"
    ),
    "luspo": LossParams.preset("luspo", clip_low=0.05, clip_high=0.06),
    "gmpo": LossParams.preset("gmpo", clip_low=0.2, clip_high=0.3, beta=0.1, kl="abs"),
    "rloo": LossParams.preset("rloo", ratio_cap=1.5, count_empty=False),
    "dppo_tv": LossParams.preset("dppo_tv", clip_low=0.1, ratio_cap=1.2),
    "dppo_kl": LossParams.preset("dppo_kl", clip_low=0.01, clip_high=0.02, ratio_cap=1.2),
    "token sum": LossParams(
        aggregation="token_sum", beta=0.1, kl="k1", kl_limit=0.3, kl_gradient="k2"
    ),
}

_TESTED = {(params.ratio, params.surrogate) for params in PARAMS.values()}
PARAMS |= {
    name: params
    for name, params in LOSS_FORMS.items()
    if (params.ratio, params.surrogate) not in _TESTED
}


def stops_a_gradient(params: LossParams) -> bool:
    """Whether the gradient is by design not that of the value, so that gradcheck has no say."""
    constant_weight = ("detached", "gamma", "total_variation", "binary_kl")
    kl = params.beta > 0 and (params.kl_gradient == "k2" or params.kl_factor == "detached_ratio")
    return params.surrogate in constant_weight or params.ratio == "seq_mean_token" or kl


def make_inputs(lengths: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    tokens = sum(lengths)
    torch.manual_seed(tokens)

    def normal(count: int, spread: float) -> Tensor:
        return torch.randn(count) * spread

    logprobs = -normal(tokens, 1.0).abs() - 0.1
    weights = (torch.rand(tokens) + 0.5) * (torch.arange(tokens) % 7 != 3)
    inputs = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + normal(tokens, 0.3),
        "advantages": normal(len(lengths), 1.0),
        "ref_logprobs": logprobs + normal(tokens, 0.4),
        "entropy": normal(tokens, 1.0).abs(),
        "policy_weights": weights,
    }
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    layout = {"cu_seqlens": cu_seqlens, "mask": torch.arange(tokens) % 4 != 1}
    return {name: x.to(dtype) for name, x in inputs.items()} | layout


def run_op(**inputs: Any) -> tuple[Tensor, Tensor]:
    """Loss and statistics, the latter rounded as the loss is: they are no more exact than it."""
    loss, metrics = grpo_loss(**inputs)
    return loss, torch.cat([metrics.sums, metrics.extremes]).to(loss.dtype)


def reference(**inputs: Any) -> tuple[Tensor, Tensor]:
    loss, statistics = reference_grpo_loss(**inputs)
    return loss, statistics.to(loss.dtype)


def metrics_of(metrics: LossMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.as_dict().items()}


#: The statistics by name, in the order of the op.
STATISTICS = [*LossMetrics.SUMS, *LossMetrics.EXTREMES]


def scales(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Size of the summands: the loss with every term made positive, and so for each gradient."""
    params = inputs["params"]
    size = {
        k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    positive = dataclasses.replace(params, entropy_coef=-abs(params.entropy_coef), kl="k2")
    losses, policies = 0.0, 0.0
    for sign in (-1, 1):  # a surrogate may treat them differently
        signed = size | {"advantages": sign * size["advantages"].abs(), "params": positive}
        loss, metrics = reference(**signed)
        losses, policies = losses + loss.abs(), policies + metrics[0].abs()
    d = size["ref_logprobs"] - size["logprobs"]
    loss = losses + params.beta * d.abs().sum() + 2 * policies
    metrics = metrics.abs()
    metrics[STATISTICS.index("policy_loss")] = policies
    metrics[STATISTICS.index("kl")] += d.abs().sum() + len(d)
    metrics[STATISTICS.index("kl_old")] += len(d)  # e^d - 1 - d of every token
    metrics[STATISTICS.index("kl_old_max")] += 1
    if inputs["logprobs"].dtype == torch.float64:
        # Gold has no more digits than ours here, and adds in another order.
        loss, metrics = loss * len(d) ** 0.5, metrics * len(d) ** 0.5

    lengths = inputs["cu_seqlens"].diff()
    of_token = torch.arange(len(lengths)).repeat_interleave(lengths)
    advantage = size["advantages"]
    advantage = advantage[of_token] if len(advantage) == len(lengths) else advantage
    active = size["mask"]
    log_ratio = torch.where(active, size["logprobs"] - size["old_logprobs"], 0.0)
    sequences = Sequences(of_token, torch.zeros(len(lengths)).double())
    sequences = Sequences(of_token, sequences.sum(active.double()))
    ratio = level_of(log_ratio, advantage, sequences, params).exp().clamp(min=1)
    slope = (
        torch.where(active, size["policy_weights"], 0.0)
        * advantage.abs()
        * ratio
        * log_ratio.exp().clamp(min=1)
    )
    kl = params.beta * (1 + d.exp())
    slope = slope + kl
    if params.sequence_level:
        weight = size["policy_weights"].abs().amax() if len(d) else 1.0
        slope = slope + weight * advantage.abs() * ratio + kl
        # Every token carries the rounding of a sum over its sequence.
        terms = 1 + log_ratio.abs().mean().nan_to_num() * lengths.max()
        slope = slope * (terms * terms if params.ratio == "seq_sum" else terms)
    # The reference's gradient by the entropy is minus the coefficient times a token's factor.
    entropy = torch.ones_like(ratio).requires_grad_()
    one = dataclasses.replace(params, entropy_coef=-1.0)
    unit, _ = reference(**size | {"entropy": entropy, "params": one})
    (factor,) = torch.autograd.grad(unit, entropy)
    return {"out0": loss, "out1": metrics, "dlogprobs": slope * factor}
