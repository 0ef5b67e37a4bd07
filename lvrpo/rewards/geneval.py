"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): is everything there that a prompt asks for.

The published prompts, `evaluation_metadata.jsonl`, are drawing prompts as they are: the columns
"include" and "exclude" say what a drawing must show. Objects are found by a detector of yours;
what counts as found, and all further rules, are those of the published evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.boxes import Box, box_iou
from lvrpo.rewards.reward import Samples

Relation: TypeAlias = Literal["left of", "right of", "above", "below"]
_RELATIONS: tuple[Relation, ...] = get_args(Relation)


class Detection(NamedTuple):
    """One object that a detector found.

    Attributes:
        box: in pixels of the drawing; its label is the object's class.
        confidence: in [0, 1].
        mask: [H, W] bool of the object's own pixels; None where the detector has none.
    """

    box: Box
    confidence: float
    mask: Tensor | None = None


#: [N, C, H, W] in [0, 1] to what is found in each drawing, in any order and of any class.
Detector: TypeAlias = Callable[[Tensor], Sequence[Sequence[Detection]]]
#: ([C, H, W] in [0, 1], objects of one class in it) to the colour of each.
ColorClassifier: TypeAlias = Callable[[Tensor, Sequence[Detection]], Sequence[str]]


@dataclass(frozen=True)
class Clause:
    """So many objects of a class.

    Args:
        name: of the class.
        count: least number to include, or first number that is too many to exclude.
        color: that as many of them must have; empty for any.
        relation: where each of them is; None for anywhere.
        target: index of the clause whose objects it is relative to.
    """

    name: str
    count: int
    color: str = ""
    relation: Relation | None = None
    target: int = 0


@dataclass(frozen=True)
class GenevalRule:
    """What a drawing must show and must not.

    Args:
        include: all of them.
        exclude: none of them.
        tag: the kind of prompt; "counting" asks for surer detections.
    """

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    tag: str = ""


def geneval_rule(example: Example) -> GenevalRule | None:
    """The rule of a line of the published file; None of any other example.

    Raises:
        ValueError: the line has another form.
    """
    extra = example.extra
    if "include" not in extra:
        return None
    include = _clauses(example, "include")
    if not include:
        raise ValueError(f"include of {example.uid!r} is empty, expected at least one object")
    exclude = _clauses(example, "exclude") if extra.get("exclude") is not None else ()
    return GenevalRule(include, exclude, str(extra.get("tag", "")))


def _clauses(example: Example, column: str) -> tuple[Clause, ...]:
    given: Any = example.extra[column]
    if not isinstance(given, list):
        raise ValueError(f"{column} of {example.uid!r} is {given!r}, expected a list of objects")
    found = []
    for at, each in enumerate(given):
        where = f"{column}[{at}] of {example.uid!r}"
        if not isinstance(each, Mapping) or not {"class", "count"} <= set(each):
            raise ValueError(f"{where} is {each!r}, expected an object with 'class' and 'count'")
        count = each["count"]
        if type(count) is not int or count < 1:
            raise ValueError(f"{where}: count is {count!r}, expected an integer >= 1")
        relation, target = each.get("position") or (None, 0)
        if relation is not None and relation not in _RELATIONS:
            raise ValueError(f"{where}: position is {relation!r}, expected one of {_RELATIONS}")
        if relation is not None and not (type(target) is int and 0 <= target < at):
            raise ValueError(f"{where}: position is relative to {target!r}, expected 0 to {at - 1}")
        color = str(each.get("color", ""))
        found.append(Clause(str(each["class"]), count, color, relation, target))
    return tuple(found)


@dataclass(frozen=True)
class Thresholds:
    """The published settings.

    Args:
        confidence: a detection is surer than that.
        counting: the same for prompts with the tag "counting".
        most: objects of a class that are looked at, the surest first.
        overlap: intersection over union from which on the less sure of two of a class is dropped;
            1 drops none.
        margin: a displacement counts beyond this share of the sum of both objects' sizes.
    """

    confidence: float = 0.3
    counting: float = 0.9
    most: int = 16
    overlap: float = 1.0
    margin: float = 0.1


def kept_objects(
    found: Sequence[Detection], rule: GenevalRule, thresholds: Thresholds
) -> dict[str, list[Detection]]:
    """The detections that count, by class, the surest first."""
    least = thresholds.counting if rule.tag == "counting" else thresholds.confidence
    by_class: dict[str, list[Detection]] = {}
    for each in sorted(found, key=lambda detection: -detection.confidence):
        of_class = by_class.setdefault(each.box.label, [])
        if each.confidence > least and len(of_class) < thresholds.most:
            of_class.append(each)
    if thresholds.overlap == 1:
        return by_class
    kept: dict[str, list[Detection]] = {}
    for name, of_class in by_class.items():
        alone: list[Detection] = []
        for each in of_class:
            overlaps = box_iou([each.box], [other.box for other in alone], pixel=1.0)
            if not (overlaps >= thresholds.overlap).any():
                alone.append(each)
        kept[name] = alone
    return kept


def relations(first: Box, second: Box, margin: float = 0.1) -> set[Relation]:
    """Where the first box is, seen from the second; y grows downwards.

    The displacement of the centres counts beyond `margin` times the sum of both sizes, along each
    axis; an axis counts where it has more than half of the distance between the centres.
    """
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (first[low] + first[high] - second[low] - second[high]) / 2  # type: ignore[operator]
        sizes = abs(first[high] - first[low]) + abs(second[high] - second[low])  # type: ignore[operator]
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - margin * sizes, 0.0), offset))
    if max(map(abs, beyond)) < 1e-3:
        return set()
    dx, dy = (each / math.hypot(*offsets) for each in beyond)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation in _RELATIONS if tests[relation]}


def check_drawing(
    image: Tensor,
    objects: Mapping[str, Sequence[Detection]],
    rule: GenevalRule,
    *,
    classify_colors: ColorClassifier | None = None,
    margin: float = 0.1,
) -> list[bool]:
    """Which clauses of a rule a drawing meets: those to include, then those to exclude.

    Of each class the surest objects, as many as asked for, have to have the colour and to be in
    relation to all of the target clause's, which has to be met itself.

    Args:
        image: [C, H, W] in [0, 1], for the colours.
        objects: by class, see `kept_objects`.
        rule: of the prompt.
        classify_colors: needed where the rule names a colour.
        margin: see `relations`.

    Raises:
        ValueError: the rule names a colour, and there is no classifier.
    """
    met: list[bool] = []
    groups: list[Sequence[Detection]] = []
    for clause in rule.include:
        group = objects.get(clause.name, ())[: clause.count]
        is_met = len(group) == clause.count
        if is_met and clause.color:
            if classify_colors is None:
                raise ValueError(
                    f"a prompt asks for {clause.color} {clause.name}, and GenevalReward has no "
                    "classify_colors"
                )
            is_met = list(classify_colors(image, group)).count(clause.color) >= clause.count
        if is_met and clause.relation is not None:
            is_met = met[clause.target] and all(
                clause.relation in relations(each.box, other.box, margin)
                for each in group
                for other in groups[clause.target]
            )
        met.append(is_met)
        groups.append(group)
    return met + [len(objects.get(each.name, ())) < each.count for each in rule.exclude]


@dataclass(frozen=True)
class GenevalReward:
    """strict_weight * (all clauses are met) + (1 - strict_weight) * (share of those that are).

    Args:
        detect: finds the objects; its labels are the classes of the prompts.
        classify_colors: tells the colours of objects, needed where prompts name some.
        strict_weight: 1 is GenEval's own score.
        thresholds: of what counts as found.
    """

    detect: Detector
    classify_colors: ColorClassifier | None = None
    strict_weight: float = 1.0
    thresholds: Thresholds = field(default_factory=Thresholds)
    name: ClassVar[str] = "geneval"
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.strict_weight <= 1:
            raise ValueError(
                f"GenevalReward: strict_weight is {self.strict_weight}, expected 0 to 1"
            )

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN for texts and for drawings without such a rule.

        Raises:
            ValueError: a rule has another form, or the detector returns another number of lists.
        """
        scores = torch.full((len(samples),), math.nan)
        rules = [(at, geneval_rule(samples.examples[at])) for at in samples.image_index]
        drawn = [n for n, (_, rule) in enumerate(rules) if rule is not None]
        if samples.images is None or not drawn:
            return scores
        images = samples.images[drawn]
        found = self.detect(images)
        if len(found) != len(drawn):
            raise ValueError(f"the detector returned {len(found)} lists for {len(drawn)} drawings")
        for image, detections, n in zip(images, found, drawn, strict=True):
            at, rule = rules[n]
            assert rule is not None
            met = check_drawing(
                image,
                kept_objects(detections, rule, self.thresholds),
                rule,
                classify_colors=self.classify_colors,
                margin=self.thresholds.margin,
            )
            w = self.strict_weight
            scores[at] = w * all(met) + (1 - w) * sum(met) / len(met)
        return scores
