"""What of a run may change while it goes on, and why the rest may not.

Every change is a line of changes.jsonl; config.toml holds what is in force.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lvrpo.rewards.registry import reward_label
from lvrpo.runs.config_file import Settings, to_table
from lvrpo.runs.files import Row
from lvrpo.trainer.config import ConfigError, TrainConfig
from lvrpo.trainer.schedule import Bridge, learning_rate

#: Keys of the learning rate's schedule.
RATE = {
    "run.steps",
    "optimizer.lr",
    "optimizer.final_lr_fraction",
    "optimizer.warmup_steps",
}
CHANGEABLE = RATE | {
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.eval_every",
    "run.gallery_every",
    "run.tracker",
    "run.eval_items",
    "run.frontier_items",
    "run.threads",
    "run.device",
    "run.shard",
    "eval.temperature",
    "eval.top_k",
    "eval.top_p",
    "eval.min_p",
    "eval.repetition_penalty",
    "eval.guidance",
    "eval.guidance_image",
    "eval.guidance_renorm",
    "eval.guidance_renorm_min",
    "eval.guidance_until",
    "rewards.max_failures",
    "rewards.timeout",
}
#: A file may move: what is in it is compared, by inputs.py and by the model family.
PATHS = {"data.source", "data.eval_source", "data.validation_source", "model.path"}
#: What the end of the warm start depends on.
_OF_THE_WARM_START = ("data", "model", "warm_start")


def fingerprint(config: TrainConfig) -> str:
    """A short hash of every key that may not change, the same wherever the run's files are."""
    table = {key: value for key, value in _flat(config).items() if key not in CHANGEABLE}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


#: The key of a row that says to which step a run went back.
CHECKPOINT = "checkpoint"


def changed_config(run_dir: Path, config: TrainConfig, named: Settings) -> TrainConfig:
    """The configuration of a run that goes on with the keys of the command line.

    Args:
        run_dir: for the message.
        config: of the run so far.
        named: the keys of the command line; only these are compared.

    Raises:
        ConfigError: a key may not change; the message names it, both values and the reason.
    """
    asked = named.over(config)
    ours, theirs = _flat(config), _flat(asked)
    for key, value in ours.items():
        if theirs[key] != value and key not in CHANGEABLE:
            raise ConfigError(
                f"{run_dir} was started with another configuration: {key} is {value!r} there, "
                f"{theirs[key]!r} here, and {_reason(run_dir, key)}"
            )
    return asked


def forked_config(origin: Path, config: TrainConfig, named: Settings) -> TrainConfig:
    """The configuration of a run that begins with the warm start of another.

    Raises:
        ConfigError: a key would need another warm start.
    """
    asked = named.over(config)
    ours, theirs = _flat(config), _flat(asked)
    for key, value in ours.items():
        section = key.partition(".")[0]
        if theirs[key] != value and (section in _OF_THE_WARM_START or key == "run.seed"):
            raise ConfigError(
                f"{key} is {value!r} in {origin}, {theirs[key]!r} here, and the warm start was "
                "made with it: leave --from away to make another warm start"
            )
    return asked


def changes_between(old: TrainConfig, new: TrainConfig, step: int, bridge: Bridge) -> list[Row]:
    """One row of changes.jsonl per key that differs.

    Args:
        old: in force up to `step`.
        new: in force after it.
        step: the last finished step, counted through both phases.
        bridge: of the learning rate so far.
    """
    before, after = to_table(old), to_table(new)
    done = step - old.warm_start.steps
    rows: list[Row] = []
    for section, values in before.items():
        for name, value in values.items():
            if after[section][name] == value:
                continue
            key = f"{section}.{name}"
            row: Row = {"step": step, "key": key, "old": value, "new": after[section][name]}
            if key in RATE and done > 0:
                row["lr"] = learning_rate(old, done - 1, bridge)
            rows.append(row)
    return rows


def rate_bridge(config: TrainConfig, changes: list[Row]) -> Bridge:
    """Where the schedule last changed, in policy steps, and the learning rate before it.

    What happened after a step that the run went back to has not happened.
    """
    rates: list[Row] = []
    for row in changes:
        if row["key"] == CHECKPOINT:
            rates = [rate for rate in rates if rate["step"] <= row["new"]]
        elif "lr" in row:
            rates.append(row)
    return (rates[-1]["step"] - config.warm_start.steps, rates[-1]["lr"]) if rates else None


def _flat(config: TrainConfig) -> dict[str, Any]:
    """`section.key` to value, without the folders of files."""
    flat = {}
    for section, values in to_table(config).items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if key in PATHS and value not in ("", "scenes"):
                value = "a file"
            elif key == "rollout.curriculum":
                value = reward_label(value)
            elif isinstance(value, dict):
                value = {reward_label(item): weight for item, weight in value.items()}
            flat[key] = value
    return flat


def _reason(run_dir: Path, key: str) -> str:
    section = key.partition(".")[0]
    if section in _OF_THE_WARM_START or key == "run.seed":
        return "its warm start was made with it; give a new directory"
    return (
        "its steps so far were made with it; `lvrpo train NEW --from "
        f"{run_dir} --set {key}=...` begins again after the warm start"
    )
