"""Rules of digit drawings: what they require, and how they are written in a JSONL file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from lvrpo.data.example import Example
from lvrpo.digits.pictures import SIDE, Cell

Relation: TypeAlias = Literal["above", "below", "left of", "right of"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
_MIRRORED: dict[Relation, Relation] = {"below": "above", "right of": "left of"}


@dataclass(frozen=True)
class LayoutRule:
    """Every cell of a rows x cols canvas holds the required digit, or nothing.

    Args:
        rows: of cells, >= 1.
        cols: of cells, >= 1.
        digits: row by row, rows * cols entries; None means that the cell must be empty.
    """

    rows: int
    cols: int
    digits: tuple[Cell, ...]

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"LayoutRule: canvas is {self.rows} x {self.cols}, expected >= 1 x 1")
        if len(self.digits) != self.rows * self.cols:
            raise ValueError(
                f"LayoutRule: {len(self.digits)} digits for {self.rows} x {self.cols} cells"
            )
        for digit in self.digits:
            if digit is not None:
                _check_digit("LayoutRule", digit)

    @property
    def key(self) -> str:
        """The same for two prompts that ask for the same picture."""
        cells = "".join("." if digit is None else str(digit) for digit in self.digits)
        return f"layout {self.rows}x{self.cols} {cells}"

    def satisfied_by(self, cells: Sequence[Cell]) -> bool:
        """Every cell is as required; `cells` row by row."""
        return tuple(cells) == self.digits

    def partial(self, cells: Sequence[Cell]) -> float:
        """(right digits + share of cells rightly full or empty) / (required digits + 1)."""
        required = [digit is not None for digit in self.digits]
        right = sum(map(_same_digit, cells, self.digits))
        full = sum((cell is not None) == want for cell, want in zip(cells, required, strict=True))
        return (right + full / len(self.digits)) / (sum(required) + 1)


@dataclass(frozen=True)
class RelationRule:
    """Two digits and nothing else, the first `relation` the second in the same column or row."""

    rows: int
    cols: int
    first: int
    relation: Relation
    second: int

    def __post_init__(self) -> None:
        _check_digit("RelationRule", self.first)
        _check_digit("RelationRule", self.second)
        if self.relation not in RELATIONS:
            raise ValueError(f"RelationRule: relation is {self.relation!r}, expected {RELATIONS}")

    @property
    def key(self) -> str:
        """The same for "a 3 above a 7" and "a 7 below a 3"."""
        first, relation, second = self.first, self.relation, self.second
        if relation in _MIRRORED:
            first, relation, second = second, _MIRRORED[relation], first
        return f"relation {first} {relation} {second}"

    def satisfied_by(self, cells: Sequence[Cell]) -> bool:
        """Exactly the two digits are there, and the relation holds."""
        return self.partial(cells) == 1.0

    def partial(self, cells: Sequence[Cell]) -> float:
        """Mean of: two digits drawn, each of them the right one, the relation holds."""
        drawn = [digit for digit in cells if digit is not None]
        left_over = list(drawn)
        right = 0
        for digit in (self.first, self.second):
            if digit in left_over:
                left_over.remove(digit)
                right += 1
        return ((len(drawn) == 2) + right + self._holds(cells)) / 4

    def _holds(self, cells: Sequence[Cell]) -> bool:
        at_first = [divmod(i, self.cols) for i, digit in enumerate(cells) if digit == self.first]
        at_second = [divmod(i, self.cols) for i, digit in enumerate(cells) if digit == self.second]
        return any(related(self.relation, a, b) for a in at_first for b in at_second)


@dataclass(frozen=True)
class SumRule:
    """`count` digits, anywhere, that add up to `total`."""

    total: int
    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.total <= 9 * self.count:
            raise ValueError(f"SumRule: no {self.count} digits sum to {self.total}")

    @property
    def key(self) -> str:
        """The same for two prompts that ask for the same sum."""
        return f"sum {self.count} {self.total}"

    def satisfied_by(self, cells: Sequence[Cell]) -> bool:
        """As many digits as asked for, and the right sum."""
        return self.partial(cells) == 1.0

    def partial(self, cells: Sequence[Cell]) -> float:
        """Mean of: the number of digits is right, and how near the sum is (9 off is zero)."""
        drawn = [digit for digit in cells if digit is not None]
        near = max(0.0, 1.0 - abs(sum(drawn) - self.total) / 9)
        return ((len(drawn) == self.count) + near) / 2


DigitRule: TypeAlias = LayoutRule | RelationRule | SumRule
_RULES: dict[str, type[LayoutRule] | type[RelationRule] | type[SumRule]] = {
    "layout": LayoutRule,
    "relation": RelationRule,
    "sum": SumRule,
}


def digit_rule(example: Example) -> DigitRule | None:
    """The rule of an example, which may have none.

    Raises:
        ValueError: it has one that is not of digits.
    """
    rule = example.rule
    if rule is None or isinstance(rule, DigitRule):
        return rule
    raise ValueError(
        f"rule of {example.uid!r} is a {type(rule).__name__}, expected a rule of digit drawings"
    )


def related(relation: Relation, first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether (row, column) `first` is `relation` `second`, in the same column or row."""
    relation, first, second = (
        (_MIRRORED[relation], second, first) if relation in _MIRRORED else (relation, first, second)
    )
    if relation == "above":
        return first[1] == second[1] and first[0] < second[0]
    return first[0] == second[0] and first[1] < second[1]


def rule_to_json(rule: DigitRule) -> dict[str, Any]:
    """A rule as plain JSON data: {"kind": "layout", "rows": 2, "cols": 2, "digits": [3, ...]}."""
    kind = next(name for name, cls in _RULES.items() if isinstance(rule, cls))
    values = asdict(rule)
    return {"kind": kind} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def rule_from_json(data: Mapping[str, Any]) -> DigitRule:
    """The inverse of `rule_to_json`.

    Raises:
        ValueError: an unknown kind, a missing or unknown entry, or a value the rule refuses.
    """
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _RULES:
        raise ValueError(f"rule kind is {kind!r}, expected one of {', '.join(_RULES)}")
    cls = _RULES[kind]
    names = {field.name for field in fields(cls)}
    given = {name: value for name, value in data.items() if name != "kind"}
    if set(given) - names:
        raise ValueError(f"{kind} rule has no entry {min(set(given) - names)!r}")
    missing = {"total"} - set(given) if cls is SumRule else names - set(given)
    if missing:
        raise ValueError(f"{kind} rule lacks {min(missing)!r}")
    for name, value in given.items():
        _check_entry(kind, name, value)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return cls(**given)


def parse_rule(data: Mapping[str, Any], picture_shape: tuple[int, int, int]) -> DigitRule:
    """The rule of a JSONL line, for drawings of [C, H, W] pixels.

    Raises:
        ValueError: as `rule_from_json`, or a layout is for another canvas.
    """
    rule = rule_from_json(data)
    height, width = picture_shape[1:]
    if isinstance(rule, LayoutRule) and (rule.rows * SIDE, rule.cols * SIDE) != (height, width):
        raise ValueError(
            f"is for {rule.rows} x {rule.cols} cells of {SIDE} pixels, the model draws "
            f"{height} x {width}"
        )
    return rule


def _check_entry(kind: str, name: str, value: Any) -> None:
    if name == "digits":
        fits = isinstance(value, list) and all(v is None or type(v) is int for v in value)
        expected = "a list of digits and nulls"
    elif name == "relation":
        fits, expected = isinstance(value, str), "a string"
    else:
        fits, expected = type(value) is int, "an integer"
    if not fits:
        raise ValueError(f"{kind} rule: {name} is {value!r}, expected {expected}")


def _check_digit(owner: str, digit: int) -> None:
    if not 0 <= digit <= 9:
        raise ValueError(f"{owner}: {digit} is not a digit")


def _same_digit(cell: Cell, wanted: Cell) -> bool:
    return wanted is not None and cell == wanted
