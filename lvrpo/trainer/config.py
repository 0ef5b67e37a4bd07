"""What a run does: one frozen dataclass per section, read from TOML and from `section.key=value`.

docs/configuration.md explains the keys; a run directory holds the resolved file. An unknown section
or key and a value out of bounds are errors that name the key; lvrpo/trainer/bounds.py has the
bounds.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

from lvrpo.trainer.bounds import BOUNDS, CHOICES, check_value
from lvrpo.trainer.bounds import ConfigError as ConfigError


@dataclass(frozen=True)
class RunSection:
    """How long, how often, and from which random stream."""

    seed: int = 0
    steps: int = 120
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    eval_items: int = 2048
    gallery_items: int = 12
    threads: int = 0  # 0: torch's own choice
    backend: str = ""  # of every op; empty: the first that can run
    shuffle_rewards: bool = False  # the control: rewards are permuted within each group


@dataclass(frozen=True)
class DataSection:
    """Where prompts come from."""

    source: str = "scenes"  # or the path of a JSONL file
    eval_source: str = ""  # JSONL file that a run on a JSONL file is evaluated with
    channels: int = 1  # of a JSONL run's pictures, which are converted and resized
    height: int = 32
    width: int = 32
    rows: int = 2  # cells of a scene
    columns: int = 2
    questions: dict[str, float] = field(
        default_factory=lambda: {"name": 0.45, "count_of": 0.15, "compare": 0.25, "sum": 0.15}
    )
    requests: dict[str, float] = field(default_factory=lambda: {"place": 1.0})


@dataclass(frozen=True)
class ModelSection:
    """Size of the unified model; the fields of `UnifiedConfig` that are not implied by the data."""

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 256
    vision_layers: int = 0
    image_patch: int = 8
    latent_patch: int = 8
    latent_dim: int = 12


@dataclass(frozen=True)
class WarmStartSection:
    """Supervised training before the first reward.

    The labels are noisy on purpose: the model learns to draw and to answer, and honestly imitates
    the noise, which more supervised training cannot remove and a verifier can.
    """

    steps: int = 1000
    lr: float = 2e-3
    understand_batch: int = 224
    generate_batch: int = 48
    noise_draws: int = 4  # per drawing prompt: targets with noise of their own, in label and flow
    label_noise_understand: float = 0.3
    label_noise_generate: float = 0.3
    ema: float = 0.995


@dataclass(frozen=True)
class RolloutSection:
    """Sampling of groups."""

    group_size: int = 8
    understand_prompts: int = 32
    generate_prompts: int = 32
    temperature: float = 1.0
    max_answer_tokens: int = 4
    denoise_steps: int = 10
    shift: float = 3.0
    dynamics: str = "flow_sde"
    noise_level: float = 0.7
    stochastic_steps: int = 5  # the first of them; all of these are trained


@dataclass(frozen=True)
class RewardSection:
    """Which rewards, and how they become advantages."""

    understand: dict[str, float] = field(default_factory=lambda: {"r_ins": 1.0})
    generate: dict[str, float] = field(
        default_factory=lambda: {"r_ins": 1.0, "r_sem": 0.25, "r_kn": 0.25}
    )
    advantage: str = "decoupled"  # or "paper": Eq 3 of the paper, sum then normalise
    strict_weight: float = 0.5  # of r_ins; the rest is the partial score, and 1 the paper's choice
    semantic_pool: str = "softmax"  # of r_sem over patches; "max" is the paper's choice
    truncated: str = "zero"  # an answer cut at max_answer_tokens; or "keep", "mask"
    on_error: str = "raise"  # or "no_signal": what a reward failed at has no score of it
    max_failures: float = 0.5  # share of a step's samples that a reward may fail at
    timeout: float = 0.0  # seconds a reward may take for a step's samples; 0 is no limit


@dataclass(frozen=True)
class LossSection:
    """The objective; text and image terms have their own weight, clip and KL."""

    preset: str = "grpo"
    text_weight: float = 1.0
    image_weight: float = 1.0
    text_clip_low: float = 0.0  # 0: the preset's own
    text_clip_high: float = 0.0
    image_clip: float = 0.2
    text_kl: float = 0.1
    image_kl: float = 0.01
    image_kl_form: str = "velocity_mse"
    image_log_ratio_scale: float = 0.05  # of the true sum; 0 means the element mean
    advantage_clip: float = 5.0


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW for the policy update."""

    lr: float = 2e-4
    final_lr_fraction: float = 0.0
    warmup_steps: int = 5
    grad_clip: float = 1.0
    weight_decay: float = 0.0
    updates_per_rollout: int = 1
    max_rows: int = 16384  # token budget of one packed buffer; more rows take several


@dataclass(frozen=True)
class TrainConfig:
    """All sections of a run."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    warm_start: WarmStartSection = field(default_factory=WarmStartSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    rewards: RewardSection = field(default_factory=RewardSection)
    loss: LossSection = field(default_factory=LossSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)

    def __post_init__(self) -> None:
        for key in (*BOUNDS, *CHOICES):
            section, _, name = key.partition(".")
            check_value(key, getattr(getattr(self, section), name))
        rollout, warm_start = self.rollout, self.warm_start
        if rollout.stochastic_steps > rollout.denoise_steps:
            raise ConfigError(
                f"rollout.stochastic_steps is {rollout.stochastic_steps}, expected 1 to "
                f"denoise_steps = {rollout.denoise_steps}"
            )
        if rollout.dynamics == "cps" and rollout.noise_level > 1:
            raise ConfigError(
                f"rollout.noise_level is {rollout.noise_level}, expected at most 1 where "
                "rollout.dynamics is 'cps'"
            )
        if not rollout.understand_prompts + rollout.generate_prompts:
            raise ConfigError(
                "rollout.understand_prompts and rollout.generate_prompts are 0, expected at least "
                "one prompt a step"
            )
        if warm_start.steps and not warm_start.understand_batch + warm_start.generate_batch:
            raise ConfigError(
                "warm_start.understand_batch and warm_start.generate_batch are 0, expected at "
                "least one example a step, or warm_start.steps = 0"
            )
        for task in ("understand", "generate"):
            weights = getattr(self.rewards, task)
            if getattr(rollout, f"{task}_prompts") and not any(weights.values()):
                raise ConfigError(
                    f"rewards.{task} is {weights}, expected a reward whose weight is not 0, as "
                    f"rollout.{task}_prompts is not 0"
                )


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """Defaults, then the TOML file, then `section.key=value` overrides (values in TOML syntax).

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or of the wrong type.
    """
    return from_table(read_table(path, overrides))


def read_table(path: Path | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The keys that a TOML file and overrides name, unchecked; see `load_config`.

    Files are named relative to the TOML file, in overrides relative to the working directory; they
    are made absolute here.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error
        _make_absolute(table, path.parent)
    named: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"{override!r} is not of the form section.key=value")
        named.setdefault(section, {})[name] = _parse_value(text.strip())
    _make_absolute(named, Path())
    return overlay(table, named)


def overlay(table: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the keys of `named` in place of its own."""
    result = dict(table)
    for section, values in named.items():
        ours = table.get(section, {})
        if isinstance(ours, Mapping):  # what is no section is refused by `from_table`
            result[section] = {**ours, **values} if isinstance(values, Mapping) else values
    return result


def _make_absolute(table: dict[str, Any], folder: Path) -> None:
    def absolute(name: Any) -> Any:
        return os.path.abspath(folder / name) if isinstance(name, str) else name

    data, rewards = table.get("data"), table.get("rewards")
    for key in ("source", "eval_source"):
        if isinstance(data, dict) and data.get(key, "") not in ("", "scenes"):
            data[key] = absolute(data[key])
    for task in ("understand", "generate"):
        if isinstance(rewards, dict) and isinstance(rewards.get(task), dict):
            rewards[task] = {
                absolute(name) if ".py:" in name else name: weight
                for name, weight in rewards[task].items()
            }


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def from_table(table: Mapping[str, Any]) -> TrainConfig:
    """Build the configuration from nested tables; every key must be known."""
    sections = {f.name: f for f in dataclasses.fields(TrainConfig)}
    hints = get_type_hints(TrainConfig)
    built = {}
    for name, values in table.items():
        if name not in sections:
            raise ConfigError(f"unknown section [{name}]; there are {', '.join(sections)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} is {values!r}, expected a section [{name}]")
        built[name] = _section(hints[name], name, values)
    return TrainConfig(**built)


def _section(kind: type, section: str, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"unknown key {section}.{key}; [{section}] has {', '.join(hints)}")
        if not _is(value, hints[key]):
            raise ConfigError(f"{section}.{key} is {value!r}, expected {_in_words(hints[key])}")
    return kind(**{key: _coerce(value, hints[key]) for key, value in values.items()})


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        return isinstance(value, Mapping) and all(_is(item, inner) for item in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    """A type as TOML calls it."""
    if get_origin(hint) is dict:
        return f"a table of names, each with {_in_words(get_args(hint)[1])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]


def _coerce(value: Any, hint: Any) -> Any:
    if get_origin(hint) is dict:
        return {key: _coerce(item, float) for key, item in value.items()}
    if hint is not float:
        return value
    try:
        return float(value)
    except OverflowError:  # an int beyond every float is beyond every bound too
        return math.inf if value > 0 else -math.inf


def to_table(config: TrainConfig) -> dict[str, Any]:
    """Nested tables, the inverse of `from_table`."""
    return dataclasses.asdict(config)


def to_toml(config: TrainConfig) -> str:
    """The resolved configuration as a TOML file."""
    import tomli_w

    return tomli_w.dumps(to_table(config))
