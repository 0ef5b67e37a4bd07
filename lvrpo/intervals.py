"""95 % intervals for what a run reports: Wilson for a rate, Newcombe for a difference of two, and
the normal one for a mean reward, which has no bounds.

The first two are statsmodels'. They stay inside what is possible ([0, 1], [-1, 1]) and keep their
coverage near 0 % and 100 %, where the textbook "plus or minus two standard errors" collapses to a
width of zero. statsmodels is imported where it is used: training needs the error of a mean alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import fsum, hypot, nan, sqrt
from typing import NamedTuple

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal: two-sided 95 %


class Interval(NamedTuple):
    """A closed interval [low, high]."""

    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the two share a point."""
        return self.low <= other.high and other.low <= self.high


class Change(NamedTuple):
    """The difference of two rates or means, after - before.

    Attributes:
        difference: after - before; of rates in [-1, 1].
        interval: its 95 % interval.
        apart: the two values' own 95 % intervals do not overlap, which asks for more than that
            `interval` leaves out zero.
    """

    difference: float
    interval: Interval
    apart: bool

    @property
    def excludes_zero(self) -> bool:
        """Whether "no change" lies outside the interval of the difference."""
        return self.interval.low > 0 or self.interval.high < 0


def wilson_interval(successes: float, total: int) -> Interval:
    """The score interval of a rate successes / total.

    Args:
        successes: in [0, total]. A sum of graded scores in [0, 1] is welcome: their variance is at
            most that of as many zeros and ones, so the interval is then wider than need be, never
            too narrow.
        total: trials, taken as independent. 0 trials say nothing: [0, 1].

    Raises:
        ValueError: successes outside [0, total].
    """
    from statsmodels.stats.proportion import proportion_confint

    if not 0 <= successes <= total:
        raise ValueError(f"wilson_interval: successes is {successes}, expected 0 to total={total}")
    if total == 0:
        return Interval(0.0, 1.0)
    low, high = proportion_confint(successes, total, method="wilson")
    return Interval(float(low), float(high))


def compare_rates(before: tuple[float, int], after: tuple[float, int]) -> Change:
    """after - before with Newcombe's hybrid score interval (method 10, no continuity correction).

    The two samples are taken as independent; when both answered the same prompts the interval is,
    as a rule, wider than a paired one.

    Args:
        before: (successes, total) as in `wilson_interval`.
        after: (successes, total).

    Raises:
        ValueError: a count outside [0, total], or a total of 0.
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    if not before[1] or not after[1]:
        raise ValueError(f"compare_rates: a total is 0 (before {before}, after {after})")
    apart = not wilson_interval(*before).overlaps(wilson_interval(*after))
    low, high = confint_proportions_2indep(*after, *before, method="newcomb", compare="diff")
    difference = after[0] / after[1] - before[0] / before[1]
    return Change(difference, Interval(float(low), float(high)), apart)


@dataclass(frozen=True)
class Mean:
    """A mean of graded scores.

    Attributes:
        value: the mean.
        error: its standard error, NaN where fewer than two prompts tell of it.
        count: how many scores it is of.
    """

    value: float
    error: float
    count: int

    def interval(self) -> Interval:
        """value +- 1.96 standard errors; fair from some thirty prompts on."""
        return Interval(self.value - Z_95 * self.error, self.value + Z_95 * self.error)


def clustered_mean(scores: Sequence[float], clusters: Sequence[Hashable]) -> Mean:
    """The mean of scores, the error of which takes what shares a prompt as one draw.

    error² = G / (G - 1) sum over the G clusters of (sum in it of (score - mean))² / n², which is
    s²/n where every score has a cluster of its own.

    Args:
        scores: n finite numbers, n >= 1.
        clusters: [n], equal for scores that are not independent.

    Raises:
        ValueError: no score, or another number of clusters.
    """
    if not scores or len(scores) != len(clusters):
        raise ValueError(
            f"clustered_mean: {len(scores)} scores of {len(clusters)} clusters, expected as many "
            "and one at least"
        )
    mean = fsum(scores) / len(scores)
    deviations: defaultdict[Hashable, list[float]] = defaultdict(list)
    for score, cluster in zip(scores, clusters, strict=True):
        deviations[cluster].append(score - mean)
    groups = len(deviations)
    if groups < 2:
        return Mean(mean, nan, len(scores))
    square = fsum(fsum(parts) ** 2 for parts in deviations.values()) * groups / (groups - 1)
    return Mean(mean, sqrt(square) / len(scores), len(scores))


def compare_means(before: Mean, after: Mean) -> Change:
    """after - before, taken as independent; wider, as a rule, than by pairs of the same prompt."""
    difference = after.value - before.value
    reach = Z_95 * hypot(before.error, after.error)
    interval = Interval(difference - reach, difference + reach)
    apart = not before.interval().overlaps(after.interval())
    return Change(difference, interval, apart)
