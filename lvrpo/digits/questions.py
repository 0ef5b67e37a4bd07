"""The kinds of question and request about digit scenes, each a function from random choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from lvrpo.digits import phrases
from lvrpo.digits.rules import (
    RELATIONS,
    DigitRule,
    LayoutRule,
    RelationRule,
    SumRule,
    related,
)

EMPTY = -1  # in integer arrays of cells


class Canvas(NamedTuple):
    """A grid of cells."""

    rows: int
    cols: int

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.rows * self.cols


class Label(NamedTuple):
    """What a drawing shows and what an answer says."""

    digits: list[int]  # per cell, EMPTY for none
    answer: str | None


class Draft(NamedTuple):
    """An example before its picture is drawn.

    `slip` is how a careless annotator labels it, where that is wrong: a list stops after two
    digits, a sum drops its carry, a drawing stops after the digit that is named first. `first` is
    the cell that was filled first, of the digit that a question asks about first.
    """

    kind: str
    prompt: str
    digits: list[int]  # per cell, EMPTY for none
    answer: str | None
    rule: DigitRule | None
    slip: Label | None = None
    first: int = 0


class Draw(NamedTuple):
    """The random choices that one example is built from."""

    order: list[int]  # all cells, shuffled; the first `amount` are filled
    digits: list[int]  # for them, in that order
    amount: int  # how many
    spare: float  # in [0, 1), for a choice that is left


def _fill(canvas: Canvas, draw: Draw, count: int) -> list[int]:
    cells = [EMPTY] * canvas.cells
    for cell, digit in zip(draw.order[:count], draw.digits, strict=False):
        cells[cell] = digit
    return cells


def _name(canvas: Canvas, draw: Draw) -> Draft:
    cell = phrases.cell_names(canvas.rows, canvas.cols)[draw.order[0]]
    cells = _fill(canvas, draw, draw.amount)
    return Draft("name", phrases.ask_name(cell), cells, str(draw.digits[0]), None)


def _count(canvas: Canvas, draw: Draw) -> Draft:
    cells = _fill(canvas, draw, draw.amount)
    return Draft("count", phrases.ask_count(), cells, str(draw.amount), None)


def _count_of(canvas: Canvas, draw: Draw) -> Draft:
    # Independent digits would nearly always give the answer 1: repeat the first one, and how
    # often is uniform.
    repeats = 1 + int(draw.spare * draw.amount)
    digit = draw.digits[0]
    digits = [digit] * repeats + [
        other if other != digit else (other + 1) % 10 for other in draw.digits[repeats:]
    ]
    cells = _fill(canvas, draw._replace(digits=digits), draw.amount)
    return Draft("count_of", phrases.ask_count_of(digit), cells, str(repeats), None)


def _list(canvas: Canvas, draw: Draw) -> Draft:
    cells = _fill(canvas, draw, draw.amount)
    read = [str(digit) for digit in cells if digit != EMPTY]
    slip = Label(cells, " ".join(read[:2])) if len(read) > 2 else None
    return Draft("list", phrases.ask_list(), cells, " ".join(read), None, slip)


def _relate(canvas: Canvas, draw: Draw) -> Draft | None:
    count = max(2, draw.amount)
    cells = _fill(canvas, draw, count)
    filled = draw.order[:count]
    asked = []
    for anchor in filled:
        if cells.count(cells[anchor]) > 1:
            continue
        at = divmod(anchor, canvas.cols)
        for relation in RELATIONS:
            there = [i for i in filled if related(relation, divmod(i, canvas.cols), at)]
            if len(there) == 1:
                asked.append((relation, cells[anchor], cells[there[0]]))
    if not asked:
        return None
    relation, digit, answer = asked[int(draw.spare * len(asked))]
    return Draft("relate", phrases.ask_relation(relation, digit), cells, str(answer), None)


def _compare(canvas: Canvas, draw: Draw) -> Draft | None:
    first, second = draw.digits[:2]
    if first == second:
        return None
    names = phrases.cell_names(canvas.rows, canvas.cols)
    prompt = phrases.ask_comparison(names[draw.order[0]], names[draw.order[1]])
    answer = "yes" if first > second else "no"
    return Draft("compare", prompt, _fill(canvas, draw, max(2, draw.amount)), answer, None)


def _sum(canvas: Canvas, draw: Draw) -> Draft:
    names = phrases.cell_names(canvas.rows, canvas.cols)
    prompt = phrases.ask_sum(names[draw.order[0]], names[draw.order[1]])
    first, second = draw.digits[:2]
    answer, cells = (
        phrases.say_sum(first, second, first + second),
        _fill(canvas, draw, max(2, draw.amount)),
    )
    carries = first + second >= 10
    slip = Label(cells, phrases.say_sum(first, second, first + second - 10)) if carries else None
    return Draft("sum", prompt, cells, answer, None, slip)


def _place(canvas: Canvas, draw: Draw) -> Draft:
    cells = _fill(canvas, draw, draw.amount)
    wanted = tuple(None if digit == EMPTY else digit for digit in cells)
    rule = LayoutRule(canvas.rows, canvas.cols, wanted)
    prompt = phrases.request(rule, draw.order[: draw.amount])
    slip = Label(_fill(canvas, draw, 1), None) if draw.amount > 1 else None
    return Draft("place", prompt, cells, None, rule, slip)


def _relate_request(canvas: Canvas, draw: Draw) -> Draft | None:
    first, second = draw.digits[:2]
    at = [divmod(cell, canvas.cols) for cell in draw.order[:2]]
    holds = [relation for relation in RELATIONS if related(relation, at[0], at[1])]
    if not holds:
        return None
    rule = RelationRule(canvas.rows, canvas.cols, first, holds[0], second)
    return Draft("relate", phrases.request(rule), _fill(canvas, draw, 2), None, rule)


def _sum_request(canvas: Canvas, draw: Draw) -> Draft:
    # Uniform in the sum, not in the digits: 0 and 18 are as frequent as 9.
    total = int(draw.spare * 19)
    low, high = max(0, total - 9), min(9, total)
    first = low + draw.digits[0] % (high - low + 1)
    rule = SumRule(total)
    cells = _fill(canvas, draw._replace(digits=[first, total - first]), 2)
    return Draft("sum", phrases.request(rule), cells, None, rule)


Builder: TypeAlias = Callable[[Canvas, Draw], Draft | None]
QUESTIONS: dict[str, Builder] = {
    "name": _name,
    "count": _count,
    "count_of": _count_of,
    "list": _list,
    "relate": _relate,
    "compare": _compare,
    "sum": _sum,
}
#: Kinds of question that have a `Draft.slip`.
SLIPPERY = frozenset(("list", "sum"))
REQUESTS: dict[str, Builder] = {
    "place": _place,
    "relate": _relate_request,
    "sum": _sum_request,
}
