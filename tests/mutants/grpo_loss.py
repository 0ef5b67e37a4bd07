"""Deliberately broken versions of grpo_loss; the tolerance rule must reject every one.

Each takes the inputs of the reference by keyword and returns (loss, metrics).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from loss_inputs import STATISTICS, reference
from torch import Tensor

from lvrpo.token_selection import TokenSelection

Mutant = Callable[..., tuple[Tensor, Tensor]]


def with_params(**changes: Any) -> Mutant:
    def mutant(params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        return reference(**inputs, params=dataclasses.replace(params, **changes))

    return mutant


def with_inputs(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutant:
    def mutant(**inputs: Any) -> tuple[Tensor, Tensor]:
        return reference(**inputs | change(inputs))

    return mutant


def with_gradient(name: str, change: Callable[[Tensor], Tensor]) -> Mutant:
    def mutant(**inputs: Any) -> tuple[Tensor, Tensor]:
        if inputs[name].requires_grad:
            inputs[name] = inputs[name] * 1.0
            inputs[name].register_hook(change)
        return reference(**inputs)

    return mutant


def with_statistic(name: str, change: Callable[[dict[str, Tensor]], Tensor]) -> Mutant:
    def mutant(**inputs: Any) -> tuple[Tensor, Tensor]:
        loss, found = reference(**inputs)
        by_name = dict(zip(STATISTICS, found, strict=True))
        return loss, torch.stack([*(by_name | {name: change(by_name)}).values()])

    return mutant


def swapped_clip(params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    sides = {"clip_low": params.clip_high, "clip_high": params.clip_low, "ratio_cap": None}
    return reference(**inputs, params=dataclasses.replace(params, **sides))


def kl_of_the_wrong_sign(params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    loss, metrics = reference(**inputs, params=params)
    without, _ = reference(**inputs, params=dataclasses.replace(params, beta=0.0))
    return 2 * without - loss, metrics


def entropy_of_the_wrong_sign(params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    flipped = dataclasses.replace(params, entropy_coef=-params.entropy_coef)
    return reference(**inputs, params=flipped)


def reversed_kl(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"ref_logprobs": 2 * inputs["logprobs"] - inputs["ref_logprobs"]}


def sum_for_mean_ratio(inputs: dict[str, Any]) -> dict[str, Any]:
    lengths = inputs["cu_seqlens"].diff()
    length = lengths.repeat_interleave(lengths).to(inputs["logprobs"])
    logprobs, old = inputs["logprobs"], inputs["old_logprobs"]
    return {"old_logprobs": logprobs - length * (logprobs - old)}


def shifted(name: str) -> Mutant:
    return with_inputs(lambda inputs: {name: inputs[name].roll(1)})


def without_first_token(g: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(g[:1]), g[1:]])


MUTANTS: dict[str, Mutant] = {
    "clip sides swapped": swapped_clip,
    "no lower clip": with_params(clip_low=torch.inf),
    "no upper clip": with_params(clip_high=torch.inf, ratio_cap=None),
    "no ratio cap": with_params(ratio_cap=None),
    "ratio without gradient": with_inputs(
        lambda inputs: {
            "logprobs": inputs["logprobs"].detach(),
            "old_logprobs": inputs["old_logprobs"],
        }
    ),
    "ratio always one": with_inputs(lambda inputs: {"old_logprobs": None}),
    "sequence ratio": with_params(ratio="seq_mean"),
    "KL of the wrong sign": kl_of_the_wrong_sign,
    "KL in the other direction": with_inputs(reversed_kl),
    "another KL estimator": with_params(kl="k2"),
    "KL times ratio": with_params(kl_factor="ratio"),
    "no KL": with_params(beta=0.0),
    "entropy of the wrong sign": entropy_of_the_wrong_sign,
    "no entropy": with_params(entropy_coef=0.0),
    "advantage of the neighbour": shifted("advantages"),
    "old log-probs shifted by one": shifted("old_logprobs"),
    "reference log-probs shifted by one": shifted("ref_logprobs"),
    "mask shifted by one": shifted("mask"),
    "policy weights shifted by one": shifted("policy_weights"),
    "mask ignored": with_inputs(lambda inputs: {"mask": None}),
    "policy weights ignored": with_inputs(lambda inputs: {"policy_weights": None}),
    "policy weights as a mask": with_inputs(
        lambda inputs: {"policy_weights": (inputs["policy_weights"] != 0).double()}
    ),
    "a policy weight of 0 leaves the denominator": with_inputs(
        lambda inputs: {"mask": inputs["mask"] & (inputs["policy_weights"] != 0)}
    ),
    "mean over tokens": with_params(aggregation="token_mean"),
    "sum over tokens": with_params(aggregation="seq_mean_token_sum"),
    "sequences off by one": with_inputs(
        lambda inputs: {
            "cu_seqlens": torch.cat(
                [
                    inputs["cu_seqlens"][:1],
                    inputs["cu_seqlens"][1:-1] + 1,
                    inputs["cu_seqlens"][-1:],
                ]
            )
        }
    ),
    "gradient all zeros": with_gradient("logprobs", torch.zeros_like),
    "gradient sign flipped": with_gradient("logprobs", torch.neg),
    "gradient scaled by 2 %": with_gradient("logprobs", lambda g: g * 1.02),
    "gradient misses the first token": with_gradient("logprobs", without_first_token),
    "entropy gradient all zeros": with_gradient("entropy", torch.zeros_like),
    "entropy gradient sign flipped": with_gradient("entropy", torch.neg),
    "clip counts swapped": with_statistic("clip_fraction_low", lambda m: m["clip_fraction_high"]),
    "KL metric with beta": with_statistic("kl", lambda m: m["kl"] * 0.04),
    "squares of ratios not squared": with_statistic("_ratio_squared", lambda m: m["_ratio"]),
    "extremes swapped": with_statistic("ratio_min", lambda m: -m["ratio_max"]),
    "tokens counted as ratios of sequences": with_statistic(
        "_ratios", lambda m: m["active_sequences"]
    ),
    "KL of the other policy": with_statistic("kl_old", lambda m: m["kl"]),
}


def kl_gradient_without_ratio(params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The right value, whose gradient is that of the estimator alone."""
    loss, metrics = reference(**inputs, params=params)
    plain, _ = reference(**inputs, params=dataclasses.replace(params, kl_factor="none"))
    return (loss.detach() - plain.detach()) + plain, metrics


def gates_swapped(params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    gates = {"gate_pos": params.gate_neg, "gate_neg": params.gate_pos}
    return reference(**inputs, params=dataclasses.replace(params, **gates))


def gammas_swapped(params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    gammas = {"gamma_pos": params.gamma_neg, "gamma_neg": params.gamma_pos}
    return reference(**inputs, params=dataclasses.replace(params, **gammas))


#: By the name of the parameters: what only this variant can get wrong.
VARIANT_MUTANTS: dict[str, dict[str, Mutant]] = {
    "gspo, all terms": {
        "ratios counted per token": with_statistic("_ratios", lambda m: m["active_tokens"]),
        "a policy weight of 0 leaves the ratio": with_inputs(
            lambda inputs: {"mask": inputs["mask"] & (inputs["policy_weights"] != 0)}
        ),
        "sum instead of mean of the log-ratio": with_inputs(sum_for_mean_ratio),
        "token ratio": with_params(ratio="token"),
        "gradient through the own token": with_params(ratio="seq_mean_token"),
        "advantage of the neighbour": shifted("advantages"),
        "gradient scaled by 2 %": with_gradient("logprobs", lambda g: g * 1.02),
    },
    "gspo_token, all terms": {
        "gradient of the mean": with_params(ratio="seq_mean"),
        "token ratio": with_params(ratio="token"),
        "gradient of the KL estimator": with_params(kl_gradient="own"),
        "no ratio cap": with_params(ratio_cap=None),
    },
    "cispo, both bounds": {
        "ratio differentiated": with_params(surrogate="clip"),
        "no lower bound": with_params(clip_low=torch.inf),
        "no upper bound": with_params(clip_high=torch.inf),
        "KL without ratio": with_params(kl_factor="none"),
        "ratio of the KL differentiated": with_params(kl_factor="ratio"),
    },
    "cispo of a sequence, below 1": {
        "ratio differentiated": with_params(surrogate="clip", clip_high=0.0),
        "ratio of the token": with_params(ratio="token"),
        "a weight of at most 1": with_params(clip_high=0.0),
        "no upper bound": with_params(clip_high=torch.inf),
        "ratios counted per token": with_statistic("_ratios", lambda m: m["active_tokens"]),
    },
    "gspo, KL times its ratio": {
        "KL without ratio": with_params(kl_factor="none"),
        "ratio of the token": with_params(kl_factor="ratio"),
        "sum instead of mean of the log-ratio": with_inputs(sum_for_mean_ratio),
        "gradient of the KL without ratio": kl_gradient_without_ratio,
        "KL metric without factor": with_statistic("kl", lambda m: m["kl"] * 0.98),
        "no KL": with_params(beta=0.0),
    },
    "ratio of the sequence in the KL alone": {
        "KL without ratio": with_params(kl_factor="none"),
        "ratio of the token": with_params(kl_factor="ratio"),
        "gradient of the KL without ratio": kl_gradient_without_ratio,
        "ratio of the sequence everywhere": with_params(ratio="seq_mean"),
        "a policy weight of 0 leaves the ratio": with_inputs(
            lambda inputs: {"mask": inputs["mask"] & (inputs["policy_weights"] != 0)}
        ),
    },
    "sapo": {
        "hard clip": with_params(surrogate="clip"),
        "gates swapped": gates_swapped,
        "one gate": with_params(gate_neg=1.0),
    },
    "sapo of a sequence": {
        "ratio of the token": with_params(ratio="token"),
        "hard clip": with_params(surrogate="clip"),
        "gates swapped": gates_swapped,
        "sum instead of mean of the log-ratio": with_inputs(sum_for_mean_ratio),
        "gradient of the mean's first token alone": with_gradient("logprobs", without_first_token),
    },
    "cap below the clip": {
        "no cap": with_params(ratio_cap=None),
        "cap for negative advantages": with_params(clip_high=0.1, ratio_cap=None),
        "the lesser bound for all": with_params(clip_high=0.1, ratio_cap=1.1),
    },
    "vespo, clamped KL": {
        "gammas swapped": gammas_swapped,
        "another shape": with_params(gamma_pos=(2.0, 2.0)),
        "ratio of neighbours": shifted("old_logprobs"),
        "clip in place of the shape": with_params(surrogate="clip"),
        "log-ratio of the KL not clamped": with_params(kl_log_ratio_limit=None),
        "KL not clamped": with_params(kl_limit=None),
        "KL metric without factor": with_statistic("kl", lambda m: m["kl"] * 0.98),
    },
    "luspo": {"mean over the tokens": with_params(aggregation="seq_mean_token_mean")},
    "gmpo": {
        "clip after the mean": with_params(surrogate="clip"),
        "no lower bound": with_params(clip_low=torch.inf),
        "no upper bound": with_params(clip_high=torch.inf),
    },
    "rloo": {
        "mean instead of sum of the log-ratio": with_params(ratio="seq_mean"),
        "empty sequences counted": with_params(count_empty=True),
        "no ratio cap": with_params(ratio_cap=None),
    },
    "dppo_tv": {
        "no trust region": with_params(clip_low=torch.inf, clip_high=torch.inf),
        "one threshold": with_params(clip_low=0.15),
        "weight not capped": with_params(ratio_cap=None),
        "another divergence": with_params(surrogate="binary_kl"),
        "ratio clipped instead": with_params(surrogate="clip", ratio_cap=None),
    },
    "dppo_kl": {
        "one threshold": with_params(clip_high=0.01),
        "another divergence": with_params(surrogate="total_variation"),
    },
    "token sum": {
        "mean": with_params(aggregation="token_mean"),
        "gradient of the KL estimator": with_params(kl_gradient="own"),
        "KL not clamped": with_params(kl_limit=None),
    },
}


def with_selection(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutant:
    """Fields of the selection changed."""

    def mutant(selection: TokenSelection, **inputs: Any) -> tuple[Tensor, Tensor]:
        changes = change(inputs | vars(selection))
        return reference(**inputs, selection=dataclasses.replace(selection, **changes))

    return mutant


def keeping(rule: Callable[[dict[str, Any]], Tensor], **changes: Any) -> Mutant:
    """Another rule [T] in the place of fields of the selection."""

    def mutant(selection: TokenSelection, **inputs: Any) -> tuple[Tensor, Tensor]:
        kept = rule(inputs | vars(selection))
        inputs["policy_weights"] = inputs["policy_weights"] * kept
        return reference(**inputs, selection=dataclasses.replace(selection, **changes))

    return mutant


def dropped_from_the_mask(selection: TokenSelection, **inputs: Any) -> tuple[Tensor, Tensor]:
    high = inputs["entropy"] >= threshold_of(vars(selection) | inputs)
    inputs["mask"] = inputs["mask"] & high
    return reference(**inputs, selection=dataclasses.replace(selection, top_entropy=None))


def bonus_of_all(selection: TokenSelection, params: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    no_bonus = dataclasses.replace(params, entropy_coef=0.0)
    loss, statistics = reference(**inputs, selection=selection, params=no_bonus)
    return loss - params.entropy_coef * inputs["entropy"][inputs["mask"]].mean(), statistics


def threshold_of(x: dict[str, Any], over: str = "mask") -> Tensor:
    values = x["entropy"].detach() if over == "all" else x["entropy"].detach()[x["mask"]]
    return values.quantile(1 - x["top_entropy"])


def of_sequences(x: dict[str, Any], values: Tensor, how: str = "mean") -> Tensor:
    """[T] the sum, or mean, over the active tokens of each sequence."""
    lengths = x["cu_seqlens"].diff()
    parts = zip(*(y.split(lengths.tolist()) for y in (values, x["mask"])), strict=True)
    sums = [part[on].sum() / (max(int(on.sum()), 1) if how == "mean" else 1) for part, on in parts]
    return torch.stack(sums).repeat_interleave(lengths)


def drift(x: dict[str, Any]) -> Tensor:
    return (x["sampler_logprobs"] - x["logprobs"].detach()).nan_to_num()


def is_negative(x: dict[str, Any]) -> Tensor:
    return (x["advantages"] < 0).repeat_interleave(x["cu_seqlens"].diff())


def unreported_as_the_others(x: dict[str, Any]) -> dict[str, Any]:
    reported = ~x["sampler_logprobs"].isnan()
    share = of_sequences(x, reported.double()).clamp(min=1e-9)
    others = x["logprobs"].detach() + of_sequences(x, drift(x)) / share
    return {"sampler_logprobs": torch.where(reported, x["sampler_logprobs"], others)}


NO_SAMPLER: dict[str, Any] = {"off_policy_threshold": None, "sampler_logprobs": None}
#: Of what keeps and drops policy terms: with a selection by entropy and by the sampler, and a bonus
#: with its own mean.
SELECTION_MUTANTS: dict[str, Mutant] = {
    "entropy ignored": with_selection(lambda x: {"top_entropy": None}),
    "sampler ignored": with_selection(lambda x: NO_SAMPLER),
    "the fraction as a quantile": with_selection(lambda x: {"top_entropy": 1 - x["top_entropy"]}),
    "masked tokens in the quantile": with_selection(
        lambda x: {"top_entropy": None, "entropy_threshold": threshold_of(x, "all")}
    ),
    "the threshold exclusive": with_selection(
        lambda x: {"top_entropy": None, "entropy_threshold": threshold_of(x) + 1e-9}
    ),
    "the least entropies": keeping(lambda x: x["entropy"] <= threshold_of(x), top_entropy=None),
    "a dropped token leaves the denominator": dropped_from_the_mask,
    "whatever the advantage": keeping(
        lambda x: of_sequences(x, drift(x)) <= x["off_policy_threshold"], **NO_SAMPLER
    ),
    "sum for mean": keeping(
        lambda x: (
            ~(is_negative(x) & (of_sequences(x, drift(x), "sum") > x["off_policy_threshold"]))
        ),
        **NO_SAMPLER,
    ),
    "token by token": keeping(
        lambda x: ~(is_negative(x) & (drift(x) > x["off_policy_threshold"])), **NO_SAMPLER
    ),
    "the other direction": with_selection(
        lambda x: {"sampler_logprobs": 2 * x["logprobs"].detach() - x["sampler_logprobs"]}
    ),
    "unreported tokens leave the mean": with_selection(unreported_as_the_others),
    "the old policy for the sampler": with_selection(
        lambda x: {"sampler_logprobs": x["old_logprobs"]}
    ),
    "bonus of all active tokens": bonus_of_all,
    "bonus of the loss": with_params(entropy_aggregation=None),
    "no bonus": with_params(entropy_coef=0.0),
}
