"""What `lvrpo train` does with a run directory that it has opened."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from lvrpo.data.example import SKILLS
from lvrpo.rewards.registry import reward_label
from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.journal import FollowedRun, RunJournal
from lvrpo.runs.opening import OpenRun
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.setup import FrozenParts, Setup
from lvrpo.runs.signals import SharedSignals, Signals
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.loop import train
from lvrpo.trainer.ranks import ALONE, Ranks


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
    lines += [f"  data: {config.data.source}", f"  {steps}"]
    return lines + [f"  {note}" for note in run.setup.notes(run.setup.unfitted_parts())]


@contextlib.contextmanager
def opened_by_first(opening: AbstractContextManager[OpenRun], ranks: Ranks) -> Iterator[OpenRun]:
    """A run that the first rank opens for all.

    Args:
        opening: is entered by the first rank alone.
        ranks: of the run, all of which see its directory.

    Raises:
        Exception: on every rank, why it could not be opened.
    """
    with contextlib.ExitStack() as stack:
        own = ranks.together(lambda: stack.enter_context(opening) if ranks.is_first else None)
        told = ranks.gather(None if own is None else (own.directory, own.config, own.step))[0]
        assert told is not None
        directory, config, step = told
        setup = ranks.together(lambda: own.setup if own is not None else Setup(config))
        yield own or OpenRun(directory, config, setup, step, {}, [])


def run_training(run: OpenRun, ranks: Ranks = ALONE) -> None:
    """Train to the end, the first rank with a progress bar.

    Args:
        run: that the first rank holds.
        ranks: that share it.

    Raises:
        Stopped: a signal ended the run.
    """
    config = run.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(_view(config)) if ranks.is_first else None
        if view is not None:
            for change in run.changes:
                view.message(f"{change['key']}: {change['new']} in place of {change['old']}")
            for note in run.notes:
                view.message(note)
            view.message("preparing data and rewards")
        parts = _parts(run, ranks)
        if view is not None:
            for line in run.setup.notes(parts):
                view.message(line)
        signals = stack.enter_context(Signals() if ranks.size == 1 else SharedSignals())
        if isinstance(signals, SharedSignals):
            ranks = dataclasses.replace(
                ranks, heard=signals.heard, interruptible=signals.interruptible
            )

        def facts() -> dict[str, Any]:
            about = {"seed": config.run.seed, "processes": ranks.size}
            return {**about, **run.facts, **run.setup.data.facts()}

        def journal() -> FollowedRun:
            about = run.directory, config, parts.fingerprint
            if view is None:
                return FollowedRun(*about)
            return stack.enter_context(RunJournal(*about, view, facts))

        train(config, run.setup.task(parts), ranks.together(journal), signals, ranks)


def _view(config: TrainConfig) -> ProgressView:
    warm_start = config.warm_start.steps
    return ProgressView(warm_start, warm_start + config.run.steps)


def _parts(run: OpenRun, ranks: Ranks) -> FrozenParts:
    """Those that the first rank makes, or has made before."""
    setup, directory = run.setup, run.directory
    own = ranks.together(lambda: setup.frozen_parts(directory) if ranks.is_first else None)
    found = ranks.together(lambda: own or setup.saved_parts(directory))
    if found is None:
        raise RunDirectoryError(
            f"{directory} has no task/ on the node of rank {ranks.rank}, expected a directory that "
            "all nodes share"
        )
    return found
