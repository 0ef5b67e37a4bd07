"""One prompt of either kind, and the check that two splits share none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Skill: TypeAlias = Literal["understand", "generate"]
#: Why a text ended: at its end token, at another token or a string that stops it, or at the limit
#: of tokens, in the middle of whatever it says.
FinishReason: TypeAlias = Literal["end", "stop", "length"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
SKILLS: tuple[Skill, ...] = get_args(Skill)
Picture: TypeAlias = NDArray[np.float32]  # [C, H, W] in [0, 1]


class Video(NamedTuple):
    """Pictures of one size, one after the other."""

    frames: NDArray[np.float32]  # [F, C, H, W] in [0, 1]
    fps: float  # frames a second


class Rule(Protocol):
    """What a drawing must satisfy. Only what made it can read it; here two are told apart."""

    @property
    def key(self) -> str:
        """Equal for two rules that ask for the same drawing."""


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt: a question, most often about a picture, or a picture to draw.

    Args:
        task: "understand" (answer in words) or "generate" (draw).
        uid: stable name, unique in a data set; random streams and reports are keyed by it.
        prompt: what the model reads.
        image: [C, H, W] fp32 in [0, 1], the picture asked about or to be edited, if there is one.
        further_images: the others, each of its own size.
        videos: that are asked about; understand only.
        answer: the right answer, which is imitated; understand only.
        other_answers: answers that are as right; understand only.
        rule: what a drawing must satisfy; None where no rule can check it.
        target: [C, H, W] fp32 in [0, 1], a right drawing to learn from under supervision.
        kind: what sort of question or prompt it is, to break metrics down; may be empty.
        cluster: equal for prompts that are not independent of each other; empty: see `cluster_of`.
        extra: columns of the user's own, for rewards of the user's own.
    """

    task: Skill
    uid: str
    prompt: str
    image: Picture | None = None
    answer: str | None = None
    other_answers: tuple[str, ...] = ()
    rule: Rule | None = None
    target: Picture | None = None
    kind: str = ""
    cluster: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    further_images: tuple[Picture, ...] = ()
    videos: tuple[Video, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in SKILLS:
            raise ValueError(f"Example {self.uid!r}: task is {self.task!r}, expected {SKILLS}")
        if self.task == "understand":
            self._require("answer")
            self._refuse("rule", "target")
        else:
            self._refuse("answer", "other_answers", "videos")
        if self.further_images and self.image is None:
            raise ValueError(f"Example {self.uid!r}: 'further_images' without an 'image'")

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the one that is imitated first; none of a drawing."""
        return () if self.answer is None else (self.answer, *self.other_answers)

    @property
    def images(self) -> tuple[Picture, ...]:
        """All pictures of the prompt, in the order in which it is read."""
        return () if self.image is None else (self.image, *self.further_images)

    def _require(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"Example {self.uid!r}: task {self.task!r} needs {name!r}")

    def _refuse(self, *names: str) -> None:
        for name in names:
            given = getattr(self, name)
            if given is not None and not (isinstance(given, tuple) and not given):
                raise ValueError(f"Example {self.uid!r}: task {self.task!r} takes no {name!r}")

    @property
    def identity(self) -> Identity | None:
        """What two splits may not share: it would give an answer, or a right drawing, away.

        A question is known by its wording and its pictures, if it has some; a drawing by its rule
        (two wordings of one layout are one prompt), or by wording and target where there is no
        rule, and by the pictures to be edited. A drawing prompt with neither has nothing to give
        away: a finite set of prompts may be trained on and measured with.
        """
        if self.task == "understand":
            if self.images or self.videos:
                return Identity("question and picture", shown_hash(self, salt=self.prompt))
            return Identity("question", _digest(self.prompt))
        edited, of = "", ""
        if self.images:
            edited, of = shown_hash(self), " of one picture to be edited"
        if self.rule is not None:
            return Identity(f"rule{of}", _digest(self.rule.key + edited))
        if self.target is not None:
            digest = picture_hash(self.target, salt=self.prompt + edited)
            return Identity(f"wording and target{of}", digest)
        return None


class Identity(NamedTuple):
    """Equal for two examples that would test the same thing; `by` names what they share."""

    by: str
    digest: str


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cluster_of(example: Example) -> str:
    """Equal for two prompts that are not independent of each other, which errors have to know.

    `Example.cluster`; where it is empty, questions about the same pictures are a cluster, and edits
    of them, and requests of one rule; or what has one wording, where there is neither.
    """
    if example.cluster:
        return example.cluster
    if example.images or example.videos:
        return shown_hash(example)
    return example.prompt if example.rule is None else example.rule.key


def picture_hash(picture: NDArray[Any], *, salt: str = "") -> str:
    """Hash of shape and pixels, at 8 bits a pixel: what a PNG file would keep of it."""
    pixels = np.round(np.asarray(picture, dtype=np.float64) * 255).astype(np.uint8)
    digest = hashlib.blake2b(f"{pixels.shape} {salt}".encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def shown_hash(example: Example, *, salt: str = "") -> str:
    """Hash of the pictures and videos of a prompt; of one picture, its `picture_hash`."""
    found = [picture_hash(picture, salt=salt) for picture in example.images]
    found += [picture_hash(frames, salt=f"{fps} {salt}") for frames, fps in example.videos]
    return found[0] if len(found) == 1 else _digest(" ".join(found))


def check_disjoint(splits: Mapping[str, Iterable[Example]]) -> None:
    """No example of one split occurs in another, by `Example.identity`.

    Raises:
        ValueError: naming both splits, both examples and what they share.
    """
    check_identities_disjoint(
        {
            split: ((example.uid, example.identity) for example in examples)
            for split, examples in splits.items()
        }
    )


def check_identities_disjoint(
    splits: Mapping[str, Iterable[tuple[str, Identity | None]]],
) -> None:
    """As `check_disjoint`, for pairs of uid and identity."""
    seen: dict[Identity, tuple[str, str]] = {}
    for split, pairs in splits.items():
        for uid, identity in pairs:
            if identity is None:
                continue
            other, twin = seen.setdefault(identity, (split, uid))
            if other != split:
                raise ValueError(
                    f"splits overlap: {uid!r} of {split} is also {twin!r} of {other}: the same "
                    f"{identity.by}"
                )
