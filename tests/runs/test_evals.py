"""Measurements as files and as rows: what was written comes back, what is counted is there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvrpo.intervals import clustered_mean
from lvrpo.runs.evals import evaluation_row
from lvrpo.runs.log import MEASUREMENTS, RunWriter, read_measurements
from lvrpo.runs.scores import eval_rewards, eval_scores
from lvrpo.trainer.measurement import AS_TRAINED, GREEDY, LOW_NOISE, Measurement

SCORE = st.sampled_from([None, 0.0, 1.0])
PROMPTS = st.lists(
    st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from(["x", "y", "z"]), SCORE, SCORE),
    min_size=1,
    max_size=8,
)


def measurement(rows, sampling=AS_TRAINED, skill="generate", group=1, label="after", step=3):
    kinds, clusters, right, other = zip(*rows, strict=True)
    return Measurement(
        step=step,
        label=label,
        skill=skill,
        sampling=sampling,
        settings={"start_noise": 0.5},
        group_size=group,
        uids=[f"u{i}" for i in range(len(rows))],
        clusters=list(clusters),
        kinds=list(kinds),
        scores={
            name: [score for score in column for _ in range(group)]
            for name, column in {"right": right, "gold": other, "reward/mine/r.py:f": other}.items()
        },
        diversity=[0.5] * len(rows) if group > 1 else [],
    )


@settings(max_examples=100, deadline=None)
@given(PROMPTS, st.sampled_from([AS_TRAINED, GREEDY, LOW_NOISE]))
def test_a_row_counts_what_is_right_in_all_and_by_kind(rows, sampling):
    skill = "understand" if sampling == GREEDY else "generate"
    found = {
        (score.kind, score.measure): (score.successes, score.total)
        for score in eval_scores(evaluation_row([measurement(rows, sampling, skill)]))
    }
    name = {AS_TRAINED: "strict", GREEDY: "greedy", LOW_NOISE: "low_noise"}[sampling]
    named = {kind for kind, *_ in rows if kind}
    for kind in ("", "a", "b"):
        right = [score for its, _, score, _ in rows if kind in ("", its) and score is not None]
        told = right and (not kind or (kind in named and len(named) > 1))
        assert found.get((kind, name)) == ((sum(right), len(right)) if told else None)
    assert {measure for _, measure in found} <= {name, "gold"}


@settings(max_examples=100, deadline=None)
@given(PROMPTS)
def test_a_row_has_the_mean_of_a_reward_over_what_it_has_a_score_for(rows):
    scores = [(score, cluster) for _, cluster, _, score in rows if score is not None]
    found = eval_rewards(evaluation_row([measurement(rows)]))
    assert found.keys() == ({("generate", "mine/r.py:f")} if scores else set())
    for mean in found.values():
        # repr, for an error that nothing tells of is NaN
        assert repr(mean) == repr(clustered_mean(*zip(*scores, strict=True)))


def test_groups_and_other_samplings_are_no_part_of_a_row():
    rows = [("", "x", 1.0, 1.0)]
    others = [measurement(rows, group=2), measurement(rows, "temperature 0.5", "understand")]
    assert evaluation_row(others) == {}


@settings(max_examples=50, deadline=None)
@given(PROMPTS, st.integers(1, 3))
def test_a_measurement_comes_back_as_it_was_written(tmp_path_factory, rows, group):
    folder = tmp_path_factory.mktemp("run")
    written = measurement(rows, group=group)
    with RunWriter(folder) as writer:
        writer.write_measurements([written])
    assert read_measurements(folder) == [written]


def of_a_run() -> list[Measurement]:
    """Two evaluations, each of three ways of sampling."""
    rows = [("", "x", 1.0, None), ("", "y", 0.0, 1.0)]
    return [
        measurement(rows, sampling, group=group, label=label, step=step)
        for label, step in (("warm start", 3), ("after", 6))
        for sampling, group in ((AS_TRAINED, 1), (LOW_NOISE, 1), (AS_TRAINED, 2))
    ]


def test_an_evaluation_that_is_made_again_replaces_its_own_measurements_alone(tmp_path):
    found = of_a_run()
    with RunWriter(tmp_path) as writer:
        writer.write_measurements(found)
        again = [dataclasses.replace(each, clusters=["z", "z"]) for each in found[:3]]
        writer.write_measurements(again)
    assert read_measurements(tmp_path) == [*found[3:], *again]


def test_whatever_a_kill_leaves_the_same_evaluation_makes_whole(tmp_path):
    found = of_a_run()
    whole = b"".join(json.dumps(each.to_row()).encode() + b"\n" for each in found)
    path = tmp_path / MEASUREMENTS
    (tmp_path / "metrics.jsonl").touch()
    for kept in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:kept])
        lines = whole[:kept].count(b"\n")
        assert read_measurements(tmp_path) == found[:lines]
        with RunWriter(tmp_path, resume_from=6) as writer:
            assert path.read_bytes() == whole[: len(path.read_bytes())]
            writer.write_measurements(found)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(("step", "left"), [(2, 0), (3, 3), (5, 3), (6, 6)])
def test_measurements_of_steps_that_are_taken_back_go_with_them(tmp_path, step, left):
    with RunWriter(tmp_path) as writer:
        writer.write_metrics({"step": 1})
        writer.write_measurements(of_a_run())
    RunWriter(tmp_path, resume_from=step).close()
    assert read_measurements(tmp_path) == of_a_run()[:left]


@pytest.mark.parametrize("missing", ["uids", "scores", "group_size"])
def test_a_line_that_is_no_measurement_is_named(tmp_path, missing):
    first, second = (each.to_row() for each in of_a_run()[:2])
    del second[missing]
    Path(tmp_path / MEASUREMENTS).write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(ValueError, match=rf"{MEASUREMENTS}, line 2: no measurement: .*{missing}"):
        read_measurements(tmp_path)
