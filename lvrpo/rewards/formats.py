"""Where in a text its answer stands, and whether the text has the form that was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lvrpo.rewards.reward import Samples


class AnswerFormat(Protocol):
    """A form of texts with one answer in them."""

    def answer_of(self, text: str) -> str | None:
        """The answer without the blanks around it; None where there is none, or an empty one."""

    def fits(self, text: str) -> bool:
        """Whether the whole text has this form."""


@dataclass(frozen=True)
class PlainFormat:
    """The whole text is the answer."""

    def answer_of(self, text: str) -> str | None:
        """See `AnswerFormat`."""
        return text.strip() or None

    def fits(self, text: str) -> bool:
        """See `AnswerFormat`: it is not blank."""
        return bool(text.strip())


@dataclass(frozen=True)
class TaggedFormat:
    """A thought and an answer in tags: "<think>...</think> <answer>...</answer>".

    The answer is that of the last closed pair of its tags, so that a text whose form is otherwise
    wrong still has one; what the form is worth is a reward of its own.

    Args:
        thought: name of the first pair of tags; empty for a form that has none.
        answer: name of the second pair.
    """

    thought: str = "think"
    answer: str = "answer"

    def answer_of(self, text: str) -> str | None:
        """See `AnswerFormat`."""
        end = text.rfind(f"</{self.answer}>")
        tag = f"<{self.answer}>"
        start = text.rfind(tag, 0, end) if end >= 0 else -1
        return None if start < 0 else text[start + len(tag) : end].strip() or None

    def fits(self, text: str) -> bool:
        """See `AnswerFormat`: each tag once, in order, and nothing but blanks outside of them."""
        names = [name for name in (self.thought, self.answer) if name]
        once = all(text.count(f"<{name}>") == text.count(f"</{name}>") == 1 for name in names)
        parts = (f"<{re.escape(name)}>.*</{re.escape(name)}>" for name in names)
        return once and re.fullmatch(r"\s*".join(parts), text.strip(), re.DOTALL) is not None


@dataclass(frozen=True)
class BoxedFormat:
    r"""The answer is in the last LaTeX box, "\boxed{...}", whose braces are balanced."""

    def answer_of(self, text: str) -> str | None:
        """See `AnswerFormat`."""
        for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
            depth = 1
            for at in range(found.end(), len(text)):
                if text[at - 1] == "\\":
                    continue  # an escaped brace is a brace of the answer
                depth += {"{": 1, "}": -1}.get(text[at], 0)
                if not depth:
                    return text[found.end() : at].strip() or None
        return None

    def fits(self, text: str) -> bool:
        """See `AnswerFormat`: there is such a box."""
        return self.answer_of(text) is not None


@dataclass(frozen=True)
class PatternFormat:
    """A regular expression that the whole text matches.

    The answer is the group "answer", or else the first group, or else the whole text.

    Args:
        pattern: in Python's syntax; "." matches line ends too.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    pattern: str
    _compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"PatternFormat: {self.pattern!r} is no pattern: {error}") from error
        object.__setattr__(self, "_compiled", compiled)

    def answer_of(self, text: str) -> str | None:
        """See `AnswerFormat`."""
        found = self._compiled.fullmatch(text.strip())
        if found is None:
            return None
        named = "answer" if "answer" in found.re.groupindex else min(1, found.re.groups)
        return (found[named] or "").strip() or None

    def fits(self, text: str) -> bool:
        """See `AnswerFormat`."""
        return self._compiled.fullmatch(text.strip()) is not None


#: Formats by name; any other string is the pattern of a `PatternFormat` behind "regex:".
FORMATS: dict[str, Callable[[], AnswerFormat]] = {
    "plain": PlainFormat,
    "tagged": TaggedFormat,
    "boxed": BoxedFormat,
}
#: A format, or its name.
FormatLike: TypeAlias = str | AnswerFormat


def answer_format(given: FormatLike) -> AnswerFormat:
    """The format of a name of `FORMATS` or of "regex:PATTERN"; a format is itself.

    Raises:
        ValueError: there is no such name, or the pattern is none.
    """
    if not isinstance(given, str):
        return given
    name, colon, pattern = given.partition(":")
    if name == "regex" and colon:
        return PatternFormat(pattern)
    if given not in FORMATS:
        raise ValueError(
            f"format is {given!r}, expected one of {', '.join(FORMATS)}, or 'regex:PATTERN'"
        )
    return FORMATS[given]()


@dataclass(frozen=True)
class FormatReward:
    """1 for a text of the right form, else 0; no score for drawings.

    Args:
        format: a format or its name, see `answer_format`.
    """

    format: FormatLike = "tagged"
    name: str = field(default="format", init=False)
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        answer_format(self.format)

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32, NaN for drawings."""
        form = answer_format(self.format)
        return torch.tensor(
            [math.nan if text is None else float(form.fits(text)) for text in samples.texts]
        )
