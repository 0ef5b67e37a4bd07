"""Results of measurements: against enumeration, known answers, and what must not matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("statsmodels", reason="the extra of the trainer is missing")

from lvrpo.intervals import clustered_rate
from lvrpo.runs.results import (
    GAP_MARGIN,
    FrontierPoint,
    PromptScores,
    as_sharp_as,
    at_equal_diversity,
    best_of,
    change,
    frontier,
    gap_growth,
    gold_gap,
    mean_scores,
    pass_at_k,
    pooled_change,
    pooled_rate,
    rate,
)
from lvrpo.trainer.measurement import Measurement


def measured(
    right: Sequence[Sequence[float | None]],
    *,
    label: str = "after",
    sampling: str = "as trained",
    temperature: float = 1.0,
    diversity: Sequence[float] = (),
    **others: Sequence[Sequence[float | None]],
) -> Measurement:
    """Scores are [P][G]; prompts are paired into clusters and named by their place."""
    count = len(right)
    return Measurement(
        step=0,
        label=label,
        skill="understand",
        sampling=sampling,
        settings={"temperature": temperature},
        group_size=len(right[0]),
        uids=[f"q{i}" for i in range(count)],
        clusters=[f"c{i // 2}" for i in range(count)],
        kinds=["even" if i % 2 == 0 else "odd" for i in range(count)],
        scores={
            name: [score for group in each for score in group]
            for name, each in {"right": right, **others}.items()
        },
        diversity=diversity,
    )


def reordered(measurement: Measurement, order: Sequence[int]) -> Measurement:
    size = measurement.group_size
    return dataclasses.replace(
        measurement,
        **{n: [getattr(measurement, n)[i] for i in order] for n in ("uids", "clusters", "kinds")},
        scores={
            name: [score for i in order for score in each[i * size : (i + 1) * size]]
            for name, each in measurement.scores.items()
        },
    )


@st.composite
def groups(draw, values=(0.0, 1.0)):
    """[P][G] scores."""
    shape = draw(st.tuples(st.integers(3, 8), st.integers(2, 6)))
    row = st.lists(st.sampled_from(values), min_size=shape[1], max_size=shape[1])
    return draw(st.lists(row, min_size=shape[0], max_size=shape[0]))


@settings(max_examples=60, deadline=None)
@given(groups(), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_one(right, data) -> None:
    k = data.draw(st.integers(1, len(right[0])))
    chances = [fmean(max(chosen) for chosen in combinations(group, k)) for group in right]
    found = pass_at_k(measured(right), k)
    assert found.value == pytest.approx(fmean(chances), abs=1e-12)
    assert (found.prompts, found.samples) == (len(right), len(right) * len(right[0]))
    assert found.low <= found.value <= found.high
    if k == 1:
        mean = dataclasses.astuple(rate(measured(right)))
        assert dataclasses.astuple(found) == pytest.approx(mean, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(groups(), groups((0.0, 0.5, 1.0, None)), st.data())
def test_best_of_k_is_what_one_who_sees_the_reward_alone_would_choose(right, reward, data) -> None:
    prompts, size = min(len(right), len(reward)), min(len(right[0]), len(reward[0]))
    right, reward = ([row[:size] for row in each[:prompts]] for each in (right, reward))
    k = data.draw(st.integers(1, size))
    expected = []
    for scores, rewards in zip(right, reward, strict=True):
        ranked = [pair for pair in zip(rewards[:k], scores[:k], strict=True) if pair[0] is not None]
        if ranked:
            expected.append(fmean(score for r, score in ranked if r == max(ranked)[0]))
    found = best_of(measured(right, reward=reward), k)
    if not expected:
        assert found == {}
        return
    assert found.keys() == {"right"}
    assert found["right"].value == pytest.approx(fmean(expected), abs=1e-12)
    assert found["right"].prompts == len(expected)


@settings(max_examples=60, deadline=None)
@given(groups((0.0, 1.0, None)), groups((0.0, 1.0)), st.randoms())
def test_prompts_are_paired_by_name_and_their_order_is_nothing(old, new, random) -> None:
    count = min(len(old), len(new))
    before, after = measured(old[:count]), measured(new[:count])
    order = random.sample(range(count), count)
    for kind in (None, "even", "odd"):
        straight = change(before, after, kind=kind)
        found = change(before, reordered(after, order), kind=kind)
        both = [
            i
            for i in range(count)
            if any(score is not None for score in old[i]) and kind in (None, after.kinds[i])
        ]
        if not both:
            assert found is straight is None
            continue
        known = {i: fmean(score for score in old[i] if score is not None) for i in both}
        expected = fmean(fmean(new[i]) - known[i] for i in both)
        assert found.difference == pytest.approx(expected, abs=1e-12)
        assert found == straight
        assert (rate(before, kind=kind) is None) == (not both)


def test_the_interval_of_a_rate_takes_samples_of_a_prompt_as_one() -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, (60, 8)).astype(float).tolist()
    found, measurement = rate(measured(right)), measured(right)
    each_sample = clustered_rate(measurement.scores["right"], np.repeat(measurement.clusters, 8))
    assert (found.low, found.high) == pytest.approx(each_sample, abs=2e-3)
    repeated = rate(measured([[group[0]] * 8 for group in right]))
    once = rate(measured([[group[0]] for group in right]))
    assert (repeated.low, repeated.high) == (once.low, once.high)


def test_a_reward_is_no_rate() -> None:
    found = rate(measured([[1.0]] * 4, reward=[[3.0], [5.0], [-2.0], [None]]), "reward")
    assert (found.value, found.prompts) == (2.0, 3)
    assert found.low < 0
    assert rate(measured([[1.0]] * 4), "gold") is None


def line_of(points: Sequence[tuple[float, float, float]]) -> list[FrontierPoint]:
    """Of (temperature, accuracy, diversity)."""
    uids = [f"q{i}" for i in range(40)]
    clusters = dict(zip(uids, uids, strict=True))
    return [
        FrontierPoint(f"temperature {t}", t, PromptScores(dict.fromkeys(uids, a), clusters, 8), d)
        for t, a, d in points
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=3, max_size=6, unique=True),
    st.floats(0.001, 0.999),
)
def test_between_its_points_a_frontier_is_a_line(temperatures, share) -> None:
    known = [t / 20 for t in sorted(temperatures)]
    line = line_of([(t, 0.9 - t / 4, t / 5) for t in known])
    wanted = known[0] + share * (known[-1] - known[0])
    assert as_sharp_as(line, 0.9 - wanted / 4) == pytest.approx(wanted, abs=1e-9)
    (trained,) = line_of([(1.0, 0.95, wanted / 5)])
    found = at_equal_diversity(line, trained)
    assert found.difference == pytest.approx(0.05 + wanted / 4, abs=1e-9)
    assert as_sharp_as(line, 0.9 - known[0] / 4 + 1e-6) is None
    assert as_sharp_as(line, 0.9 - known[-1] / 4 - 1e-6) is None
    (beyond,) = line_of([(1.0, 0.95, known[-1] / 5 + 1e-6)])
    assert at_equal_diversity(line, beyond) is None


def test_of_two_temperatures_the_higher_is_as_sharp() -> None:
    line = line_of([(0.0, 0.5, 0.0), (0.5, 0.7, 0.2), (1.0, 0.5, 0.4), (1.5, 0.5, 0.5)])
    assert as_sharp_as(line, 0.6) == pytest.approx(0.75)
    assert as_sharp_as(line, 0.5) == 1.5


def test_a_frontier_is_of_the_prompts_that_all_its_points_have() -> None:
    rng = np.random.default_rng(1)
    right = rng.integers(0, 2, (12, 4)).astype(float).tolist()
    few = {"diversity": [0.5] * 5}
    measurements = [
        measured(right[:5], **few),
        measured(right[:5], sampling="temperature 0.5", temperature=0.5, **few),
        measured([row[:1] for row in right], sampling="greedy", temperature=0.0),
        measured([row[:1] for row in right]),  # as trained, once: tells of no diversity
        measured(right, label="warm start", diversity=[0.1] * 12),
    ]
    found = frontier(measurements, "after", "understand")
    assert [(point.sampling, point.sharpness, point.diversity) for point in found] == [
        ("greedy", 0.0, 0.0),
        ("as trained", 1.0, 0.5),
        ("temperature 0.5", 0.5, 0.5),
    ]
    assert all(point.accuracy.prompts == 5 for point in found)
    assert found[0].accuracy.value == fmean(row[0] for row in right[:5])
    assert frontier(measurements, "after", "generate") == []


def test_a_judge_that_is_fooled_raises_the_alarm_and_a_fair_one_does_not() -> None:
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 2, (200, 1)).astype(float)
    fooled = np.maximum(gold, rng.random((200, 1)) < 0.4)
    before, fair = measured(gold.tolist(), gold=gold.tolist()), rng.permutation(gold)
    cheated = measured(fooled.tolist(), gold=gold.tolist())
    assert gold_gap(before).difference == 0
    assert gold_gap(cheated).difference == pytest.approx((fooled - gold).mean())
    assert gap_growth(before, cheated).difference == pytest.approx((fooled - gold).mean())
    assert gap_growth(before, cheated).interval.low > GAP_MARGIN
    better = gap_growth(before, measured(fair.tolist(), gold=fair.tolist()))
    assert better.interval.low < 0 < better.interval.high
    # One that was as easily fooled before is no sign of hacking.
    assert gap_growth(cheated, cheated).interval.low < GAP_MARGIN
    assert gap_growth(before, measured(fair.tolist())) is None


def test_runs_are_pooled_prompt_by_prompt() -> None:
    rng = np.random.default_rng(3)
    before = [mean_scores(measured(rng.integers(0, 2, (30, 1)).tolist())) for _ in range(5)]
    after = [mean_scores(measured(rng.integers(0, 2, (30, 1)).tolist())) for _ in range(5)]
    rates, changes = pooled_rate(after), pooled_change(list(zip(before, after, strict=True)))
    assert rates.runs == tuple(each.mean for each in after)
    assert rates.result.value == pytest.approx(fmean(rates.runs))
    assert rates.spread == pytest.approx(np.std(rates.runs, ddof=1))
    assert changes.result.difference == pytest.approx(fmean(changes.runs))
    # The same run five times over has no more prompts than once.
    again = pooled_rate(after[:1] * 5)
    alone = pooled_rate(after[:1])
    assert again.result.low == pytest.approx(alone.result.low)
    assert again.spread == 0
    assert np.isnan(alone.spread)


@pytest.mark.parametrize("statistic", [pass_at_k, best_of])
@pytest.mark.parametrize("k", [0, 3])
def test_more_samples_than_there_are_is_refused(statistic, k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, but 'as trained' was measured with 2 samples"):
        statistic(measured([[1.0, 0.0]] * 3), k)
