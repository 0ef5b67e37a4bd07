"""What a report makes of measurements: its table, its findings, and what it says it cannot show."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from report.page_reader import Page
from report.synthetic_run import make_run

from lvrpo.report import charts
from lvrpo.report.comparisons import compare, compare_rewards
from lvrpo.report.drawing import LIGHT
from lvrpo.report.findings import findings, hacking_alarms, limits
from lvrpo.report.page import write_report
from lvrpo.report.summary import Run, load_run
from lvrpo.runs.files import append_row
from lvrpo.runs.results import frontier, pass_at_k
from lvrpo.trainer.measurement import AS_TRAINED, HEADLINE, Measurement


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits", steps=3)


@pytest.fixture(scope="module")
def run(path: Path) -> Run:
    return load_run(path)


def test_every_row_is_the_mean_of_what_was_measured(run: Run) -> None:
    rows = {each.name: each for each in compare(run)}
    for skill, mode in HEADLINE.items():
        for label, side in (("warm start", "before"), ("after", "after")):
            for sampling in (mode, AS_TRAINED):
                (measured, *_) = run.measured(label, skill, sampling)
                scores = measured.scores["right"]
                rate = getattr(rows[f"{skill}/{sampling}/right"], side)
                assert rate.value == pytest.approx(fmean(scores))
                assert rate.prompts == len(scores) == 512
                for kind in set(measured.kinds):
                    own = [s for s, k in zip(scores, measured.kinds, strict=True) if k == kind]
                    rate = getattr(rows[f"{skill}/{kind}/{sampling}/right"], side)
                    assert rate.value == pytest.approx(fmean(own))
            *_, several = run.measured(label, skill, AS_TRAINED)
            assert getattr(rows[f"{skill}/pass@8"], side) == pass_at_k(several, 8)


def test_the_modes_are_the_headline_and_stand_first(run: Run) -> None:
    rows = compare(run)
    assert [each.name for each in rows if each.headline] == [
        "understand/greedy/right",
        "generate/ode noise 0/right",
    ]
    assert rows[0].headline
    assert [each.measure for each in rows if each.main and each.task == "generate"] == [
        "ode noise 0/right",
        "as trained/right",
        "pass@8",
    ]


def test_paired_intervals_are_of_the_same_prompts(path: Path) -> None:
    text = Page(write_report(path)).text
    assert "answer the same prompts" in text
    assert "Newcombe" not in text


def test_a_frontiers_picture_has_its_numbers_in_words(run: Run) -> None:
    before, after = (
        frontier(run.measurements, label, "generate") for label in ("warm start", "after")
    )
    chart = charts.frontier_chart("generate", before, after)
    for name, line in (("warm start", before), ("trained", after)):
        for point in line:
            said = f"{name}, {point.sampling}: {point.accuracy.value:.1%} right at diversity"
            assert f"{said} {point.diversity:.3g}" in chart.alt
    drawn = chart.draw(LIGHT).axes[0]
    widest = max(point.diversity for point in (*before, *after))
    for colour in {text.get_color() for text in drawn.texts}:
        named = [text for text in drawn.texts if text.get_color() == colour]
        assert {"no noise", "as trained"} <= {text.get_text() for text in named}
        # Names that are apart can be read.
        places = sorted(text.xy[0] for text in named)
        assert all(right - left >= 0.15 * widest for left, right in pairwise(places))


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (0.45, "so at no temperature: its best is .* sharpening alone does not explain it"),
        (0.3, "so at no temperature: its best is .* chance may explain it"),
        (0.1, r"The warm start is as right at temperature 0\.\d"),
        (-0.2, "The warm start is more right at every temperature"),
    ],
)
def test_a_gain_is_told_from_sharpening(tmp_path: Path, gain: float, words: str) -> None:
    run = load_run(make_run(tmp_path / "run", gain=gain, steps=1, gallery=0))
    (sharp,) = (each for each in findings(run) if each.heading == "Understand: as sharp as")
    assert re.search(words, sharp.text)


@pytest.mark.parametrize("fooled", [0.0, 0.4])
def test_a_judge_that_is_gamed_raises_the_alarm(tmp_path: Path, fooled: float) -> None:
    path = make_run(tmp_path / "run", fooled=fooled, steps=1, gallery=0)
    alarms = hacking_alarms(load_run(path))
    assert len(alarms) == (2 if fooled else 0)  # drawings, by their mode and as trained
    text = Page(write_report(path)).text
    assert ("reward hacking" in text) == bool(fooled)
    assert ("ALARM" in text) == bool(fooled)


def test_the_share_of_what_was_clipped_is_that_of_the_policy_phase(run: Run) -> None:
    rows = [row for row in run.metrics if row["phase"] == "grpo"]
    clipped = findings(run)[-1]
    assert clipped.heading == "Clipped"
    for key, what in (("clip/text", "text terms"), ("clip/image", "image steps")):
        share = f"{100 * fmean(row[key] for row in rows):.1f}\N{NO-BREAK SPACE}% of {what}"
        assert share in clipped.text


def test_what_stands_beside_a_run_is_named_and_no_longer_missed(path: Path) -> None:
    folder = path.parent
    others = [
        make_run(folder / "seed1", seed=1, steps=1, gallery=0),
        make_run(folder / "control", seed=2, steps=1, gain=0.0, shuffled=True, gallery=0),
        make_run(folder / "supervised", seed=3, steps=1, gain=0.02, gallery=0),
    ]
    config = others[2] / "config.toml"
    config.write_text(config.read_text() + '\n[run]\nobjective = "supervised"\n')
    run, loaded = load_run(path), [load_run(other) for other in others]
    missed = ("another seed", "supervised continuation", "no control")
    for words, needed in zip(missed, (0, 2, 1), strict=True):
        assert words in " ".join(limits(run, [], compare(run)))
        assert words not in " ".join(limits(run, loaded[needed : needed + 1], compare(run)))
    text = Page(write_report(path, compare=others, output=folder / "beside.html")).text
    assert "labels (supervised continuation)" in text
    assert "shuffled rewards (control)" in text
    assert text.count("Mean of 2 runs") == 1
    alone = Page(write_report(others[2])).text
    assert "Supervised continuation: no reinforcement learning." in alone


def test_a_reward_s_change_is_paired_with_the_same_prompts(tmp_path: Path) -> None:
    """Scores that spread widely and all rise by 0.1: a change between that and nothing is sure."""
    spread = np.random.default_rng(0).normal(size=64)
    for label, rise in (("warm start", 0.0), ("after", 0.1)):
        means = {
            "reward": spread.mean() + rise,
            "reward_error": spread.std() / 8,
            "reward_count": 64,
        }
        row = {f"{key}/generate/mine.py:sharp": value for key, value in means.items()}
        append_row(tmp_path / "evals.jsonl", {"step": int(rise * 10), "label": label, **row})
        scores = {"right": [None] * 64, "reward/mine.py:sharp": (spread + rise).tolist()}
        names = [f"prompt {i}" for i in range(64)]
        append_row(
            tmp_path / "measurements.jsonl",
            Measurement(
                0, label, "generate", AS_TRAINED, {}, 1, names, names, [""] * 64, scores
            ).to_row(),
        )
    (found,) = compare_rewards(load_run(tmp_path))
    assert found.change.difference == pytest.approx(0.1)
    assert found.change.interval == pytest.approx((0.1, 0.1))
    (tmp_path / "measurements.jsonl").unlink()
    (unpaired,) = compare_rewards(load_run(tmp_path))
    assert unpaired.change.interval.low < 0
