"""Where the prompts of a run come from, and a user's JSONL files as such a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from lvrpo import random
from lvrpo.data.example import SKILLS, Example, Skill, check_identities_disjoint
from lvrpo.data.jsonl import DataError, JsonlExamples

#: What is trained on, what choices are made by, and what results are measured with.
Split: TypeAlias = Literal["train", "validation", "test"]


class LabelErrors(NamedTuple):
    """How wrong the labels are that a source makes; those of files are taken as they are.

    Attributes:
        bias: probability that a label is wrong in the one way that its annotator is prone to.
        noise: probability that it is wrong in any way, independently of all others.
    """

    bias: float = 0.0
    noise: float = 0.0


class Source(Protocol):
    """Prompts of every skill, drawn by seed."""

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of every picture."""

    def examples(self, split: Split, skill: Skill, count: int, seed: int) -> list[Example]:
        """`count` prompts of one skill; fewer where the data that is measured with has fewer.

        Raises:
            DataError: there is no such split.
        """

    def labelled(
        self, skill: Skill, count: int, errors: LabelErrors, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """`count` training prompts to imitate, each as `copies` examples; none where none has one.

        The labels are as wrong as `errors` says.
        """


class JsonlSource:
    """A user's files.

    Args:
        train: what is trained on.
        test: what is measured with.
        validation: what choices are made by, if any are.

    Raises:
        ValueError: an example is in two files.
    """

    def __init__(
        self, train: JsonlExamples, test: JsonlExamples, validation: JsonlExamples | None = None
    ) -> None:
        self.train, self.test, self.validation = train, test, validation
        files = {"train": train, "validation": validation, "test": test}
        check_identities_disjoint(
            {
                split: zip((row["uid"] for row in file.rows), file.identities, strict=True)
                for split, file in files.items()
                if file is not None
            }
        )
        self._prompts = {skill: _positions(train, skill) for skill in SKILLS}
        self._labelled = {
            skill: [i for i in self._prompts[skill] if _LABELS[skill] in train.rows[i]]
            for skill in SKILLS
        }

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of every picture."""
        return self.train.picture_shape

    def examples(self, split: Split, skill: Skill, count: int, seed: int) -> list[Example]:
        """See `Source`; within one draw a training prompt comes again only after all others.

        Raises:
            DataError: the training file has no prompt of this skill, or there is no such file.
        """
        if split == "test":
            return first_of(self.test, skill, count)
        if split == "validation":
            if self.validation is None:
                raise DataError(
                    "data.validation_source is empty, expected the JSONL file of the validation "
                    "split"
                )
            return first_of(self.validation, skill, count)
        if count and not self._prompts[skill]:
            raise DataError(
                f"{self.train.path}: no line has the task {skill!r}; set "
                f"rollout.{skill}_prompts = 0 to train without it"
            )
        return self._draw(self._prompts[skill], skill, count, seed)

    def labelled(
        self, skill: Skill, count: int, errors: LabelErrors, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """See `Source`; the file's labels are taken as they are."""
        if not self._labelled[skill]:
            return []
        drawn = self._draw(self._labelled[skill], skill, count, seed)
        return [[example] * copies for example in drawn]

    def _draw(self, positions: Sequence[int], skill: Skill, count: int, seed: int) -> list[Example]:
        if not count:
            return []
        generator = random.stream(seed, "draw", skill)
        rounds, rest = divmod(count, len(positions))
        picks = [generator.permutation(len(positions)) for _ in range(rounds)]
        # Few of many are chosen without a look at the others.
        picks.append(generator.choice(len(positions), rest, replace=False))
        return [self.train[positions[i]] for chosen in picks for i in chosen.tolist()]

    def notes(self) -> list[str]:
        """What part of the held-out drawing prompts are prompts of the training, word for word."""
        train, test = (
            [row["prompt"] for row in file.rows if row["task"] == "generate"]
            for file in (self.train, self.test)
        )
        known = set(train)
        again = [prompt for prompt in test if prompt in known]
        if not again:
            return []
        return [
            f"{len(again)} of {len(test)} held-out drawing prompts are training prompts word for "
            f"word, {again[0]!r} for one: their scores tell of new drawings, not of new prompts"
        ]


class FileSource:
    """One file to measure with; there is nothing to learn from.

    Args:
        file: of the prompts.
    """

    def __init__(self, file: JsonlExamples) -> None:
        self.file = file

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of every picture."""
        return self.file.picture_shape

    def examples(self, split: Split, skill: Skill, count: int, seed: int) -> list[Example]:
        """The first ones, of the test split alone."""
        return first_of(self.file, skill, count) if split == "test" else []

    def labelled(
        self, skill: Skill, count: int, errors: LabelErrors, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """None."""
        return []


_LABELS: dict[Skill, str] = {"understand": "answer", "generate": "target"}


def first_of(file: JsonlExamples, skill: Skill, count: int) -> list[Example]:
    """The first `count` examples of one skill."""
    return [file[i] for i in _positions(file, skill)[:count]]


def _positions(file: JsonlExamples, skill: Skill) -> list[int]:
    return [i for i, row in enumerate(file.rows) if row["task"] == skill]
