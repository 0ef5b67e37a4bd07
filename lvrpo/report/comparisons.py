"""Rates and rewards before and after: from a run's measurements, or from the counts in evals.jsonl.

Measurements are of the same prompts, so their changes are paired. What only evals.jsonl has, the
scores of runs that are older and tasks of the user's own, is compared as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lvrpo.data.example import SKILLS, Skill
from lvrpo.intervals import Change, Mean, compare_means, compare_rates, wilson_interval
from lvrpo.report.summary import AFTER, BEFORE, Run
from lvrpo.runs.log import Row
from lvrpo.runs.results import (
    REWARD,
    PromptScores,
    Rate,
    best_scores,
    mean_scores,
    paired,
    pass_scores,
)
from lvrpo.runs.scores import Score, eval_rewards, eval_scores
from lvrpo.trainer.measurement import (
    AS_CONFIGURED,
    AS_TRAINED,
    GREEDY,
    HEADLINE,
    LOW_NOISE,
    Measurement,
)

#: How measures are written, in the order of a table.
MEASURES = {
    "greedy": "right, greedy answers",
    "low_noise": "right, low-noise drawings",
    "correct": "right answers",
    "strict": "whole request right",
    "right": "right",
    "gold": "right for the gold judge",
    "partial": "share of the request that is right",
}
#: How ways of sampling are written.
SAMPLINGS = {
    GREEDY: "greedy answers",
    LOW_NOISE: "low-noise drawings",
    AS_TRAINED: "samples as trained",
    AS_CONFIGURED: "samples of [eval]",
}
_Pair = tuple[Measurement, Measurement]


def verdict_of(change: Change) -> tuple[str, str]:
    """(style, words): what the intervals allow one to say."""
    if math.isnan(change.interval.low):
        return "unclear", "too few prompts to say"
    if not change.excludes_zero:
        return "unclear", "no clear change: the interval includes zero"
    style, word = ("better", "Better") if change.difference > 0 else ("worse", "Worse")
    if change.apart:
        return style, f"{word}: the intervals before and after are apart"
    return style, f"{word}, though the intervals before and after overlap"


@dataclass(frozen=True)
class Comparison:
    """One rate before and after.

    Attributes:
        task: "understand", "generate", or a task of the user's.
        kind: the kind of prompt, "" for all of them.
        measure: its name, the same in every run.
        title: its row label.
        headline: whether it is what a run is judged by first.
        main: whether it stands beside other runs.
        before: of the first evaluation.
        after: of the last one.
        change: after - before.
        prompts: what it is the change of, where that is known by prompt.
    """

    task: str
    kind: str
    measure: str
    title: str
    headline: bool
    main: bool
    before: Rate
    after: Rate
    change: Change
    prompts: tuple[PromptScores, PromptScores] | None = None

    @property
    def name(self) -> str:
        """The same in every run."""
        return "/".join(part for part in (self.task, self.kind, self.measure) if part)

    @property
    def verdict(self) -> tuple[str, str]:
        """(style, words), see `verdict_of`."""
        return verdict_of(self.change)


@dataclass(frozen=True)
class RewardComparison:
    """The held-out mean of one reward before and after."""

    task: str
    name: str
    before: Mean
    after: Mean
    change: Change

    @property
    def title(self) -> str:
        """Its row label: a reward of the user's own may be named by a path."""
        return self.name.rpartition("/")[2]

    @property
    def verdict(self) -> tuple[str, str]:
        """(style, words), see `verdict_of`."""
        return verdict_of(self.change)


def compare(run: Run) -> list[Comparison]:
    """Every rate that both evaluations of a run have, by task, the most telling first."""
    measured = [each for skill in SKILLS for each in compare_measurements(run, skill)]
    skills = {each.task for each in measured}
    return measured + [
        each for each in compare_scores(*run.before_after()) if each.task not in skills
    ]


def compare_measurements(run: Run, skill: Skill) -> list[Comparison]:
    """The mode of the policy, then its samples, the best of several, and kind by kind."""
    mode = _before_after(run, skill, HEADLINE[skill], 0)
    sampled = _before_after(run, skill, AS_TRAINED, 0)
    several = _before_after(run, skill, AS_TRAINED, -1)
    found: list[Comparison | None] = []
    for pair in (mode, sampled):
        found += [_by_measure(pair, measure) for measure in ("right", "gold", "partial") if pair]
    found += _of_several(several) if several else []
    for pair in (mode, sampled):
        found += _by_kind(pair) if pair else []
    return [each for each in found if each is not None]


def _before_after(run: Run, skill: Skill, sampling: str, place: int) -> _Pair | None:
    before, after = (run.measured(label, skill, sampling) for label in (BEFORE, AFTER))
    return (before[place], after[place]) if before and after else None


def _by_measure(pair: _Pair, measure: str) -> Comparison | None:
    sampling, is_right = pair[1].sampling, measure == "right"
    return _compared(
        pair,
        lambda each: mean_scores(each, measure),
        measure=f"{sampling}/{measure}",
        title=f"{SAMPLINGS[sampling]}{' ' if is_right else ', '}{MEASURES[measure]}",
        headline=is_right and sampling == HEADLINE[pair[1].skill],
        main=is_right,
    )


def _of_several(pair: _Pair) -> list[Comparison | None]:
    k = min(each.group_size for each in pair)
    if k < 2:
        return []
    best = [
        _compared(
            pair,
            partial(best_scores, k=k, measure=measure),
            measure=f"best of {k}/{measure}",
            title=f"best of {k} by the reward, {MEASURES[measure]}",
        )
        for measure in ("right", "gold")
    ]
    passed = _compared(
        pair,
        partial(pass_scores, k=k),
        measure=f"pass@{k}",
        title=f"one of {k} samples right",
        main=True,
    )
    return [passed, *best]


def _by_kind(pair: _Pair) -> list[Comparison | None]:
    kinds = dict.fromkeys(pair[1].kinds)
    if len(kinds) < 2:
        return []
    return [
        _compared(
            pair,
            partial(mean_scores, kind=kind),
            kind=kind,
            measure=f"{pair[1].sampling}/right",
            title=f"{kind}: {SAMPLINGS[pair[1].sampling]}",
        )
        for kind in kinds
    ]


def _compared(
    pair: _Pair,
    score: Callable[[Measurement], PromptScores],
    *,
    measure: str,
    title: str,
    kind: str = "",
    headline: bool = False,
    main: bool = False,
) -> Comparison | None:
    """Over the prompts that both have; None where there is none."""
    before, after = (score(each) for each in pair)
    before, after = before.only(after.values), after.only(before.values)
    rates, change = (before.rate(), after.rate()), paired(before, after)
    if rates[0] is None or rates[1] is None or change is None:
        return None
    task = pair[1].skill
    return Comparison(
        task, kind, measure, title, headline, main, rates[0], rates[1], change, (before, after)
    )


def compare_scores(before: Row | None, after: Row | None) -> list[Comparison]:
    """Every rate of two rows of evals.jsonl, by task, each task's headline first, then by kind."""
    if before is None or after is None:
        return []
    old = {score.name: score for score in eval_scores(before) if score.total}
    found = [
        _of_scores(old[new.name], new)
        for new in eval_scores(after)
        if new.name in old and new.total
    ]
    tasks = [each.task for each in found]
    order = list(MEASURES)
    return sorted(
        found,
        key=lambda each: (
            tasks.index(each.task),
            bool(each.kind),
            each.kind,
            order.index(each.measure) if each.measure in order else len(order),
        ),
    )


def compare_rewards(run: Run) -> list[RewardComparison]:
    """Every reward both evaluations of a run have a mean of, by task; paired where they can be."""
    before, after = run.before_after()
    if before is None or after is None:
        return []
    old, new = eval_rewards(before), eval_rewards(after)
    found = []
    for (task, name), mean in new.items():
        if (task, name) in old:
            was = old[task, name]
            change = _paired_reward(run, task, name) or compare_means(was, mean)
            found.append(RewardComparison(task, name, was, mean, change))
    tasks = [each.task for each in found]
    return sorted(found, key=lambda each: tasks.index(each.task))


def _paired_reward(run: Run, task: str, name: str) -> Change | None:
    for skill in SKILLS:
        pair = _before_after(run, skill, AS_TRAINED, 0)
        if skill == task and pair is not None:
            return paired(*(mean_scores(each, f"{REWARD}/{name}") for each in pair))
    return None


def rate_of(score: Score) -> Rate:
    """A count of evals.jsonl with Wilson's interval: every output is one prompt."""
    interval = wilson_interval(score.successes, score.total)
    return Rate(score.successes / score.total, *interval, score.total, score.total)


def _of_scores(before: Score, after: Score) -> Comparison:
    measure = MEASURES.get(after.measure, after.measure)
    return Comparison(
        after.task,
        after.kind,
        after.measure,
        title=f"{after.kind}: {measure}" if after.kind else measure,
        headline=not after.kind,
        main=not after.kind,
        before=rate_of(before),
        after=rate_of(after),
        change=compare_rates((before.successes, before.total), (after.successes, after.total)),
    )
