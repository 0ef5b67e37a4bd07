"""What the commands do with a run directory: open it, train in it, and load what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvrpo.data.example import SKILLS
from lvrpo.models.protocol import Policy
from lvrpo.rewards.registry import reward_label
from lvrpo.runs.changes import fingerprint
from lvrpo.runs.checkpoint import load_newest
from lvrpo.runs.config_file import load_config
from lvrpo.runs.directory import RunDirectoryError, is_run, require_format
from lvrpo.runs.journal import RunJournal
from lvrpo.runs.opening import OpenRun as OpenRun
from lvrpo.runs.opening import open_run as open_run
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.setup import FrozenParts, Setup
from lvrpo.runs.signals import Signals
from lvrpo.trainer.loop import train
from lvrpo.trainer.state import load_weights


def describe_run(run: OpenRun) -> list[str]:
    """What `run_training` would do, in lines; nothing is created."""
    config, rollout = run.config, run.config.rollout
    total = config.warm_start.steps + config.run.steps
    done = run.step
    lines = [f"{run.directory}: after step {done} of {total}" if done else f"{run.directory}: new"]
    lines += [
        f"  {change['key']}: {change['new']} in place of {change['old']}" for change in run.changes
    ]
    for task in SKILLS:
        weights = getattr(config.rewards, task).items()
        rewards = ", ".join(f"{weight:g} {reward_label(name)}" for name, weight in weights)
        prompts = getattr(rollout, f"{task}_prompts")
        if prompts:
            lines.append(f"  {task}: {prompts} prompts x {rollout.group_size} samples; {rewards}")
    steps = f"{config.warm_start.steps} warm-start steps, {config.run.steps} policy updates"
    return [*lines, f"  data: {config.data.source}", f"  {steps}"]


def run_training(run: OpenRun) -> None:
    """Train to the end, with a progress bar.

    Raises:
        Stopped: a signal ended the run.
    """
    config = run.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    warm_start = config.warm_start.steps
    with ProgressView(warm_start, warm_start + config.run.steps) as view:
        for change in run.changes:
            view.message(f"{change['key']}: {change['new']} in place of {change['old']}")
        view.message("preparing data and rewards")
        parts = run.setup.frozen_parts(run.directory)
        for line in run.setup.notes(parts):
            view.message(line)

        def facts() -> dict[str, Any]:
            return {"seed": config.run.seed, **run.facts, **run.setup.data.facts()}

        with (
            Signals() as signals,
            RunJournal(run.directory, config, parts.fingerprint, view, facts) as journal,
        ):
            train(config, run.setup.task(parts), journal, signals)


def load_policy(directory: Path) -> tuple[Setup, FrozenParts, Policy]:
    """The averaged weights of a run's newest checkpoint, ready to sample from.

    Raises:
        RunDirectoryError: not a run, or no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
    """
    if not is_run(directory):
        raise RunDirectoryError(f"{directory} is not a run: it has no config.toml")
    require_format(directory)
    config = load_config(directory / "config.toml")
    setup = Setup(config)
    parts, newest = setup.saved_parts(directory), load_newest(directory / "checkpoints")
    if parts is None or newest is None:
        raise RunDirectoryError(f"{directory} has no checkpoint yet: lvrpo train {directory}")
    newest.require({"fingerprint": fingerprint(config), "task": parts.fingerprint})
    policy = setup.new_policy(parts)
    is_average = "average.n_averaged" in newest.tensors  # the warm start goes on
    load_weights(policy.module, newest.snapshot(), "average.module." if is_average else "model.")
    policy.module.requires_grad_(False)
    return setup, parts, policy
