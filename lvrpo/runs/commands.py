"""What `lvrpo train` does with a run directory that it has opened."""

from __future__ import annotations

from typing import Any

import torch

from lvrpo.data.example import SKILLS
from lvrpo.rewards.registry import reward_label
from lvrpo.runs.journal import RunJournal
from lvrpo.runs.opening import OpenRun
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.signals import Signals
from lvrpo.trainer.loop import train


def describe_run(run: OpenRun) -> list[str]:
    """What `run_training` would do, in lines; nothing is created."""
    config, rollout = run.config, run.config.rollout
    total = config.warm_start.steps + config.run.steps
    done = run.step
    lines = [f"{run.directory}: after step {done} of {total}" if done else f"{run.directory}: new"]
    lines += [
        f"  {change['key']}: {change['new']} in place of {change['old']}" for change in run.changes
    ]
    lines += [f"  {note}" for note in run.notes]
    for skill in SKILLS:
        weights = getattr(config.rewards, skill).items()
        rewards = ", ".join(f"{weight:g} {reward_label(name)}" for name, weight in weights)
        prompts = getattr(rollout, f"{skill}_prompts")
        if prompts and config.run.objective == "grpo":
            lines.append(f"  {skill}: {prompts} prompts x {rollout.group_size} samples; {rewards}")
    kind = "policy" if config.run.objective == "grpo" else "supervised"
    steps = f"{config.warm_start.steps} warm-start steps, {config.run.steps} {kind} steps"
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
        for note in run.notes:
            view.message(note)
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
