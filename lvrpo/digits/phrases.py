"""The words of digit scenes: names of cells, questions, and requests to draw."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Container, Sequence

from lvrpo.digits.pictures import Cell
from lvrpo.digits.rules import RELATIONS, DigitRule, LayoutRule, RelationRule, SumRule

_ROW_NAMES = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMN_NAMES = {1: ("",), 2: ("left", "right"), 3: ("left", "center", "right")}
# fmt: off
_FIXED_WORDS = [
    "a", "above", "and", "are", "at", "below", "bottom", "center", "column", "digit", "digits",
    "draw", "four", "how", "is", "left", "many", "middle", "more", "no", "of", "one", "plus",
    "right", "row", "sum", "than", "that", "the", "there", "three", "to", "top", "two", "what",
    "yes",
]
# fmt: on
_COUNTS = ("zero", "one", "two", "three", "four")
_LARGEST_SUM = 36  # of four digits


@functools.cache
def cell_names(rows: int, cols: int) -> tuple[str, ...]:
    """Names of the cells, row by row: "top-left", ...; "row 4 column 1" on larger canvases."""
    if max(rows, cols) <= 3 and max(rows, cols) > 1:
        return tuple(
            "-".join(filter(None, (row, column)))
            for row in _ROW_NAMES[rows]
            for column in _COLUMN_NAMES[cols]
        )
    return tuple(f"row {r + 1} column {c + 1}" for r in range(rows) for c in range(cols))


def scene_words() -> list[str]:
    """Every word of every prompt and answer here: the vocabulary of a scene tokenizer."""
    # A cell's name is one word, so that a model finds the cell with one lookup.
    cells = [f"{row}-{column}" for row in _ROW_NAMES[3] for column in _COLUMN_NAMES[3]]
    return [*(str(number) for number in range(_LARGEST_SUM + 1)), *_FIXED_WORDS, *cells]


def ask_name(cell: str) -> str:
    """The question for the digit in a cell."""
    return f"what digit is at {cell}"


def ask_count() -> str:
    """The question for the number of digits."""
    return "how many digits are there"


def ask_list() -> str:
    """The question for all digits, row by row."""
    return "what digits are there"


def ask_count_of(digit: int) -> str:
    """The question for the number of digits of one value."""
    return f"how many {digit} are there"


def ask_relation(relation: str, digit: int) -> str:
    """The question for the digit next to the only `digit`."""
    return f"what digit is {relation} {digit}"


def ask_comparison(first: str, second: str) -> str:
    """The yes-or-no question whether the digit in one cell is the larger one."""
    return f"is {first} more than {second}"


def ask_sum(first: str, second: str) -> str:
    """The question for the sum of the digits in two cells."""
    return f"what is the sum of {first} and {second}"


def say_sum(first: int, second: int, total: int) -> str:
    """The answer to `ask_sum`, with the digits that were read."""
    return f"{first} plus {second} is {total}"


def request(rule: DigitRule, order: Sequence[int] | None = None) -> str:
    """The prompt that asks for a drawing.

    Args:
        rule: what is asked for.
        order: of a layout's cells in the sentence; None means row by row.
    """
    if isinstance(rule, SumRule):
        if not 1 <= rule.count <= 4:
            raise ValueError(f"request: no words for {rule.count} digits")
        return f"draw {_COUNTS[rule.count]} digits that sum to {rule.total}"
    if isinstance(rule, RelationRule):
        return f"draw a {rule.first} {rule.relation} a {rule.second}"
    names = cell_names(rule.rows, rule.cols)
    cells = range(len(rule.digits)) if order is None else order
    phrases = [digit_at(rule.digits[i], names[i]) for i in cells if rule.digits[i] is not None]
    return "draw " + " and ".join(phrases)


def digit_at(digit: Cell, cell: str) -> str:
    """The key phrase of one digit in one cell."""
    return f"{digit} at {cell}"


def empty_at(cell: str) -> str:
    """The key phrase of a cell with no digit; no prompt says it, each implies it."""
    return f"nothing at {cell}"


def questions_about(rule: DigitRule, kinds: Container[str] | None = None) -> list[tuple[str, str]]:
    """Questions, each with its one right answer, that a drawing true to `rule` answers.

    Args:
        rule: what is drawn.
        kinds: only questions of these kinds, of `questions.QUESTIONS`; None means all.
    """
    asked: list[tuple[str, str, str]] = []  # kind, question, answer
    if isinstance(rule, LayoutRule):
        names = cell_names(rule.rows, rule.cols)
        drawn = [(i, digit) for i, digit in enumerate(rule.digits) if digit is not None]
        asked += [("name", ask_name(names[i]), str(digit)) for i, digit in drawn]
        asked.append(("count", ask_count(), str(len(drawn))))
        digits = Counter(digit for _, digit in drawn)
        asked += [("count_of", ask_count_of(d), str(n)) for d, n in digits.items()]
        asked.append(("list", ask_list(), " ".join(str(digit) for _, digit in drawn)))
    elif isinstance(rule, SumRule):
        asked.append(("count", ask_count(), str(rule.count)))
    else:
        asked.append(("count", ask_count(), "2"))
        if rule.first != rule.second:
            back = dict(zip(RELATIONS, ("below", "above", "right of", "left of"), strict=True))
            first, second = str(rule.first), str(rule.second)
            asked.append(("relate", ask_relation(rule.relation, rule.second), first))
            asked.append(("relate", ask_relation(back[rule.relation], rule.first), second))
    return [
        (question, answer) for kind, question, answer in asked if kinds is None or kind in kinds
    ]
