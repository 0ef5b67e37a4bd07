"""Intervals for what a run reports: Wilson for a rate, Newcombe for a difference of two, and the
normal one for a mean reward, which has no bounds.

The first two stay inside what is possible ([0, 1], [-1, 1]) and keep their coverage near 0 % and
100 %, where the textbook "plus or minus two standard errors" collapses to a width of zero.
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


def wilson_interval(successes: float, total: int, *, z: float = Z_95) -> Interval:
    """(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), the score interval of a rate p = s/n.

    Args:
        successes: s in [0, total]. A sum of graded scores in [0, 1] is welcome: their variance
            is at most p(1-p), so the interval is then wider than need be, never too narrow.
        total: n trials, taken as independent. 0 trials say nothing: [0, 1].
        z: quantile of the standard normal; 1.96 is 95 %.

    Raises:
        ValueError: successes outside [0, total].
    """
    if not 0 <= successes <= total:
        raise ValueError(f"wilson_interval: successes is {successes}, expected 0 to total={total}")
    if total == 0:
        return Interval(0.0, 1.0)
    rate = successes / total
    centre = rate + z * z / (2 * total)
    spread = z * sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the bound is exactly 0 or 1 on paper and a rounding error away from it here.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == total else (centre + spread) / scale
    return Interval(low, high)


def compare_rates(
    before: tuple[float, int], after: tuple[float, int], *, z: float = Z_95
) -> Change:
    """after - before with Newcombe's hybrid score interval (method 10, no continuity correction).

    d ± sqrt of the squared distances from each rate to the bound of its Wilson interval on the side
    that matters. The two samples are taken as independent; when both answered the same prompts the
    interval is, as a rule, wider than a paired one.

    Args:
        before: (successes, total) as in `wilson_interval`.
        after: (successes, total).
        z: quantile of the standard normal.

    Raises:
        ValueError: a count outside [0, total], or a total of 0.
    """
    if not before[1] or not after[1]:
        raise ValueError(f"compare_rates: a total is 0 (before {before}, after {after})")
    low, high = wilson_interval(*before, z=z), wilson_interval(*after, z=z)
    rate_before, rate_after = before[0] / before[1], after[0] / after[1]
    difference = rate_after - rate_before
    interval = Interval(
        difference - hypot(rate_after - high.low, low.high - rate_before),
        difference + hypot(high.high - rate_after, rate_before - low.low),
    )
    return Change(difference, interval, apart=not low.overlaps(high))


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

    def interval(self, *, z: float = Z_95) -> Interval:
        """value +- z standard errors; fair from some thirty prompts on."""
        return Interval(self.value - z * self.error, self.value + z * self.error)


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


def compare_means(before: Mean, after: Mean, *, z: float = Z_95) -> Change:
    """after - before, taken as independent; wider, as a rule, than by pairs of the same prompt."""
    difference = after.value - before.value
    reach = z * hypot(before.error, after.error)
    interval = Interval(difference - reach, difference + reach)
    apart = not before.interval(z=z).overlaps(after.interval(z=z))
    return Change(difference, interval, apart)
