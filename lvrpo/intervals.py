"""95 % intervals for what a run reports: of rates and their changes, of means and theirs.

| | scores that are independent | scores in clusters, one per prompt |
|---|---|---|
| a rate | `wilson_interval` | `clustered_rate`: Wilson's at the effective sample size |
| a change | `compare_rates`: Newcombe's | `compare_pairs`: of the differences prompt by prompt |
| a mean, which has no bounds | | `clustered_mean`, `compare_means` |

Those of rates stay inside what is possible ([0, 1], [-1, 1]) and keep their coverage near 0 % and
100 %, where the textbook "plus or minus two standard errors" collapses to a width of zero.
statsmodels and scipy are imported where they are used: training needs the error of a mean alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import fsum, hypot, inf, nan, sqrt
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


def wilson_interval(successes: float, total: float) -> Interval:
    """The score interval of a rate successes / total.

    Args:
        successes: in [0, total]. A sum of graded scores in [0, 1] is welcome: their variance is at
            most that of as many zeros and ones, so the interval is then wider than need be, never
            too narrow.
        total: trials, taken as independent; an effective number of them need not be whole.
            0 trials say nothing: [0, 1].

    Raises:
        ValueError: successes outside [0, total].
    """
    from statsmodels.stats.proportion import proportion_confint

    if not 0 <= successes <= total:
        raise ValueError(f"wilson_interval: successes is {successes}, expected 0 to total={total}")
    if total == 0:
        return Interval(0.0, 1.0)
    low, high = proportion_confint(successes, total, method="wilson")
    rate = successes / total  # which rounding may put outside at 0 and 1
    return Interval(min(float(low), rate), max(float(high), rate))


def clustered_rate(scores: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """Wilson's interval of a mean of scores in [0, 1], at the effective sample size.

    That is n / design effect (Kish 1965; Franco, Little, Louis and Slud 2019), the design effect
    being the cluster-robust variance of the mean over that of n independent zeros and ones, with
    Korn and Graubard's (1998) factor for few clusters:

        (sum over clusters of (sum in it of (score - p))² + m² q) / (n p (1 - p) + m q)
        * G / (G - 1) * (n - 1) / n * (t(G - 1) / t(n - 1))²

    The terms in m, the size of the cluster that a score is in on the average, and q = p² + (1-p)²
    are a cluster that is all right and one that is all wrong: one more of either may always come.
    At 0 % and 100 %, where no score says how alike those of a cluster are, they alone speak, and
    the effective size is Kish's n² / sum of squared cluster sizes. Where every score has a cluster
    of its own, zeros and ones have exactly Wilson's interval.

    Args:
        scores: n in [0, 1], n >= 1.
        clusters: [n], equal for scores that are not independent. One cluster says nothing: [0, 1].

    Raises:
        ValueError: no score, one outside [0, 1], or another number of clusters.
    """
    mean, sizes = clustered_mean(scores, clusters), Counter(clusters).values()
    if not 0 <= min(scores) <= max(scores) <= 1:
        raise ValueError(
            f"clustered_rate: scores are {min(scores)} to {max(scores)}, not in [0, 1]"
        )
    n, groups, p = len(scores), len(sizes), mean.value
    if groups < 2:
        return Interval(0.0, 1.0)
    size = fsum(m * m for m in sizes) / n
    unseen = p**2 + (1 - p) ** 2
    between = (mean.error * n) ** 2 * (groups - 1) / groups + size**2 * unseen
    effect = between / (n * p * (1 - p) + size * unseen)
    effect *= groups / (groups - 1) * (n - 1) / n
    effect *= (_t_95(groups - 1) / _t_95(n - 1)) ** 2
    return wilson_interval(p * n / effect, n / effect)


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


def compare_pairs(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    bounded: bool = True,
) -> Change:
    """The mean of after - before, the same prompts scored twice.

    The interval is that of a regression of the differences on a constant with cluster-robust errors
    and the quantile of t with G - 1 degrees. Scores in [0, 1] have one cluster more in the error,
    half of it better and half worse by 1, as Agresti and Min (2005) add one changed pair: where
    all answers were right and stay so, the interval is not of width zero.

    Args:
        before: [n], n >= 1, by prompt; means over the samples of each.
        after: [n] of the same prompts.
        clusters: [n], equal for prompts that are not independent. One cluster says nothing: the
            interval is all that is possible.
        bounded: whether scores are in [0, 1].

    Raises:
        ValueError: no prompt, another number of scores or clusters, or one outside its bounds.
    """
    if len(before) != len(after):
        raise ValueError(f"compare_pairs: {len(before)} scores before and {len(after)} after")
    differences = [new - old for old, new in zip(before, after, strict=True)]
    mean, groups, n = clustered_mean(differences, clusters), len(set(clusters)), len(differences)
    limit, unseen = inf, 0.0
    if bounded:
        sizes = Counter(clusters).values()
        limit, unseen = 1.0, fsum(m * m for m in sizes) / n / n
        own = clustered_rate(before, clusters), clustered_rate(after, clusters)
    else:
        own = (
            clustered_mean(before, clusters).interval(),
            clustered_mean(after, clusters).interval(),
        )
    if groups < 2:
        return Change(mean.value, Interval(-limit, limit), apart=False)
    reach = _t_95(groups - 1) * hypot(mean.error, unseen)
    interval = Interval(max(mean.value - reach, -limit), min(mean.value + reach, limit))
    return Change(mean.value, interval, apart=not own[0].overlaps(own[1]))


def _t_95(degrees: int) -> float:
    """97.5 % quantile of Student's t: two-sided 95 %."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


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
