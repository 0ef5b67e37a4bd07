"""Texts against the right answers of their examples: rules that know no data set.

`Example.answers` has them all, and the best match counts. Where in a text its answer stands is
said by a format of `lvrpo.rewards.formats`; a text without one scores 0, a drawing NaN.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.distance import edit_distance
from lvrpo.rewards.formats import FormatLike, answer_format
from lvrpo.rewards.numbers import equal_numbers, last_number, parse_number
from lvrpo.rewards.reward import Samples

#: Columns of the user's own that these rewards read.
CHOICES = "choices"


@dataclass(frozen=True)
class MatchReward(ABC):
    """What the rewards of this file have in common; `match` is what tells them apart.

    Args:
        format: where the answer of a text stands, see `answer_format`.
    """

    format: FormatLike = "plain"
    name: ClassVar[str]
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        answer_format(self.format)

    @abstractmethod
    def match(self, given: str, right: str, example: Example) -> float:
        """How right an answer is, in [0, 1].

        Args:
            given: the answer of a text.
            right: one of the right answers.
            example: that has it.

        Raises:
            ValueError: the right answer is none of this kind.
        """

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN for drawings."""
        form = answer_format(self.format)
        scores = []
        for example, text in zip(samples.examples, samples.texts, strict=True):
            if text is None:
                scores.append(math.nan)
                continue
            # Blank answers, too, see the right ones: a mistake in the data is met at once.
            given = form.answer_of(text)
            found = [self.match(given or "", right, example) for right in example.answers]
            scores.append(0.0 if given is None else max(found, default=math.nan))
        return torch.tensor(scores)


@dataclass(frozen=True)
class ExactReward(MatchReward):
    """1 for a right answer to the letter, blanks aside."""

    name: ClassVar[str] = "exact"

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        return float(given.split() == right.split())


@dataclass(frozen=True)
class NormalizedReward(MatchReward):
    """1 for a right answer up to case, punctuation, English articles and blanks."""

    name: ClassVar[str] = "normalized"

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        return float(normalized(given) == normalized(right))


@dataclass(frozen=True)
class ContainsReward(MatchReward):
    """1 for an answer in which a right one stands, word for word, up to case and punctuation."""

    name: ClassVar[str] = "contains"

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        wanted = normalized(right)
        return float(bool(wanted) and f" {wanted} " in f" {normalized(given)} ")


@dataclass(frozen=True)
class TextDistanceReward(MatchReward):
    """Average normalised Levenshtein similarity, ANLS: 1 - distance / the longer length.

    Args:
        threshold: a similarity below it counts as 0; published with 0.5.
    """

    threshold: float = 0.5
    name: ClassVar[str] = "anls"

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        a, b = (" ".join(text.lower().split()) for text in (given, right))
        similarity = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
        return similarity if similarity >= self.threshold else 0.0


@dataclass(frozen=True)
class NumberReward(MatchReward):
    """1 for the right number, however it is written.

    Args:
        relative: tolerance as a share of the right number.
        absolute: tolerance.
        anywhere: take the last number of the answer; else the answer has to be a number alone.
    """

    relative: float = 0.0
    absolute: float = 0.0
    anywhere: bool = False
    name: ClassVar[str] = "number"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("relative", "absolute"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"NumberReward: {name} is {value}, expected a number >= 0")

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        expected = parse_number(right)
        if expected is None:
            raise ValueError(f"answer {right!r} of {example.uid!r} is no number")
        number = last_number(given) if self.anywhere else parse_number(given)
        return float(
            number is not None
            and equal_numbers(number, expected, relative=self.relative, absolute=self.absolute)
        )


@dataclass(frozen=True)
class CountReward(MatchReward):
    """How near a count is: max(0, 1 - |given - right| / right), or 1 for the right one alone.

    Counts are digits or an English word up to twenty.

    Args:
        strict: 0 for any but the right count.
    """

    strict: bool = False
    name: ClassVar[str] = "count"

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        expected, counted = parse_count(right), parse_count(given)
        if expected is None:
            raise ValueError(f"answer {right!r} of {example.uid!r} is no count")
        if counted is None:
            return 0.0
        if self.strict or not expected:
            return float(counted == expected)
        return max(0.0, 1 - abs(counted - expected) / expected)


@dataclass(frozen=True)
class ChoiceReward(MatchReward):
    """1 for the right choice, by its letter ("B", "(b)", "B. a boat") or its text.

    The column "choices" lists the texts of A, B, C, ... or names each by its letter; without it
    the right answer is a letter, and only letters are read.
    """

    name: ClassVar[str] = "choice"

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        choices = _choices(example)
        expected = parse_choice(right, choices)
        if expected is None:
            among = f"none of {', '.join(choices)}" if choices else "no letter"
            raise ValueError(f"answer {right!r} of {example.uid!r} is {among}")
        return float(parse_choice(given, choices) == expected)


@dataclass(frozen=True)
class WordsReward(MatchReward):
    """1 for an answer that names exactly what the right one names, of a closed set of words.

    Args:
        words: every way to name a thing, by its name; see `COLORS` and `POSITIONS`.
    """

    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    name: ClassVar[str] = "words"

    def match(self, given: str, right: str, example: Example) -> float:
        """See `MatchReward`."""
        expected = named(right, self.words)
        if not expected:
            raise ValueError(
                f"answer {right!r} of {example.uid!r} names none of {', '.join(self.words)}"
            )
        return float(named(given, self.words) == expected)


#: English colours: those of GenEval, and gray.
COLORS: dict[str, tuple[str, ...]] = {
    color: (color,)
    for color in ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"]
}
COLORS |= {"black": ("black",), "white": ("white",), "gray": ("gray", "grey")}
#: English names of places in a picture, and of places relative to something.
POSITIONS = {
    "top left": ("top left", "upper left", "left top"),
    "top right": ("top right", "upper right", "right top"),
    "bottom left": ("bottom left", "lower left", "left bottom"),
    "bottom right": ("bottom right", "lower right", "right bottom"),
    "center": ("center", "centre", "middle"),
    "left": ("left", "left of"),
    "right": ("right", "right of"),
    "above": ("above", "top", "over", "on top of"),
    "below": ("below", "bottom", "under", "beneath", "underneath"),
}


@dataclass(frozen=True)
class ColorReward(WordsReward):
    """1 for an answer that names exactly the right colours."""

    words: Mapping[str, Sequence[str]] = field(default_factory=lambda: COLORS)
    name: ClassVar[str] = "color"


@dataclass(frozen=True)
class PositionReward(WordsReward):
    """1 for an answer that names exactly the right places."""

    words: Mapping[str, Sequence[str]] = field(default_factory=lambda: POSITIONS)
    name: ClassVar[str] = "position"


_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = str.maketrans(
    dict.fromkeys(string.punctuation.replace("-", "") + "“”„«»…¿¡。、", " ")
)


def normalized(text: str) -> str:
    """Case-folded, without punctuation (hyphens inside words stay), articles and extra blanks.

    A text of articles alone keeps them: "A" may be an answer.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    words = [word.strip("-") for word in folded.split()]
    words = [word for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def named(text: str, words: Mapping[str, Sequence[str]]) -> set[str]:
    """What a text names, the longest way to name a thing first: "top left" is no "left".

    Args:
        text: in any case, with hyphens or blanks between words.
        words: every way to name a thing, by its name.
    """
    left = f" {normalized(text).replace('-', ' ')} "
    ways = [(way, name) for name, each in words.items() for way in each]
    found = set()
    for way, name in sorted(ways, key=lambda pair: -len(pair[0])):
        if f" {way} " in left:
            found.add(name)
            left = left.replace(f" {way} ", " | ")
    return found


_COUNTS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]


def parse_count(text: str) -> int | None:
    """A whole number of things, in digits or as an English word up to twenty; None for no count."""
    word = text.strip().rstrip(".").casefold()
    if word in _COUNTS:
        return _COUNTS.index(word)
    number = parse_number(text)
    if number is None or number.is_percent or number.value.denominator != 1 or number.value < 0:
        return None
    return int(number.value)


_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:answer|option|choice)\s*(?:is\s*|:\s*)?)?"
    r"(?:[(\[{](?P<inside>[A-Za-z])[)\]}]|(?P<bare>[A-Za-z]))"
    r"(?P<mark>\s*[.:)]|\s+[-\u2013\u2014]\s)?(?P<text>.*)",
    re.DOTALL | re.IGNORECASE,
)


def parse_choice(text: str, choices: Mapping[str, str]) -> str | None:
    """The capital letter of the choice that a text makes; None where it makes none, or two.

    Args:
        text: a letter with or without brackets and point, the text of a choice, or both.
        choices: texts by letter; empty where nothing but letters is known.
    """
    given = text.strip(" \t\n*`")
    found = _LETTER.fullmatch(given)
    if found is not None:
        letter, said = (found["inside"] or found["bare"]).upper(), found["text"].strip()
        is_known = not choices or letter in choices
        if is_known and not normalized(said):
            return letter
        if is_known and (found["inside"] or found["mark"]):
            is_same = not choices or normalized(said) == normalized(choices[letter])
            return letter if is_same else None
    same = [letter for letter, said in choices.items() if normalized(said) == normalized(given)]
    return same[0] if len(same) == 1 else None


def _is_choice(choice: tuple[str, Any]) -> bool:
    return len(choice[0]) == 1 and isinstance(choice[1], str)


def _choices(example: Example) -> Mapping[str, str]:
    given: Any = example.extra.get(CHOICES, {})
    if isinstance(given, Mapping):
        choices = {str(letter).strip(" ().").upper(): said for letter, said in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        choices = dict(zip(string.ascii_uppercase, given, strict=False))
    else:
        choices = {}
    is_read = bool(choices) or given == {}
    if not (is_read and len(choices) == len(given) and all(map(_is_choice, choices.items()))):
        raise ValueError(
            f"{CHOICES} of {example.uid!r} is {given!r}, expected a list of at most 26 texts, or "
            "texts by letter"
        )
    return choices
