"""What an update minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lvrpo.params.flow import FlowLossParams
from lvrpo.params.policy_loss import LOSS_PRESETS, LossParams
from lvrpo.trainer.config import TrainConfig

#: Clip range of the text ratio with the preset "grpo". Its published 0.2 is for many updates of one
#: rollout; the two of a step here hardly reach it, see docs/configuration.md.
GRPO_CLIP = 0.05


@dataclass(frozen=True)
class Objective:
    """The two losses and how they are weighed."""

    text: LossParams
    image: FlowLossParams
    text_weight: float
    image_weight: float
    temperature: float
    max_rows: int
    share_prompts: bool = True  # False: every completion has its own copy, for comparison

    @classmethod
    def from_config(cls, config: TrainConfig) -> Objective:
        """The objective that a configuration describes."""
        loss = config.loss
        changes: dict[str, Any] = {"beta": loss.text_kl}
        default = GRPO_CLIP if loss.preset == "grpo" else 0.0
        for side in ("clip_low", "clip_high"):
            if clip := getattr(loss, f"text_{side}") or default:
                changes[side] = clip
        if LOSS_PRESETS[loss.preset].get("aggregation") == "seq_mean_token_sum_norm":
            changes["max_length"] = config.rollout.max_answer_tokens
        text = LossParams.preset(loss.preset, **changes)
        image = FlowLossParams(
            variant=loss.image_variant,
            clip_low=loss.image_clip,
            clip_high=loss.image_clip,
            adv_clip=None,  # advantages come bounded
            log_ratio_scale=loss.image_log_ratio_scale or "mean",
            kl=loss.image_kl_form,
            beta=loss.image_kl,
        )
        return cls(
            text,
            image,
            loss.text_weight,
            loss.image_weight,
            config.rollout.temperature,
            config.optimizer.max_rows,
        )
