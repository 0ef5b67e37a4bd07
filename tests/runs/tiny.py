"""The smallest run that goes through every stage, in seconds, and the command that starts it."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner

from lvrpo.cli import app
from lvrpo.runs.config_file import load_config
from lvrpo.runs.journal import RunJournal
from lvrpo.runs.opening import open_run
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.signals import Signals
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.loop import train

OVERRIDES = [
    "run.steps=3",
    "run.checkpoint_every=2",
    "run.eval_items=8",
    "run.frontier_items=2",
    "model.hidden=16",
    "model.layers=1",
    "model.heads=2",
    "model.mlp=16",
    "warm_start.steps=3",
    "warm_start.understand_batch=4",
    "warm_start.generate_batch=4",
    "rollout.group_size=3",
    "rollout.understand_prompts=2",
    "rollout.generate_prompts=2",
    "rollout.denoise_steps=4",
    "rollout.stochastic_steps=2",
    "optimizer.minibatches=1",
    "rewards.generate={ r_ins = 1.0 }",
]


def tiny_config(*overrides: str) -> TrainConfig:
    return load_config(overrides=[*OVERRIDES, *overrides])


class Stop(Exception):
    """Stands for a kill between two steps."""


class StopAfter(Signals):
    """Ends a run after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        with super().step():
            yield
        self.left -= 1
        if not self.left:
            raise Stop


def run_tiny(
    directory: Path,
    *overrides: str,
    signals: Signals | None = None,
    out: io.StringIO | None = None,
) -> bool:
    view = ProgressView(console=Console(file=out or io.StringIO(), width=200))
    with open_run(directory, None, [*OVERRIDES, *overrides]) as run:
        parts = run.setup.frozen_parts(directory)
        with (
            signals or Signals() as held,
            RunJournal(directory, run.config, parts.fingerprint, view) as journal,
        ):
            train(run.config, run.setup.task(parts), journal, held)
    return True


def settings(overrides: Iterable[str]) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def command(*arguments: object, tiny: bool = False) -> Any:
    """`lvrpo ARGUMENTS` in this process, with the tiny configuration if asked for."""
    extra = settings(OVERRIDES) if tiny else []
    return CliRunner().invoke(app, [*map(str, arguments), *extra])


def heed_signals() -> None:
    """For `preexec_fn`: whoever started the tests may ignore some, and a child inherits that."""
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(
            signum, signal.SIG_DFL if signum != signal.SIGINT else signal.default_int_handler
        )
