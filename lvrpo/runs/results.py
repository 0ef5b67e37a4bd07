"""What measurements say: rates with their intervals, pass@k, paired changes, frontiers.

Every result is made of one number per prompt, `PromptScores`: its share of right samples, the
chance that one of k is right, whether the one that a reward would choose is. A rate is their mean,
a change the mean of the differences of the same prompts; intervals take the prompts of a cluster
(`Measurement.clusters`) as what belongs together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb, isnan, nan
from statistics import fmean, stdev
from typing import Generic, TypeVar

from lvrpo.data.example import Skill
from lvrpo.intervals import Change, Interval, clustered_mean, clustered_rate, compare_pairs
from lvrpo.trainer.measurement import HEADLINE, Measurement

#: The one measure that has no bounds, as its parts "reward/<name>"; all others are in [0, 1].
REWARD = "reward"
#: Growth of the gap between judge and gold that raises the alarm of reward hacking, as a share.
GAP_MARGIN = 0.02

#: The samples of one prompt to one number; None where they tell nothing.
_Statistic = Callable[[Mapping[str, Sequence[float | None]]], float | None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rate:
    """A mean over prompts and its 95 % interval.

    Attributes:
        value: the mean, in [0, 1] but for rewards.
        low: lower end of the interval.
        high: upper end.
        prompts: that it is a mean of.
        samples: that these have together.
    """

    value: float
    low: float
    high: float
    prompts: int
    samples: int


@dataclass(frozen=True)
class PromptScores:
    """One number per prompt; prompts of which nothing is known are left out.

    Attributes:
        values: by uid.
        clusters: by uid, equal for prompts that are not independent.
        samples: of each prompt.
        bounded: whether the values are in [0, 1].
    """

    values: Mapping[str, float]
    clusters: Mapping[str, str]
    samples: int = 1
    bounded: bool = True

    @property
    def mean(self) -> float:
        """Over the prompts; NaN where there is none."""
        return fmean(self.values.values()) if self.values else nan

    def rate(self) -> Rate | None:
        """With its interval; None where there is no prompt."""
        if not self.values:
            return None
        values, clusters = list(self.values.values()), [self.clusters[uid] for uid in self.values]
        if self.bounded:
            interval = clustered_rate(values, clusters)
        else:
            interval = clustered_mean(values, clusters).interval()
        return Rate(self.mean, *interval, len(values), len(values) * self.samples)

    def only(self, uids: Iterable[str]) -> PromptScores:
        """Of these prompts, in this order."""
        values = {uid: self.values[uid] for uid in uids if uid in self.values}
        return dataclasses.replace(self, values=values)


def mean_scores(
    measurement: Measurement, measure: str = "right", kind: str | None = None
) -> PromptScores:
    """The mean over each prompt's samples.

    Args:
        measurement: of P prompts.
        measure: a key of its scores; one that it lacks is known of no prompt.
        kind: of the prompts to take; None: all.
    """

    def mean(scores: Mapping[str, Sequence[float | None]]) -> float | None:
        known = _known(scores.get(measure, ()))
        return fmean(known) if known else None

    scores = _by_prompt(measurement, mean, kind)
    return dataclasses.replace(scores, bounded=measure.partition("/")[0] != REWARD)


def pass_scores(measurement: Measurement, k: int, kind: str | None = None) -> PromptScores:
    """The chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) of c right among n.

    Chen et al. (2021), arXiv 2107.03374: unbiased for every n >= k. Prompts with fewer than k
    samples that are judged are left out.

    Raises:
        ValueError: k is not in [1, group_size].
    """
    _require_group(measurement, k, "pass@k")

    def passed(scores: Mapping[str, Sequence[float | None]]) -> float | None:
        known = _known(scores["right"])
        n, wrong = len(known), sum(score < 1 for score in known)
        return 1 - comb(wrong, k) / comb(n, k) if n >= k else None

    return _by_prompt(measurement, passed, kind)


def best_scores(
    measurement: Measurement, k: int, measure: str = "right", kind: str | None = None
) -> PromptScores:
    """The score of the one sample among the first k that the reward is highest of.

    Where several are, as with answers that are the same, the mean of theirs: one of them is drawn.
    Prompts without a reward, or without the score of a chosen sample, are left out.

    Raises:
        ValueError: k is not in [1, group_size].
    """
    _require_group(measurement, k, "best of k")

    def best(scores: Mapping[str, Sequence[float | None]]) -> float | None:
        pairs = zip(scores.get(REWARD, ())[:k], scores.get(measure, ())[:k], strict=True)
        rewarded = [(reward, score) for reward, score in pairs if reward is not None]
        highest = max((reward for reward, _ in rewarded), default=nan)
        chosen = [score for reward, score in rewarded if reward == highest]
        known = _known(chosen)
        return fmean(known) if known and len(known) == len(chosen) else None

    if REWARD not in measurement.scores or measure not in measurement.scores:
        return PromptScores({}, {})
    return _by_prompt(measurement, best, kind)


def rate(measurement: Measurement, measure: str = "right", kind: str | None = None) -> Rate | None:
    """The mean of a measure with its clustered interval; None where no sample has it."""
    return mean_scores(measurement, measure, kind).rate()


def pass_at_k(measurement: Measurement, k: int, kind: str | None = None) -> Rate | None:
    """pass@k with its clustered interval, see `pass_scores`; None where nothing is judged."""
    return pass_scores(measurement, k, kind).rate()


def best_of(measurement: Measurement, k: int, kind: str | None = None) -> dict[str, Rate]:
    """Best of k by the reward, see `best_scores`, judged by "right" and, where there is one, by
    "gold"; empty where there is no reward."""
    found = {each: best_scores(measurement, k, each, kind).rate() for each in ("right", "gold")}
    return {measure: rate for measure, rate in found.items() if rate is not None}


def change(
    before: Measurement, after: Measurement, measure: str = "right", kind: str | None = None
) -> Change | None:
    """after - before over the prompts that both have, see `paired`; None where there is none."""
    return paired(mean_scores(before, measure, kind), mean_scores(after, measure, kind))


def paired(before: PromptScores, after: PromptScores) -> Change | None:
    """after - before, prompt by prompt, with its clustered interval (`compare_pairs`).

    None where no prompt has both.
    """
    shared = [uid for uid in after.values if uid in before.values]
    if not shared:
        return None
    return compare_pairs(
        [before.values[uid] for uid in shared],
        [after.values[uid] for uid in shared],
        [after.clusters[uid] for uid in shared],
        bounded=before.bounded and after.bounded,
    )


@dataclass(frozen=True)
class FrontierPoint:
    """How right and how diverse the samples of one way of sampling are.

    Attributes:
        sampling: its name.
        sharpness: what makes samples less diverse as it falls: the temperature of answers, the
            starting noise of drawings by the ODE; None for drawings by any other dynamics.
        scores: share of right samples, by prompt.
        diversity: mean over the prompts, see `Measurement.diversity`.
    """

    sampling: str
    sharpness: float | None
    scores: PromptScores
    diversity: float

    @property
    def accuracy(self) -> Rate:
        """Share of right samples."""
        found = self.scores.rate()
        assert found is not None
        return found


def frontier(measurements: Iterable[Measurement], label: str, skill: Skill) -> list[FrontierPoint]:
    """Accuracy against diversity under one label, by rising diversity.

    A point is a measurement that tells of diversity, or that of the mode, whose samples are all
    equal. All are of the same prompts: those that every point has judged.
    """
    found: dict[str, tuple[Measurement, PromptScores]] = {}
    for each in measurements:
        is_mode = each.sampling == HEADLINE[skill]
        if each.label == label and each.skill == skill and (each.diversity or is_mode):
            scores = mean_scores(each)
            if scores.values:
                found[each.sampling] = each, scores
    pools = [set(scores.values) for _, scores in found.values()]
    shared = set.intersection(*pools) if pools else set()
    if not shared:
        return []
    points = [
        FrontierPoint(
            measurement.sampling,
            _sharpness(measurement),
            scores.only(uid for uid in measurement.uids if uid in shared),
            _diversity(measurement, shared),
        )
        for measurement, scores in found.values()
    ]
    return sorted(points, key=lambda point: point.diversity)


def as_sharp_as(points: Sequence[FrontierPoint], accuracy: float) -> float | None:
    """The temperature, or starting noise, at which a frontier has this accuracy.

    Linear between neighbours; where several have it, the highest. None where none reaches it.

    Args:
        points: of the warm start, as a rule.
        accuracy: of the trained policy, sampled as trained.
    """
    found = {p.sharpness: p.scores.mean for p in points if p.sharpness is not None}
    known = sorted(found.items(), reverse=True)
    for (high, at_high), (low, at_low) in pairwise(known):
        if min(at_high, at_low) <= accuracy <= max(at_high, at_low):
            share = (accuracy - at_high) / (at_low - at_high) if at_low != at_high else 0.0
            return high + share * (low - high)
    return None


def at_equal_diversity(before: Sequence[FrontierPoint], after: FrontierPoint) -> Change | None:
    """What a point has over a frontier that is interpolated, prompt by prompt, at its diversity.

    Linear between the two neighbours in diversity, whose weights the interval takes as known.
    None where the frontier does not reach as far.

    Args:
        before: the frontier, by rising diversity.
        after: the point.
    """
    for low, high in pairwise(before):
        if low.diversity <= after.diversity <= high.diversity:
            span = high.diversity - low.diversity
            share = (after.diversity - low.diversity) / span if span else 0.0
            between = {
                uid: (1 - share) * value + share * high.scores.values[uid]
                for uid, value in low.scores.values.items()
            }
            return paired(dataclasses.replace(low.scores, values=between), after.scores)
    return None


def gold_gap(measurement: Measurement) -> Change | None:
    """Right by the judge minus right by gold, over prompts that both judge; None without gold."""
    return paired(mean_scores(measurement, "gold"), mean_scores(measurement))


def gap_growth(before: Measurement, after: Measurement) -> Change | None:
    """How much `gold_gap` grew, over the prompts that both measurements have judged both ways.

    Reward hacking, and an alarm, where the lower end of its interval is above `GAP_MARGIN`: the
    judge that the rewards see finds more improvement than one that they do not.
    """
    gaps = [_gaps(before), _gaps(after)]
    shared = [uid for uid in gaps[1] if uid in gaps[0]]
    if not shared:
        return None
    clusters = dict(zip(after.uids, after.clusters, strict=True))
    # Halved and shifted, gaps in [-1, 1] are scores in [0, 1].
    old, new = ([(gap[uid] + 1) / 2 for uid in shared] for gap in gaps)
    half, (low, high), apart = compare_pairs(old, new, [clusters[uid] for uid in shared])
    return Change(2 * half, Interval(2 * low, 2 * high), apart)


@dataclass(frozen=True)
class Pooled(Generic[_T]):
    """One result of several runs that differ in their seed.

    Attributes:
        result: of the means over the runs, prompt by prompt: its interval tells of the choice of
            prompts, which are clusters across the runs.
        runs: of each run.
        spread: the standard deviation of `runs`, which tells of the choice of seeds; NaN for one.
    """

    result: _T
    runs: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Over the runs."""
        return stdev(self.runs) if len(self.runs) > 1 else nan


def pooled_rate(runs: Sequence[PromptScores]) -> Pooled[Rate] | None:
    """The mean rate of several runs; None where they share no prompt."""
    result = _mean_of(runs).rate()
    return None if result is None else Pooled(result, tuple(each.mean for each in runs))


def pooled_change(runs: Sequence[tuple[PromptScores, PromptScores]]) -> Pooled[Change] | None:
    """The mean change of several runs, given before and after; None where they share no prompt."""
    result = paired(_mean_of([old for old, _ in runs]), _mean_of([new for _, new in runs]))
    own = [paired(*each) for each in runs]
    if result is None:
        return None
    return Pooled(result, tuple(each.difference for each in own if each is not None))


def _mean_of(runs: Sequence[PromptScores]) -> PromptScores:
    """Prompt by prompt, over the prompts that all runs have."""
    shared = [uid for uid in runs[0].values if all(uid in each.values for each in runs)]
    values = {uid: fmean(each.values[uid] for each in runs) for uid in shared}
    samples = sum(each.samples for each in runs)
    return dataclasses.replace(runs[0], values=values, samples=samples)


def _by_prompt(measurement: Measurement, statistic: _Statistic, kind: str | None) -> PromptScores:
    size = measurement.group_size
    values = {}
    for i, (uid, own) in enumerate(zip(measurement.uids, measurement.kinds, strict=True)):
        if kind is None or own == kind:
            samples = slice(i * size, (i + 1) * size)
            value = statistic({name: each[samples] for name, each in measurement.scores.items()})
            if value is not None:
                values[uid] = value
    clusters = dict(zip(measurement.uids, measurement.clusters, strict=True))
    return PromptScores(values, clusters, size)


def _known(scores: Iterable[float | None]) -> list[float]:
    return [score for score in scores if score is not None and not isnan(score)]


def _gaps(measurement: Measurement) -> dict[str, float]:
    right, gold = mean_scores(measurement).values, mean_scores(measurement, "gold").values
    return {uid: right[uid] - gold[uid] for uid in right if uid in gold}


def _diversity(measurement: Measurement, uids: set[str]) -> float:
    if not measurement.diversity:
        return 0.0
    pairs = zip(measurement.uids, measurement.diversity, strict=True)
    return fmean(value for uid, value in pairs if uid in uids)


def _sharpness(measurement: Measurement) -> float | None:
    settings = measurement.settings
    if measurement.skill == "generate" and settings.get("dynamics") != "ode":
        return None
    value = settings.get("temperature" if measurement.skill == "understand" else "start_noise")
    return None if value is None else float(value)


def _require_group(measurement: Measurement, k: int, what: str) -> None:
    if not 1 <= k <= measurement.group_size:
        raise ValueError(
            f"{what}: k is {k}, but {measurement.sampling!r} was measured with "
            f"{measurement.group_size} samples of each prompt; expected 1 to that many"
        )
