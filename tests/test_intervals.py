"""Intervals: published values, statsmodels' own numbers, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("statsmodels", reason="the extra of the report is missing")

from lvrpo.intervals import (
    Interval,
    clustered_mean,
    clustered_rate,
    compare_means,
    compare_pairs,
    compare_rates,
    wilson_interval,
)


# Wilson: R's prop.test(correct = FALSE). Newcombe: his 1998 paper, table II, method 10.
@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_matches_published_values(
    successes: int, total: int, low: float, high: float
) -> None:
    found = wilson_interval(successes, total)
    assert [round(bound, 4) for bound in found] == [low, high]


@pytest.mark.parametrize(
    ("after", "before", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_newcombe_matches_published_values(
    after: tuple[int, int], before: tuple[int, int], low: float, high: float
) -> None:
    found = compare_rates(before, after).interval
    assert [round(bound, 4) for bound in found] == [low, high]
    mirrored = compare_rates(after, before).interval
    assert [round(-bound, 4) for bound in reversed(mirrored)] == [low, high]


@pytest.mark.parametrize(
    ("found", "low", "high"),
    [
        (wilson_interval(7.5, 20), 0.1997708556646315, 0.5905104338485734),
        (wilson_interval(0, 10), 0.0, 0.2775327998628892),
        (wilson_interval(40, 40), 0.9123783988027134, 1.0),
        (
            compare_rates((785, 2048), (1681, 2048)).interval,
            0.41015250215808413,
            0.4637603657681859,
        ),
        (compare_rates((7.5, 20), (40, 40)).interval, 0.3923580173442965, 0.8002291443353685),
    ],
)
def test_the_formulas_written_out(found: Interval, low: float, high: float) -> None:
    """What Wilson's and Newcombe's give in fp64, of graded scores and at both ends too."""
    assert found == pytest.approx((low, high), abs=1e-12)


def test_intervals_at_the_edges() -> None:
    assert wilson_interval(0, 0) == Interval(0, 1)
    with pytest.raises(ValueError, match="successes is 5"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="a total is 0"):
        compare_rates((0, 0), (1, 2))
    assert compare_rates((280, 1000), (390, 1000)).apart
    close = compare_rates((280, 1000), (325, 1000))
    assert close.excludes_zero
    assert not close.apart


def test_wilson_covers_as_often_as_it_says() -> None:
    for rate in (0.05, 0.3, 0.8):
        counts = np.arange(101)
        chances = np.array([math.comb(100, k) * rate**k * (1 - rate) ** (100 - k) for k in counts])
        covered = [(b := wilson_interval(int(k), 100)).low <= rate <= b.high for k in counts]
        assert 0.93 < chances[covered].sum() < 0.98


def robust_error(scores: list[float], clusters: list[int]) -> float:
    """The cluster-robust standard error of a mean, by the regression on a constant."""
    from statsmodels.regression.linear_model import OLS

    model = OLS(np.array(scores), np.ones(len(scores)))
    return float(model.fit(cov_type="cluster", cov_kwds={"groups": np.array(clusters)}).bse[0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 9)), min_size=1, max_size=60))
def test_the_error_of_a_mean_takes_a_prompt_as_one_draw(pairs) -> None:
    scores, clusters = [s for s, _ in pairs], [c for _, c in pairs]
    found = clustered_mean(scores, clusters)
    scale = max(1.0, max(map(abs, scores)))
    assert found.count == len(pairs)
    assert found.value == pytest.approx(float(np.mean(scores)), abs=1e-9 * scale)
    if len(set(clusters)) < 2:
        assert math.isnan(found.error)
        return
    assert found.error == pytest.approx(robust_error(scores, clusters), abs=1e-9 * scale)
    alone = clustered_mean(scores, range(len(scores)))
    usual = float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    assert alone.error == pytest.approx(usual, abs=1e-9 * scale)


def test_repeating_every_sample_does_not_narrow_the_interval() -> None:
    scores = np.random.default_rng(0).normal(size=50).tolist()
    once = clustered_mean(scores, range(50))
    again = clustered_mean(scores * 20, [*range(50)] * 20)
    assert again.error == pytest.approx(once.error, rel=1e-12)
    assert clustered_mean(scores * 20, range(1000)).error < 0.3 * once.error


def test_intervals_of_means_cover_as_often_as_they_say() -> None:
    """40 prompts of 1 to 8 samples each, which share most of their noise."""
    rng, covered, changes = np.random.default_rng(1), 0, 0
    for _ in range(1000):
        sizes = rng.integers(1, 9, (2, 40))
        means = []
        for side in sizes:
            shared = rng.normal(size=40)
            scores = [shared[i] + 0.3 * rng.normal() for i in range(40) for _ in range(side[i])]
            means.append(clustered_mean(scores, np.repeat(range(40), side).tolist()))
        low, high = means[0].interval()
        covered += low <= 0 <= high
        low, high = compare_means(*means).interval
        changes += low <= 0 <= high
    # The normal interval of 40 clusters is a little short of 95 %.
    assert 900 <= covered <= 970
    assert 910 <= changes <= 975


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_a_mean_of_nothing_is_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"clustered_mean: \d scores of 2 clusters"):
        clustered_mean(scores, [0, 1])


#: (score, score after, cluster) of some prompts.
prompts = st.lists(
    st.tuples(st.sampled_from((0.0, 0.5, 1.0)), st.sampled_from((0.0, 1.0)), st.integers(0, 9)),
    min_size=2,
    max_size=60,
)


def width(interval: Interval) -> float:
    return interval.high - interval.low


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from((0.0, 1.0)), min_size=2, max_size=80))
def test_a_rate_without_clusters_is_wilsons(scores) -> None:
    found = clustered_rate(scores, range(len(scores)))
    assert found == pytest.approx(wilson_interval(sum(scores), len(scores)), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(prompts, st.integers(2, 5))
def test_what_holds_of_every_clustered_interval(pairs, copies) -> None:
    before, after, clusters = map(list, zip(*pairs, strict=True))
    again = [each * copies for each in (before, after, clusters)]
    rate, twice = clustered_rate(after, clusters), clustered_rate(again[1], again[2])
    value = float(np.mean(after))
    assert 0 <= rate.low <= value + 1e-12
    assert value - 1e-12 <= rate.high <= 1
    assert width(rate) > 0
    assert width(twice) >= width(rate) - 1e-12  # a prompt that is repeated tells nothing new
    flipped = clustered_rate([1 - each for each in after], clusters)
    assert flipped == pytest.approx((1 - rate.high, 1 - rate.low), abs=1e-12)

    change = compare_pairs(before, after, clusters)
    repeated = compare_pairs(*again)
    assert width(change.interval) > 0
    assert width(repeated.interval) >= width(change.interval) - 1e-12
    back = compare_pairs(after, before, clusters)
    assert back.difference == pytest.approx(-change.difference, abs=1e-12)
    assert back.interval == pytest.approx((-change.interval.high, -change.interval.low), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(prompts)
def test_a_paired_change_is_the_regression_on_a_constant(pairs) -> None:
    from statsmodels.regression.linear_model import OLS

    before, after, clusters = map(list, zip(*pairs, strict=True))
    if len(set(clusters)) < 2:
        assert compare_pairs(before, after, clusters).interval == Interval(-1, 1)
        return
    model = OLS(np.subtract(after, before), np.ones(len(pairs)))
    groups = {"groups": np.array(clusters)}
    fitted = model.fit(cov_type="cluster", cov_kwds=groups, use_t=True)
    found = compare_pairs(before, after, clusters, bounded=False)
    assert found.difference == pytest.approx(fitted.params[0], abs=1e-9)
    assert found.interval == pytest.approx(fitted.conf_int()[0], abs=1e-9)


def test_the_unseen_cluster_of_a_change_weighs_little_where_much_changed() -> None:
    rng = np.random.default_rng(3)
    before, after = (rng.integers(0, 2, 600).astype(float).tolist() for _ in range(2))
    bounded = compare_pairs(before, after, range(600)).interval
    free = compare_pairs(before, after, range(600), bounded=False).interval
    assert 1 < width(bounded) / width(free) < 1.01


def test_nothing_but_right_answers_leaves_room_for_a_wrong_one() -> None:
    clusters = [i // 4 for i in range(100)]
    for score in (0.0, 1.0):
        scores = [score] * 100
        # Kish: as many samples as clusters.
        expected = wilson_interval(25 * score, 25)
        few_clusters = width(clustered_rate(scores, clusters)) / width(expected)
        assert 1 <= few_clusters < 1.15
        change = compare_pairs(scores, scores, clusters)
        assert change.interval.low < -0.04 < 0 < 0.04 < change.interval.high


@pytest.mark.parametrize("alike", [0.01, 0.3, 0.95])
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.95])
def test_clustered_intervals_cover_as_often_as_they_say(rate: float, alike: float) -> None:
    """60 clusters of 1 to 6 prompts; `alike` is the correlation of two in one (beta-binomial)."""
    rng, covered, changes = np.random.default_rng(5), 0, 0
    shape = np.array([rate, 1 - rate]) * (1 / alike - 1)
    for _ in range(300):
        clusters = np.repeat(range(60), rng.integers(1, 7, 60))
        chances = rng.beta(*shape, 60)[clusters]
        before, after = (rng.random((2, len(clusters))) < chances).astype(float).tolist()
        low, high = clustered_rate(after, clusters.tolist())
        covered += low <= rate <= high
        low, high = compare_pairs(before, after, clusters.tolist()).interval
        changes += low <= 0 <= high
    assert covered >= 270  # 95 % is 285; three standard errors of the count are 11
    assert changes >= 274


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clustered_rate([0.0, 1.5], [0, 1]), "clustered_rate: scores are 0.0 to 1.5"),
        (lambda: clustered_rate([], []), "clustered_mean: 0 scores"),
        (lambda: compare_pairs([0.0], [0.0, 1.0], [0]), "compare_pairs: 1 scores before and 2"),
    ],
)
def test_what_is_no_rate_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
