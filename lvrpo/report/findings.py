"""What a run's numbers show beyond before and after, and what they cannot: sentences of its page.

Each finding is about one objection to a gain: that it is sharpening, which a lower temperature
gives for nothing; that it costs diversity; that it is the judge that was fooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lvrpo.data.example import SKILLS, Skill
from lvrpo.intervals import Change
from lvrpo.report.comparisons import SAMPLINGS, Comparison, verdict_of
from lvrpo.report.html import percent, points
from lvrpo.report.summary import AFTER, BEFORE, Alarm, Run, in_phase, task_name
from lvrpo.runs.results import (
    GAP_MARGIN,
    FrontierPoint,
    as_sharp_as,
    at_equal_diversity,
    frontier,
    gap_growth,
    gold_gap,
    paired,
)
from lvrpo.trainer.measurement import AS_TRAINED, HEADLINE

#: What `FrontierPoint.sharpness` is.
SHARPNESS: dict[Skill, str] = {"understand": "temperature", "generate": "starting noise"}


@dataclass(frozen=True)
class Finding:
    """One paragraph of the page.

    Attributes:
        heading: what it is about.
        text: with its numbers.
        style: "better", "worse" or "unclear" where it is a verdict, else "".
    """

    heading: str
    text: str
    style: str = ""


def findings(run: Run) -> list[Finding]:
    """Of every skill that was measured before and after, then of the updates."""
    found: list[Finding | None] = []
    for skill in SKILLS:
        before, after = (frontier(run.measurements, label, skill) for label in (BEFORE, AFTER))
        trained = next((point for point in after if point.sampling == AS_TRAINED), None)
        if before and trained:
            found += [_sharpening(skill, before, trained), _diversity(skill, before, trained)]
        found += [_gold(run, skill, sampling) for sampling in (HEADLINE[skill], AS_TRAINED)]
    return [each for each in (*found, _clipped(run)) if each is not None]


def hacking_alarms(run: Run) -> list[Alarm]:
    """One for every sampling whose gap to the gold judge grew by more than the margin."""
    return [
        Alarm(
            f"reward hacking: {SAMPLINGS[sampling]} of {skill!r} gained "
            f"{points(growth.difference)} points (at least {points(growth.interval.low)}) for the "
            "judge that the rewards see over what they gained for the gold judge",
            [run.measured(AFTER, skill, sampling)[0].step],
        )
        for skill in SKILLS
        for sampling in (HEADLINE[skill], AS_TRAINED)
        if (growth := _growth(run, skill, sampling)) and growth.interval.low > GAP_MARGIN
    ]


def limits(run: Run, others: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    """What cannot be known from this page, and what would tell."""
    said = []
    if not run.measurements:
        said.append(
            "Whether a gain is more than sharpening: samples at the temperature and noise of the "
            "training alone were counted (there is no measurements.jsonl), and greedy decoding "
            "may have given as much without any training."
        )
    if not any(other.signal == run.signal for other in others):
        said.append(
            "How far another seed would have led: the intervals tell of the choice of prompts, "
            "not of the run. Further seeds can stand beside this one (--compare)."
        )
    if not any(each.supervised for each in (run, *others)):
        said.append(
            "Whether more supervised steps would have done as much: no supervised continuation "
            "of equal compute stands beside this run."
        )
    if not any(each.shuffled for each in (run, *others)):
        said.append(
            "What the same steps do without a signal: no control with shuffled rewards stands "
            "beside this run."
        )
    if len(comparisons) > 1:
        said.append(
            f"Which of the {len(comparisons)} changes above is chance: of changes that are none, "
            "one in twenty has an interval without zero. The headline was chosen beforehand, the "
            "rest were not."
        )
    if run.measurements:
        said.append(
            "What lies between the settings of a frontier, which is drawn as straight lines, and "
            "what more samples than were drawn would find."
        )
    said.append(
        "What the model does with prompts of other kinds: those held out are drawn as those "
        "trained on are. And whatever all judges here get wrong."
    )
    return said


def _sharpening(skill: Skill, before: Sequence[FrontierPoint], trained: FrontierPoint) -> Finding:
    accuracy = trained.scores.mean
    same, setting = as_sharp_as(before, accuracy), SHARPNESS[skill]
    known = [point for point in before if point.sharpness is not None]
    start = (
        f"Sampled as trained, the trained policy is right on {percent(accuracy)} of the "
        f"{len(trained.scores.values)} prompts of the frontier. "
    )
    if same is not None:
        text = (
            f"The warm start is as right at {setting} {same:.2g}: sampling it so gives as much "
            "without any training."
        )
    elif not known:
        text = f"The warm start was not measured at any other {setting}."
    elif accuracy > max(point.scores.mean for point in known):
        best = max(known, key=lambda point: point.scores.mean)
        over = paired(best.scores, trained.scores)
        assert over is not None
        words = (
            "sharpening alone does not explain it"
            if over.interval.low > 0
            else "chance may explain it"
        )
        text = (
            f"The warm start is so at no {setting}: its best is {percent(best.scores.mean)}, at "
            f"{best.sharpness:.2g}. What it lacks is {_with_interval(over)}: {words}."
        )
    else:
        text = f"The warm start is more right at every {setting} that was measured."
    return Finding(f"{task_name(skill)}: as sharp as", start + text)


def _diversity(
    skill: Skill, before: Sequence[FrontierPoint], trained: FrontierPoint
) -> Finding | None:
    change = at_equal_diversity(before, trained)
    heading = f"{task_name(skill)}: at equal diversity"
    start = f"The trained policy's samples have a diversity of {trained.diversity:.3g}. "
    if change is None:
        low, high = before[0].diversity, before[-1].diversity
        text = f"The warm start was measured from {low:.3g} to {high:.3g} alone."
        return Finding(heading, start + text)
    style, words = verdict_of(change)
    accuracy = trained.scores.mean
    text = (
        f"There the warm start is right on {percent(accuracy - change.difference)} and the trained "
        f"policy on {percent(accuracy)}: {_with_interval(change)}; {words}."
    )
    return Finding(heading, start + text, style)


def _growth(run: Run, skill: Skill, sampling: str) -> Change | None:
    before, after = (run.measured(label, skill, sampling) for label in (BEFORE, AFTER))
    return gap_growth(before[0], after[0]) if before and after else None


def _gold(run: Run, skill: Skill, sampling: str) -> Finding | None:
    growth = _growth(run, skill, sampling)
    if growth is None:
        return None
    before, after = (gold_gap(run.measured(label, skill, sampling)[0]) for label in (BEFORE, AFTER))
    assert before is not None
    assert after is not None
    alarming = growth.interval.low > GAP_MARGIN
    verdict = "ALARM: the rewards are being gamed" if alarming else "no alarm"
    text = (
        f"The judge that the rewards see finds {points(before.difference)} points more right than "
        f"the gold judge before, {points(after.difference)} after; the gap grew by "
        f"{_with_interval(growth)}: {verdict} (raised above {points(GAP_MARGIN)})."
    )
    heading = f"{task_name(skill)}, {SAMPLINGS[sampling]}: judge against gold"
    return Finding(heading, text, "worse" if alarming else "")


def _clipped(run: Run) -> Finding | None:
    rows = in_phase(run.metrics, "grpo")
    shares = {
        what: fmean(values)
        for key, what in (("clip/text", "text terms"), ("clip/image", "image steps"))
        if (values := [row[key] for row in rows if math.isfinite(row.get(key, math.nan))])
    }
    if not shares:
        return None
    said = ", ".join(f"{percent(share)} of {what}" for what, share in shares.items())
    idle = "" if any(shares.values()) else " The clip range never bound: it changed nothing."
    return Finding("Clipped", f"{said}, mean over the steps of the policy phase.{idle}")


def _with_interval(change: Change) -> str:
    low, high = change.interval
    return f"{points(change.difference)} points ({points(low)} to {points(high)})"
