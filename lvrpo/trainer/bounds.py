"""Which values a key of the configuration may have: one table for numbers, one for words.

A bound is where a value stops being meant: beyond it a run would diverge, sample nothing, or not
fit any machine that lvrpo trains on. Sizes that fit the bounds and not the machine are refused in
preflight.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from lvrpo.models.flow import DYNAMICS
from lvrpo.params.flow import KL_FORMS
from lvrpo.params.policy_loss import LOSS_PRESETS
from lvrpo.rewards.combine import Truncated


class ConfigError(ValueError):
    """A configuration that cannot be run; one line naming the key."""


_COUNT, _BATCH, _SIZE, _WEIGHT = "[0, 1e12]", "[0, 65536]", "[1, 65536]", "[0, 1e6]"

#: Intervals as they are written in mathematics; every weight of a table has to lie in its interval.
BOUNDS = {
    "run.seed": "[-9223372036854775808, 9223372036854775807]",
    "run.steps": _COUNT,
    "run.checkpoint_every": "[1, 1e12]",
    "run.keep_checkpoints": "[1, 1e12]",
    "run.eval_items": _COUNT,
    "run.gallery_items": _COUNT,
    "run.threads": "[0, 1024]",
    "data.channels": "[1, 3]",
    "data.height": "[1, 4096]",
    "data.width": "[1, 4096]",
    "data.rows": "[1, 9]",
    "data.columns": "[1, 9]",
    "data.questions": _WEIGHT,
    "data.requests": _WEIGHT,
    "model.hidden": _SIZE,
    "model.layers": "[1, 1024]",
    "model.heads": _SIZE,
    "model.kv_heads": _SIZE,
    "model.head_dim": "[2, 4096]",
    "model.mlp": _SIZE,
    "model.vision_layers": "[0, 1024]",
    "model.image_patch": "[1, 4096]",
    "model.latent_patch": "[1, 4096]",
    "model.latent_dim": _SIZE,
    "warm_start.steps": _COUNT,
    "warm_start.lr": "[0, 1e20]",
    "warm_start.understand_batch": _BATCH,
    "warm_start.generate_batch": _BATCH,
    "warm_start.noise_draws": "[1, 65536]",
    "warm_start.label_noise_understand": "[0, 1]",
    "warm_start.label_noise_generate": "[0, 1]",
    "warm_start.ema": "[0, 1)",
    "rollout.group_size": "[2, 65536]",
    "rollout.understand_prompts": _BATCH,
    "rollout.generate_prompts": _BATCH,
    "rollout.temperature": "[1e-4, 1e4]",
    "rollout.max_answer_tokens": _SIZE,
    "rollout.denoise_steps": "[1, 4096]",
    "rollout.shift": "[1e-3, 1e3]",
    "rollout.noise_level": "[0, 100]",
    "rollout.stochastic_steps": "[1, 4096]",
    "rewards.understand": "[-1e6, 1e6]",
    "rewards.generate": "[-1e6, 1e6]",
    "rewards.strict_weight": "[0, 1]",
    "rewards.max_failures": "[0, 1]",
    "rewards.timeout": "[0, 1e6]",
    "loss.text_weight": _WEIGHT,
    "loss.image_weight": _WEIGHT,
    "loss.text_clip_low": _WEIGHT,
    "loss.text_clip_high": _WEIGHT,
    "loss.image_clip": "[0, 1]",
    "loss.text_kl": _WEIGHT,
    "loss.image_kl": _WEIGHT,
    "loss.image_log_ratio_scale": _WEIGHT,
    "loss.advantage_clip": "(0, 1e6]",
    "optimizer.lr": "[0, 1e20]",
    "optimizer.final_lr_fraction": "[0, 1]",
    "optimizer.warmup_steps": _COUNT,
    "optimizer.grad_clip": "[0, 1e20]",
    "optimizer.weight_decay": "[0, 1e3]",
    "optimizer.updates_per_rollout": "[1, 1e6]",
    "optimizer.max_rows": "[1, 1e12]",
}

#: The trainer has no device but the CPU.
CHOICES: dict[str, tuple[str, ...]] = {
    "run.backend": ("cpp", "torch", ""),
    "rollout.dynamics": DYNAMICS,
    "rewards.advantage": ("decoupled", "paper"),
    "rewards.semantic_pool": ("softmax", "max", "topk"),
    "rewards.truncated": get_args(Truncated),
    "rewards.on_error": ("raise", "no_signal"),
    "loss.preset": tuple(LOSS_PRESETS),
    "loss.image_kl_form": KL_FORMS,
}

_INTERVAL = re.compile(r"([\[(])([^,]+), ([^\])]+)([\])])")


def check_value(key: str, value: Any) -> None:
    """See that `section.key` may have a value.

    Raises:
        ConfigError: it may not; the message names the key and what it may be.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not _inside(BOUNDS[key], item):
                raise ConfigError(f"{key}.{name} is {item}, expected a number in {BOUNDS[key]}")
    elif key in CHOICES and value not in CHOICES[key]:
        choices = ", ".join(choice or '""' for choice in CHOICES[key])
        raise ConfigError(f"{key} is {value!r}, expected one of {choices}")
    elif key in BOUNDS and not _inside(BOUNDS[key], value):
        raise ConfigError(f"{key} is {value}, expected a number in {BOUNDS[key]}")


def _inside(interval: str, value: float) -> bool:
    match = _INTERVAL.fullmatch(interval)
    assert match is not None
    opening, low, high, closing = match.groups()
    above = value > float(low) if opening == "(" else value >= float(low)
    below = value < float(high) if closing == ")" else value <= float(high)
    return above and below and not math.isnan(value)
