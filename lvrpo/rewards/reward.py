"""What a reward is, and what it is given.

A reward is any callable with a `name`, from `Samples` to one number per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lvrpo.data.example import FINISH_REASONS, Example, FinishReason


@dataclass(frozen=True, eq=False)
class Samples:
    """What a batch of groups sampled. A group of G repeats its example G times.

    Args:
        examples: [B], the prompt of every sample.
        texts: [B], the sampled text, or None for a drawing.
        images: [N, C, H, W] fp32 in [0, 1], the drawings; None for no drawing.
        image_index: [N] ints, the sample each drawing belongs to, ascending.
        finish_reasons: [B], "end", "stop" or "length" of a text, None for a drawing; empty means
            that every text came to its end.
    """

    examples: Sequence[Example]
    texts: Sequence[str | None]
    images: Tensor | None = None
    image_index: Sequence[int] = ()
    finish_reasons: Sequence[FinishReason | None] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.examples):
            raise ValueError(f"Samples: {len(self.texts)} texts of {len(self.examples)} examples")
        drawings = 0 if self.images is None else len(self.images)
        if drawings != len(self.image_index):
            raise ValueError(f"Samples: {drawings} images, {len(self.image_index)} in image_index")
        drawn = [i for i, text in enumerate(self.texts) if text is None]
        if list(self.image_index) != drawn:
            raise ValueError("Samples: image_index must list exactly the samples without a text")
        if not len(self.finish_reasons):
            ended = [None if text is None else "end" for text in self.texts]
            object.__setattr__(self, "finish_reasons", ended)
        if len(self.finish_reasons) != len(self.texts):
            raise ValueError(
                f"Samples: {len(self.finish_reasons)} finish_reasons of {len(self.texts)} texts"
            )
        for i, (text, reason) in enumerate(zip(self.texts, self.finish_reasons, strict=True)):
            if reason not in ((None,) if text is None else FINISH_REASONS):
                expected = "None of a drawing"
                if text is not None:
                    expected = f"{', '.join(map(repr, FINISH_REASONS))} of a text"
                raise ValueError(f"Samples: finish_reasons[{i}] is {reason!r}, expected {expected}")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def truncated(self) -> Tensor:
        """[B] bool: the texts that were cut at the limit of tokens."""
        return torch.tensor([reason == "length" for reason in self.finish_reasons])

    @classmethod
    def of_texts(
        cls,
        examples: Sequence[Example],
        texts: Sequence[str],
        finish_reasons: Sequence[FinishReason] = (),
    ) -> Samples:
        """One text per example."""
        return cls(examples, texts, finish_reasons=finish_reasons)

    @classmethod
    def of_images(cls, examples: Sequence[Example], images: Tensor) -> Samples:
        """One drawing per example."""
        return cls(examples, [None] * len(examples), images, range(len(examples)))

    @classmethod
    def concat(cls, parts: Sequence[Samples]) -> Samples:
        """The samples of all parts, in order."""
        images = [part.images for part in parts if part.images is not None]
        index: list[int] = []
        start = 0
        for part in parts:
            index += [start + i for i in part.image_index]
            start += len(part)
        return cls(
            [example for part in parts for example in part.examples],
            [text for part in parts for text in part.texts],
            torch.cat(images) if images else None,
            index,
            [reason for part in parts for reason in part.finish_reasons],
        )

    def take(self, rows: Sequence[int]) -> Samples:
        """The samples of some rows, in the order given."""
        drawing_of = {at: n for n, at in enumerate(self.image_index)}
        drawings = [drawing_of[at] for at in rows if at in drawing_of]
        return Samples(
            [self.examples[at] for at in rows],
            [self.texts[at] for at in rows],
            None if self.images is None or not drawings else self.images[drawings],
            [i for i, at in enumerate(rows) if at in drawing_of],
            [self.finish_reasons[at] for at in rows],
        )

    def groups(self) -> list[range]:
        """The rows of each group: neighbours that have their example in common."""
        starts = [
            i
            for i, example in enumerate(self.examples)
            if i == 0 or example is not self.examples[i - 1]
        ]
        ends = [*starts[1:], len(self)]
        return [range(start, end) for start, end in zip(starts, ends, strict=False)]


class RewardError(ValueError):
    """A reward failed or returned something that must not reach the loss.

    Attributes:
        kind: what went wrong, without the samples it went wrong on.
        samples: the rows that have no score of this reward because of it.
    """

    def __init__(self, message: str, *, kind: str = "", samples: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.kind, self.samples = kind, samples


@runtime_checkable
class Reward(Protocol):
    """One column of scores."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def may_be_nan(self) -> bool:
        """Whether NaN means "does not apply"; without it a NaN is taken for a bug."""

    def __call__(self, samples: Samples) -> Any:
        """[B] numbers, one score per sample: a tensor, an array, or a sequence.

        An `async def` returns them when it is awaited. None in a sequence means that there is no
        score for this sample. The samples are a copy: what is written into them is seen by nobody.
        """


@dataclass(frozen=True)
class FunctionReward:
    """A plain function as a reward.

    Args:
        function: from `Samples` to B numbers, see `Reward`.
        name: for reports.
        may_be_nan: whether NaN is meant, as None always is.
    """

    function: Callable[[Samples], Any]
    name: str
    may_be_nan: bool = False

    def __call__(self, samples: Samples) -> Any:
        """What the function returns."""
        return self.function(samples)
