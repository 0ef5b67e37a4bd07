"""A journal that keeps everything in memory: a loop with it needs no file, and no directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lvrpo.trainer.journal import GalleryItem, Snapshot
from lvrpo.trainer.measurement import Measurement


def copy_of(snapshot: Snapshot) -> Snapshot:
    return Snapshot(snapshot.step, {name: t.clone() for name, t in snapshot.tensors.items()})


class MemoryJournal:
    bridge = None

    def __init__(self) -> None:
        self.saved: list[Snapshot] = []
        self.references: list[Snapshot] = []
        self.rows: list[Mapping[str, Any]] = []
        self.evals: dict[tuple[str, int], tuple[Sequence[Measurement], Sequence[GalleryItem]]] = {}
        self.shown: dict[int, Sequence[GalleryItem]] = {}
        self.said: list[str] = []
        self.sampled: list[tuple[str, int, int]] = []
        self.end: tuple[BaseException, int, Snapshot | None] | None = None

    def latest(self) -> Snapshot | None:
        return self.saved[-1] if self.saved else None

    def begin(self, *, device: str, dtype: str) -> None:
        self.begun = device, dtype

    def reference(self) -> Snapshot:
        return self.references[-1]

    def step(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def save(self, snapshot: Snapshot) -> None:
        self.saved.append(copy_of(snapshot))

    def save_reference(self, snapshot: Snapshot) -> None:
        self.references.append(copy_of(snapshot))

    def is_evaluated(self, label: str, step: int) -> bool:
        return (label, step) in self.evals

    def evaluating(self, label: str, done: int, total: int) -> None:
        self.sampled.append((label, done, total))

    def evaluation(
        self,
        label: str,
        step: int,
        found: Sequence[Measurement],
        gallery: Sequence[GalleryItem],
    ) -> None:
        self.evals[label, step] = found, gallery

    def samples(self, step: int, items: Sequence[GalleryItem]) -> None:
        self.shown[step] = items

    def message(self, text: str) -> None:
        self.said.append(text)

    def ended(self, error: BaseException, step: int, finished: Snapshot | None) -> None:
        self.end = error, step, finished and copy_of(finished)
