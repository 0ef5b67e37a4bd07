"""What the loop asks of the world around it: a journal to write to, and when it may be ended.

The loop itself reads and writes no file and hears no signal. lvrpo/runs has a journal that is a
directory; any other object with these methods does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from lvrpo.data.example import Skill
from lvrpo.trainer.measurement import Measurement
from lvrpo.trainer.schedule import Bridge


@dataclass(frozen=True)
class Snapshot:
    """A finished step, from which a run can go on.

    Attributes:
        step: counted through both phases.
        tensors: everything that changes from step to step, by name; not copied.
        origin: where it is kept, for messages.
    """

    step: int
    tensors: Mapping[str, Tensor]
    origin: str = "the snapshot"


@dataclass(frozen=True)
class GalleryItem:
    """One prompt with what the model made of it.

    Attributes:
        task: "understand" or "generate".
        uid: of the prompt, the same before and after.
        prompt: as the model read it.
        seed: of the sampling, the same before and after.
        image: [C, H, W] floats in [0, 1], C 1 or 3: the picture drawn, or the one asked about; None
            of a question without one.
        answer: the model's words (understand).
        expected: the right answer, or the requirement in words.
        right: the judge's verdict; None where no rule tells.
        source: [C, H, W] likewise, the picture that was to be edited.
        scores: of each reward by label, None where it has none; empty where nothing was scored.
    """

    task: Skill
    uid: str
    prompt: str
    seed: int
    image: np.ndarray | None
    answer: str | None
    expected: str | None
    right: bool | None
    source: np.ndarray | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)


class Journal(Protocol):
    """What becomes of a run: what it tells, and what it goes on from.

    Every method but `step` and `save` may be asked at any time; a method that cannot do its work
    raises, which ends the run.
    """

    @property
    def bridge(self) -> Bridge:
        """Where the learning rate's schedule was changed on the way, see `learning_rate`."""

    def latest(self) -> Snapshot | None:
        """What was saved last; None for a new run."""

    def begin(self, *, device: str, dtype: str) -> None:
        """Note where the weights are and what they are; told once, before the first step."""

    def reference(self) -> Snapshot:
        """What `save_reference` was given, in this process or before it."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Record one step, of which only this record is missing; 0-d tensors count as scalars.

        `row` has "step", "phase" ("warm_start", then `run.objective`) and metrics.
        """

    def save(self, snapshot: Snapshot) -> None:
        """Keep a step that is recorded; its tensors change with the next one."""

    def save_reference(self, snapshot: Snapshot) -> None:
        """Keep the weights that the policy phase begins with for as long as the run is."""

    def is_evaluated(self, label: str, step: int) -> bool:
        """Whether `evaluation` has been told of this one."""

    def evaluating(self, label: str, done: int, total: int) -> None:
        """`done` of `total` samples of an evaluation are there."""

    def evaluation(
        self,
        label: str,
        step: int,
        found: Sequence[Measurement],
        gallery: Sequence[GalleryItem],
    ) -> None:
        """Record an evaluation, all of it or none."""

    def samples(self, step: int, items: Sequence[GalleryItem]) -> None:
        """Record some samples of a training step, of which only its own record is missing."""

    def message(self, text: str) -> None:
        """Say a line to whoever waits."""

    def ended(self, error: BaseException, step: int, finished: Snapshot | None) -> None:
        """Keep what a run that ends by an error would lose, and say what became of it.

        Nothing is raised: the error will be. `finished` is the last finished `step`, None where an
        update was cut off in its middle and there is no copy.
        """


class Interrupts(Protocol):
    """When whatever may end a run, a signal for one, has to wait."""

    def step(self) -> AbstractContextManager[None]:
        """A step, at whose end a run is best ended."""

    def held(self) -> AbstractContextManager[None]:
        """What must not be torn apart: an update and its record."""

    def ignore(self) -> None:
        """From here on the run is ending anyway."""
