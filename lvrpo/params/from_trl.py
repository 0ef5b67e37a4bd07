"""The options of TRL's GRPOConfig as fields of `LossParams`. TRL itself is not needed."""

from __future__ import annotations

from typing import Any, NoReturn

#: By loss_type: what does not depend on the other options.
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "seq_mean_token_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "seq_mean_token_sum_norm"},
    "dapo": {"aggregation": "token_mean"},
    "luspo": {"aggregation": "seq_mean_token_sum"},
    "cispo": {"aggregation": "token_mean", "surrogate": "detached", "clip_low": float("inf")},
    "sapo": {"aggregation": "seq_mean_token_mean", "surrogate": "sigmoid"},
    "vespo": {"aggregation": "token_mean", "surrogate": "gamma", "ratio": "seq_sum"},
}
RATIOS = {"token": "token", "sequence": "seq_mean"}


def fields_from_trl(config: Any) -> dict[str, Any]:
    """Fields of `LossParams` that make the loss of a GRPOConfig.

    Raises:
        ValueError: an option cannot be honoured.
    """
    loss, level = config.loss_type, config.importance_sampling_level
    if loss not in LOSSES:
        refuse("loss_type", loss, "which is no loss of TRL 1.16", f"one of {', '.join(LOSSES)}")
    if level not in RATIOS:
        refuse("importance_sampling_level", level, "which TRL has not", "'token' or 'sequence'")
    fields = {"ratio": RATIOS[level], **LOSSES[loss], "beta": config.beta}
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if loss == "cispo":
        fields["clip_high"] = high - 1  # TRL's is the largest ratio itself
    elif loss == "sapo":
        fields |= {"gate_pos": config.sapo_temperature_pos, "gate_neg": config.sapo_temperature_neg}
    elif loss == "vespo":
        fields["gamma_pos"] = config.vespo_k_pos, config.vespo_lambda_pos
        fields["gamma_neg"] = config.vespo_k_neg, config.vespo_lambda_neg
    else:
        fields |= {"clip_low": config.epsilon, "clip_high": high, "ratio_cap": config.delta}
    if loss == "dr_grpo":
        fields["max_length"] = config.max_completion_length
    if config.beta and config.use_bias_correction_kl:
        fields["kl_factor"] = _kl_factor(config)
    if config.entropy_coef or config.use_adaptive_entropy:
        fields |= {"entropy_coef": config.entropy_coef, "entropy_aggregation": "token_mean"}
    return fields


def _kl_factor(config: Any) -> str:
    """The ratio that the KL is multiplied by, which TRL takes from importance_sampling_level."""
    corrected = config.use_vllm and config.vllm_importance_sampling_correction
    if config.loss_type == "vespo" and corrected:
        why = "but the loss 'vespo' with beta and vLLM's correction has one ratio only"
        refuse("use_bias_correction_kl", True, why, "False")
    return "sequence_ratio" if config.importance_sampling_level == "sequence" else "ratio"


def refuse(option: str, value: object, why: str, expected: str) -> NoReturn:
    """One line about an option of TRL that cannot be honoured."""
    raise ValueError(f"lvrpo for TRL: {option} is {value!r}, {why}; expected {expected}")
