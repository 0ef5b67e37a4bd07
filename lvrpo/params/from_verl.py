"""The options of verl's ActorConfig as fields of `LossParams`. verl itself is not needed."""

from __future__ import annotations

import math
from typing import Any, NoReturn

#: Before the name of a loss of verl: the same loss by lvrpo (`lvrpo.integrations.verl`).
PREFIX = "lvrpo_"
AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
}
#: By kl_loss_type: the estimator and its limits.
KLS: dict[str, dict[str, Any]] = {
    "k1": {"kl": "k1"},
    "abs": {"kl": "abs"},
    "k2": {"kl": "k2"},
    "k3": {"kl": "k3", "kl_log_ratio_limit": 20.0, "kl_limit": 10.0},
}
KLS |= {"kl": KLS["k1"], "mse": KLS["k2"], "low_var_kl": KLS["k3"]}
UNBOUNDED = {"clip_low": math.inf, "clip_high": math.inf}
#: By loss_mode: what does not depend on the other options.
LOSSES: dict[str, dict[str, Any]] = {
    "vanilla": {"surrogate": "clip"},
    "dppo_tv": {"surrogate": "total_variation"},
    "dppo_kl": {"surrogate": "binary_kl"},
    # verl bounds the log of its ratio at 10.
    "gspo": {"ratio": "seq_mean_token", "log_ratio_limit": 10.0},
    "sapo": {"surrogate": "sigmoid"},
    "gpg": {"ratio": "none"},
    "clip_cov": {"surrogate": "clip"},
    "kl_cov": {"kl": "abs", **UNBOUNDED},
    "geo_mean": {"ratio": "seq_mean", "surrogate": "log_clip"},
    "dro": {"ratio": "none", "kl": "k2"},
    "cispo": {"surrogate": "detached"},
}
#: Losses that verl aggregates in a way of their own, whatever loss_agg_mode is.
OWN_AGGREGATION = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}
#: Losses with a divergence from the old policy in them, and the option that is its coefficient.
OWN_KL = {"dro": "dro_beta", "kl_cov": "ppo_kl_coef"}


def loss_of(config: Any) -> str:
    """The name that verl has for the loss of an ActorConfig; "lvrpo" stands for "vanilla".

    Raises:
        ValueError: verl has no such loss, or it is one that cannot be honoured.
    """
    name = config.policy_loss.loss_mode
    loss = "vanilla" if name == PREFIX[:-1] else name.removeprefix(PREFIX)
    if loss == "bypass_mode":
        refuse(
            "policy_loss.loss_mode",
            name,
            "which changes the mask and the weights of each micro-batch",
            "sampler_weights and the loss 'vanilla' or 'gpg'",
        )
    if loss not in LOSSES:
        refuse("policy_loss.loss_mode", name, "no loss of verl 0.9", f"one of {', '.join(LOSSES)}")
    return loss


def policy_fields(
    config: Any, loss: str, aggregation: str, response_length: int | None
) -> dict[str, Any]:
    """Fields of `LossParams` for one of verl's policy losses alone, without KL and entropy bonus.

    Raises:
        ValueError: an option cannot be honoured.
    """
    fields = dict(LOSSES[loss])
    if loss == "sapo":
        fields |= {"gate_pos": config.tau_pos, "gate_neg": config.tau_neg}
    elif loss in OWN_KL:
        option = OWN_KL[loss]
        fields["beta"] = getattr(config.policy_loss, option)
        if fields["beta"] is None or not fields["beta"] > 0:
            refuse(f"policy_loss.{option}", fields["beta"], f"the coefficient of {loss}", "> 0")
    elif loss != "gpg":
        low, high = config.clip_ratio_low, config.clip_ratio_high
        fields["clip_low"] = config.clip_ratio if low is None else low
        fields["clip_high"] = config.clip_ratio if high is None else high
    if loss in ("vanilla", "dppo_tv", "dppo_kl"):
        fields["ratio_cap"] = config.clip_ratio_c
    if loss == "vanilla" and config.clip_ratio_c < 1 + fields["clip_high"]:
        expected = f"at least 1 + clip_ratio_high = {1 + fields['clip_high']}"
        refuse("clip_ratio_c", config.clip_ratio_c, "inside the clip", expected)
    mode = OWN_AGGREGATION.get(loss, aggregation)
    return fields | _aggregation(config, loss, mode, response_length)


def fields_from_verl(config: Any, response_length: int | None) -> dict[str, Any]:
    """Fields of `LossParams` that make the loss of an ActorConfig, KL and entropy bonus included.

    Raises:
        ValueError: an option cannot be honoured.
    """
    loss = loss_of(config)
    fields = policy_fields(config, loss, config.loss_agg_mode, response_length)
    own = OWN_AGGREGATION.get(loss)
    for option in ("use_kl_loss", "entropy_coeff"):
        if own is not None and getattr(config, option) and own != config.loss_agg_mode:
            why = f"but {loss!r} has an aggregation of its own, and verl gives this one another"
            refuse(option, getattr(config, option), why, f"loss_agg_mode {own!r}")
    if config.use_kl_loss:
        if loss in OWN_KL:
            why = f"but {loss!r} has a divergence of its own"
            refuse("use_kl_loss", True, why, "False, or the registered loss, where verl adds it")
        kind = config.kl_loss_type
        base = kind.removesuffix("+")
        if base not in KLS:
            refuse("kl_loss_type", kind, "no estimator of verl's", f"one of {', '.join(KLS)}")
        fields |= {"beta": config.kl_loss_coef, **KLS[base]}
        if kind != base:
            fields["kl_gradient"] = "k2"
    return fields | {"entropy_coef": config.entropy_coeff}


def _aggregation(config: Any, loss: str, mode: str, response_length: int | None) -> dict[str, Any]:
    if mode not in AGGREGATIONS:
        refuse("loss_agg_mode", mode, "none of verl's", f"one of {', '.join(AGGREGATIONS)}")
    fields = {"aggregation": AGGREGATIONS[mode], "count_empty": loss == "geo_mean"}
    if mode == "seq-mean-token-sum-norm":
        factor = config.loss_scale_factor
        if factor is None and response_length is None:
            refuse(
                "loss_scale_factor",
                None,
                "which is the padded length of the responses",
                "a number, or response_length",
            )
        fields["max_length"] = response_length if factor is None else factor
    return fields


def refuse(option: str, value: object, why: str, expected: str) -> NoReturn:
    """One line about an option of verl that cannot be honoured."""
    raise ValueError(f"lvrpo for verl: {option} is {value!r}, {why}; expected {expected}")
