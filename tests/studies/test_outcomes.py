"""What a study says is what its runs measured: pooled by prompt, paired by prompt and by seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from lvrpo.intervals import Interval
from lvrpo.runs.log import RunWriter
from lvrpo.studies.directory import StudyRun
from lvrpo.studies.outcomes import QUANTITIES, K, Share, outcomes_of, shares_of
from lvrpo.studies.page import write_page
from lvrpo.studies.prediction import PREDICTED, verdict_on_prediction
from lvrpo.studies.study import Arm, Study
from lvrpo.trainer.measurement import AS_TRAINED, GREEDY, LOW_NOISE, Measurement

BASE, OTHER = Arm("base", "the base"), Arm("other", "the other", ("loss.text_kl=0.5",))
STUDY = Study("made-up", "Made up", "Is it right?", base=BASE, arms=(OTHER,))
PROMPTS = 40
SAMPLINGS = [
    ("understand", GREEDY, 1),
    ("understand", AS_TRAINED, 1),
    ("understand", AS_TRAINED, K),
    ("generate", LOW_NOISE, 1),
    ("generate", AS_TRAINED, 1),
    ("generate", AS_TRAINED, K),
]


def measured(rng: np.random.Generator, label: str, step: int) -> list[Measurement]:
    """Every way of sampling that a study reads, right at random."""
    return [
        Measurement(
            step=step,
            label=label,
            skill=skill,
            sampling=sampling,
            settings={},
            group_size=size,
            uids=[f"{skill}-{i}" for i in range(PROMPTS)],
            clusters=[f"{skill}-{i // 2}" for i in range(PROMPTS)],
            kinds=["kind"] * PROMPTS,
            scores={"right": rng.integers(0, 2, PROMPTS * size).astype(float).tolist()},
        )
        for skill, sampling, size in SAMPLINGS
    ]


def make_run(
    directory: Path, arm: Arm, seed: int, shares: Sequence[dict[str, float]] = ()
) -> StudyRun:
    rng = np.random.default_rng([seed, len(arm.settings)])
    run_dir = directory / arm.name / str(seed)
    with RunWriter(run_dir) as writer:
        for step, row in enumerate(shares, 1):
            writer.write_metrics({"step": step, **row})
        writer.write_measurements(measured(rng, "warm start", 0) + measured(rng, "after", 3))
        writer.write_eval({"step": 3, "label": "after"})
    (run_dir / "config.toml").write_text("[run]\nsteps = 3\n[warm_start]\nsteps = 0\n")
    origin = None if arm is BASE else directory / BASE.name / str(seed)
    return StudyRun(arm, seed, run_dir, origin)


def make_study(directory: Path, seeds: int = 3) -> list[StudyRun]:
    return [make_run(directory, arm, seed) for arm in (BASE, OTHER) for seed in range(seeds)]


def right(run: StudyRun, label: str, skill: str, sampling: str, size: int) -> list[float]:
    """[PROMPTS] shares of right samples, read from the file itself."""
    lines = (run.directory / "measurements.jsonl").read_text().splitlines()
    (row,) = [
        row
        for row in map(json.loads, lines)
        if (row["label"], row["skill"], row["sampling"], row["group_size"])
        == (label, skill, sampling, size)
    ]
    samples = np.array(row["scores"]["right"]).reshape(PROMPTS, size)
    return samples.mean(1).tolist() if size == 1 else samples.max(1).tolist()


def test_every_quantity_is_that_of_the_files(tmp_path):
    runs = make_study(tmp_path)
    base, other = outcomes_of(runs)
    assert [each.quantity for each in base.outcomes] == list(QUANTITIES)
    sides = {"base": runs[:3], "other": runs[3:]}
    for arm in (base, other):
        for found in arm.outcomes:
            quantity = found.quantity
            of = (quantity.skill, quantity.sampling, quantity.k)
            own = [
                (right(run, "warm start", *of), right(run, "after", *of))
                for run in sides[arm.arm.name]
            ]
            assert found.before.runs == pytest.approx([fmean(before) for before, _ in own])
            assert found.after.runs == pytest.approx([fmean(after) for _, after in own])
            assert found.after.result.value == pytest.approx(fmean(found.after.runs))
            changes = [fmean(after) - fmean(before) for before, after in own]
            assert found.change.runs == pytest.approx(changes)
            assert found.change.result.difference == pytest.approx(fmean(changes))
            assert found.change.result.interval.low < fmean(changes)
            if arm is base:
                assert found.over_base is None
                continue
            over = [
                fmean(after) - fmean(right(run, "after", *of))
                for (_, after), run in zip(own, sides["base"], strict=True)
            ]
            assert found.over_base.runs == pytest.approx(over)


def test_an_arm_is_compared_with_the_base_of_its_own_seed(tmp_path):
    """A base that is not finished is left out; the others keep their partner."""
    runs = make_study(tmp_path)
    whole = outcomes_of(runs)[1]
    part = outcomes_of([run for run in runs if run.name != "base/1"])[1]
    for full, less in zip(whole.outcomes, part.outcomes, strict=True):
        assert less.over_base.runs == (full.over_base.runs[0], full.over_base.runs[2])
        assert less.change == full.change


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_shares_are_means_over_steps_with_a_signal(tmp_path_factory, values):
    directory = tmp_path_factory.mktemp("study")
    silent = {"share/generate/r_sem": 0.0, "share/generate/r_ins": 0.0}
    unknown = {"share/generate/r_sem": float("nan"), "share/generate/r_ins": 1.0}
    run_dirs = []
    for seed, shares in enumerate(values):
        rows = [{"share/generate/r_sem": v, "share/generate/r_ins": 1 - v} for v in shares]
        run = make_run(directory, BASE, seed, [silent, *rows, unknown])
        run_dirs.append(run.directory)
    found = shares_of(run_dirs)
    means = [fmean(shares) for shares in values]
    assert found["generate", "r_sem"].runs == pytest.approx(means)
    assert found["generate", "r_ins"].value == pytest.approx(1 - fmean(means))
    interval = found["generate", "r_sem"].interval
    if len(means) == 1:
        assert interval is None
        return
    reach = t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
    assert tuple(interval) == pytest.approx((fmean(means) - reach, fmean(means) + reach))


VERDICTS = {
    (0.002, 0.01): "confirmed",
    tuple(PREDICTED): "confirmed",
    (0.05, 0.2): "refuted: it has more",
    (0.999, 1.0): "refuted: it has more",
    (0.0, 0.001): "refuted: it has less",
    (0.001, 0.01): "neither",
    (0.01, 0.03): "neither",
    (0.0, 0.5): "neither",
}


@pytest.mark.parametrize(("interval", "word"), VERDICTS.items())
def test_the_verdict_on_the_prediction(tmp_path, interval, word):
    (outcome,) = outcomes_of([make_run(tmp_path, BASE, 0)])
    share = Share((fmean(interval),) * 5, Interval(*interval))
    shares = {("generate", "r_sem"): share, ("generate", "r_ins"): share}
    paper = replace(outcome, advantage="paper", shares=shares)
    said = verdict_on_prediction(paper)
    assert word in said
    assert "e+" not in said
    assert sum(each in said for each in ("is confirmed", "is refuted", "is neither")) == 1
    one_seed = replace(paper, shares={**shares, ("generate", "r_sem"): Share((0.01,), None)})
    assert "one seed" in verdict_on_prediction(one_seed)
    assert verdict_on_prediction(replace(paper, advantage="decoupled")) is None
    alone = {key: each for key, each in shares.items() if key[1] == "r_sem"}
    assert verdict_on_prediction(replace(paper, shares=alone)) is None


def test_the_three_forms_tell_the_same(tmp_path):
    runs = make_study(tmp_path)
    path = write_page(tmp_path, STUDY, runs, len(runs) + 1)
    page, table = path.read_text(), (tmp_path / "table.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert "6 of 7 runs are finished" in page
    assert (results["finished"], results["runs"]) == (6, 7)
    for arm in outcomes_of(runs):
        for found in arm.outcomes:
            row = results["arms"][arm.arm.name]["results"][found.quantity.key]
            assert row["change"]["value"] == found.change.result.difference
            assert row["change"]["seeds"] == list(found.change.runs)
            assert row["after"]["value"] == found.after.result.value
            assert f"{100 * found.after.result.value:.1f}\N{NO-BREAK SPACE}%" in page
            points = f"{100 * found.change.result.difference:+.1f}"
            assert points in table
            assert points.replace("-", "\N{MINUS SIGN}") in page
    assert {path.stem for path in (tmp_path / "study").glob("*.png")} == {
        "headlines",
        "pass",
        "as-trained",
    }
    heads = [line.count("|") for line in table.splitlines()]
    assert len(heads) == 2 + 1 + 2
    assert len(set(heads)) == 1


def test_runs_without_measurements_are_told_of(tmp_path):
    run = make_run(tmp_path, BASE, 0)
    (run.directory / "measurements.jsonl").unlink()
    page = write_page(tmp_path, STUDY, [run], 2).read_text()
    assert "No run has measurements" in page
