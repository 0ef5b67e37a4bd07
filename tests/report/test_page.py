"""The report: right numbers, self-contained, and never a crash over what a run lacks."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report.page_reader import Page
from report.synthetic_run import eval_row, grpo_row, make_run

from lvrpo.intervals import clustered_mean
from lvrpo.report import charts
from lvrpo.report.comparisons import compare_scores
from lvrpo.report.drawing import DARK, LIGHT, Theme, duration, smooth
from lvrpo.report.page import write_report
from lvrpo.report.summary import collect_alarms
from lvrpo.runs.evals import reward_row
from lvrpo.runs.gallery import save_gallery, save_samples
from lvrpo.runs.log import RunWriter
from lvrpo.trainer.journal import GalleryItem


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits", steps=30)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    control = make_run(run.parent / "control", seed=5, steps=3, gain=0.0, shuffled=True, gallery=0)
    return Page(write_report(run, compare=[control]))


def small_run(path: Path, rows: list[dict[str, object]]) -> Path:
    with RunWriter(path) as writer:
        for row in rows:
            writer.write_metrics(row)
    return path


def test_the_page_is_self_contained(page: Page) -> None:
    assert not re.search(r"(src|srcset|href)=\"(?!data:image/png;base64,|#)", page.source)
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_every_picture_is_a_png_with_words_for_it(page: Page) -> None:
    assert len(page.pictures) > 15
    for picture in page.pictures:
        assert len(picture["alt"] or "") > 10
        encoded = (picture["src"] or "").removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            image.verify()


def test_the_figures_lie_beside_the_page(run: Path, page: Page) -> None:
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert names == {
        "before-after",
        "frontier-understand",
        "frontier-generate",
        "held-out",
        "rewards",
        "scores",
        "reward-shares",
        "constant-groups",
        "kl",
        "ratio",
        "optimiser",
        "warm-start",
        "time-per-stage",
    }


def test_a_run_without_measurements_has_the_counts_of_its_evaluations(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "old", steps=3, measured=False)))
    # 144 and 216 of 512: Wilson and Newcombe by hand.
    for number in ("28.1 %", "24.4 % to 32.2 %", "42.2 %", "38.0 % to 46.5 %", "+14.1"):
        assert number.replace(" %", "\N{NO-BREAK SPACE}%") in page.source
    assert "+8.2 to +19.8" in page.text
    assert "Better: the intervals before and after are apart." in page.text
    assert "pair: whole request right" in page.text
    assert "there is no measurements.jsonl" in page.text
    assert "accuracy against diversity" not in page.text


def test_seed_judge_config_and_versions_are_on_the_page(page: Page) -> None:
    for words in ("seed 0", "98.3", "360 digits", "group_size = 8", "torch 2", "Commit"):
        assert words in page.text


def test_runs_stand_side_by_side(page: Page) -> None:
    assert "Runs side by side" in page.text
    assert "shuffled rewards (control)" in page.text
    assert "Control run" not in page.text  # the page is about the other run


def test_the_gallery_pairs_the_same_prompts(page: Page) -> None:
    assert page.source.count('class="pair"') == 6
    assert page.text.count("wrong") > page.text.count("not saved") == 0


def test_writing_it_again_gives_the_same_page(tmp_path: Path) -> None:
    run = small_run(
        tmp_path / "run", [{"step": s, "reward/generate/r_ins": 1 / s} for s in range(1, 40)]
    )
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_the_control_says_so(tmp_path: Path) -> None:
    run = small_run(tmp_path / "control", [{"step": 1, "grad_norm": 1.0}])
    (run / "config.toml").write_text("[trainer]\nshuffle_rewards = true\n")
    assert "Control run: rewards were shuffled." in Page(write_report(run)).text


def test_a_run_that_just_began_has_a_page(tmp_path: Path) -> None:
    run = small_run(tmp_path / "new", [{"step": 1, "phase": "warm_start", "loss/text": 2.0}])
    text = Page(write_report(run)).text
    for words in (
        "No evaluation was recorded",
        "No gallery was saved",
        "No stage was timed",
        "The config is missing",
        "no environment.json",
    ):
        assert words in text


def test_one_evaluation_is_shown_without_a_comparison(tmp_path: Path) -> None:
    run = tmp_path / "half"
    with RunWriter(run) as writer:
        writer.write_eval(eval_row(0, "warm start", 0.0))
    text = Page(write_report(run)).text
    assert "Only one evaluation was recorded" in text
    assert "144 of 512" in text


def test_damaged_parts_are_said_not_crashed_on(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [{"step": 1, "grad_norm": 1.0}])
    (run / "config.toml").write_text("seed = = 3")
    (run / "environment.json").write_text("{")
    (run / "gallery").mkdir()
    (run / "gallery" / "after.json").write_text('{"label": "after", "items": [{}]}')
    text = Page(write_report(run)).text
    for part in ("config", "environment", "gallery"):
        assert f"The {part} could not be read" in text


def test_names_of_the_users_own_are_drawn(tmp_path: Path) -> None:
    rows = [
        {"step": s, "reward/edit/sharpness": s / 9, "reward/generate/mine": 0.5, "time/brew": 0.1}
        for s in range(1, 4)
    ]
    with RunWriter(tmp_path / "own") as writer:
        for row in rows:
            writer.write_metrics(row)
        for step, label in ((0, "warm start"), (3, "after")):
            writer.write_eval({"step": step, "label": label, "edit/sharp": 3, "edit/total": 8})
    page = Page(write_report(tmp_path / "own"))
    drawn = " ".join(picture["alt"] or "" for picture in page.pictures)
    for name in ("Edit, sharpness: 0.111 at first, 0.333 at last", "mine", "brew 100 ms (100%)"):
        assert name in drawn
    assert "Edit: sharp" in page.text


def test_markup_in_prompts_and_configs_is_text(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [{"step": 1, "alarm": "<b>late</b>"}])
    (run / "config.toml").write_text('name = "</pre><script>alert(1)</script>"\n')
    evil = '"><script>alert(2)</script>'
    image = np.zeros((3, 4, 4), dtype=np.float32)
    save_gallery(run, "after", [GalleryItem("generate", "g", evil, 0, image, evil, evil, True)])
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "not saved" in page.text  # there is no picture before


def test_alarms_are_gathered_by_message_with_their_steps() -> None:
    zero = "every advantage is zero"
    rows = [
        {"step": 1, "alarm": [zero], "loss/text": 1.0},
        {"step": 2, "loss/text": float("nan"), "reward/understand/r_sem": float("nan")},
        {"step": 3, "alarms": [zero, "clip below the noise floor"]},
    ]
    found = {alarm.message: alarm.steps for alarm in collect_alarms(rows)}
    assert found == {
        zero: [1, 3],
        "loss/text is not a finite number": [2],
        "clip below the noise floor": [3],
    }


def test_verdicts_follow_the_intervals() -> None:
    def verdict(before: int, after: int) -> tuple[str, str]:
        rows = [{"step": 0, "a/correct": n, "a/total": 1000} for n in (before, after)]
        return compare_scores(*rows)[0].verdict

    assert verdict(280, 390) == ("better", "Better: the intervals before and after are apart")
    assert verdict(390, 280)[0] == "worse"
    assert verdict(280, 325) == (
        "better",
        "Better, though the intervals before and after overlap",
    )
    assert verdict(280, 290)[0] == "unclear"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a directory"),
        (lambda path: path.mkdir(), "is not a run directory"),
        (lambda path: small_run(path, []) and (path / "config.toml").touch(), "has no rows yet"),
    ],
)
def test_what_is_not_a_run_is_refused_in_one_line(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(ValueError, match=message) as refusal:
        write_report(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (path / "report.html").exists()


def test_stage_times_add_up_to_the_step() -> None:
    random = np.random.default_rng(0)
    rows = [grpo_row(step, 0.0, random) for step in range(1, 5)]
    rows[0]["time/evaluate"] = 0.04  # once in four steps: 0.01 of a mean step
    chart = charts.time_chart(rows)
    assert chart is not None
    shares = [int(share) for share in re.findall(r"\((\d+)%\)", chart.alt)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=len(shares))
    assert "evaluate 10 ms" in chart.alt


def test_smoothing_keeps_a_constant_and_leaves_out_nan() -> None:
    values = np.full(50, 2.0)
    values[7] = np.nan
    np.testing.assert_allclose(smooth(values), 2.0)
    np.testing.assert_array_equal(smooth(values[:5]), values[:5])


def test_a_reward_has_one_colour_and_no_two_share_one() -> None:
    names = ["mine", "r_ins", "r_sem", "a", "b"]
    rows = [
        {
            "step": step,
            f"{kind}/understand/r_sem": 0.5,
            **{f"{kind}/generate/{n}": 0.5 for n in names},
        }
        for step in (1, 2)
        for kind in ("reward", "share")
    ]
    seen: dict[str, set[str]] = {}
    for chart in charts.training_charts(rows, []):
        for axes in chart.draw(LIGHT).axes:
            for label in axes.texts:
                seen.setdefault(label.get_text().split()[0], set()).add(label.get_color())
    assert seen.keys() == set(names)
    assert all(len(colours) == 1 for colours in seen.values())
    assert len(set.union(*seen.values())) == len(names)


def test_there_are_colours_for_any_number_of_lines() -> None:
    assert LIGHT.line(len(LIGHT.lines)) == LIGHT.line(0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2e-5, "20 us"),
        (0.0123, "12.3 ms"),
        (1.5, "1.5 s"),
        (250, "4 min 10 s"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_every_name_written_in_a_colour_can_be_read(theme: Theme) -> None:
    for colour in (*theme.lines, theme.ink, theme.muted):
        low, high = sorted((luminance(colour), luminance(theme.surface)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_the_learning_rate_is_what_was_set_and_not_a_mean_of_it() -> None:
    rows = [{"step": s, "lr": 1e-4 * (1 - s / 100), "grad_norm": s % 7} for s in range(1, 100)]
    chart = charts._optimiser_chart(rows)
    axes = chart.draw(LIGHT).axes
    rate = next(each for each in axes if each.get_title() == "Learning rate")
    (label,) = (text.get_text() for text in rate.texts)
    assert label == "rate  1e\N{MINUS SIGN}6"


def test_steps_without_a_signal_have_no_share() -> None:
    shares = [(0.75, 0.25), (0.0, 0.0), (0.25, 0.75), (0.0, 0.0), (0.0, 0.0)]
    rows = [
        {"step": step, "share/generate/a": a, "share/generate/b": b}
        for step, (a, b) in enumerate(shares * 6, 1)
    ]
    chart = charts._share_chart(rows)
    assert "a: 75% at first, 25% at last" in chart.alt
    texts = [text.get_text() for text in chart.draw(LIGHT).axes[0].texts]
    assert sum(int(re.search(r"(\d+)%", text)[1]) for text in texts) == 100


def test_rewards_of_the_users_own_have_a_before_and_an_after(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    name = "mine/my_rewards.py:colour"
    with RunWriter(tmp_path / "own") as writer:
        for step, label, lift in ((0, "warm start", 0.0), (3, "after", 0.5)):
            mean = clustered_mean((lift + rng.normal(size=400)).tolist(), range(400))
            row = {"step": step, "label": label, **reward_row("generate", name, mean)}
            writer.write_eval(row)
    text = Page(write_report(tmp_path / "own")).text
    assert "my_rewards.py:colour" in text
    assert "Better: the intervals before and after are apart." in text
    assert "No evaluation was recorded" not in text
    assert "Judge of the pictures" not in text


def test_the_page_for_a_keyboard_and_for_words(page: Page) -> None:
    scrollers = re.findall(r'<div class="scroll"([^>]*)>', page.source)
    assert scrollers
    assert all('tabindex="0"' in each and 'role="region"' in each for each in scrollers)
    assert "Generate: low-noise drawings right" in page.text
    assert "<details open" not in page.source


def test_samples_of_training_are_shown_with_their_scores(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [{"step": 1, "grad_norm": 1.0}])
    evil = "<b>red</b>"
    for step in range(1, 21):
        shade = np.full((3, 4, 4), step / 20, dtype=np.float32)
        drawn = [
            GalleryItem("generate", "g", evil, 0, shade, None, None, None, 1 - shade, {"mine": s})
            for s in (0.75, None)
        ]
        told = GalleryItem("understand", "q", "which", 0, None, f"word {step}", "x", None)
        save_samples(run, step, [*drawn, told])
    page = Page(write_report(run))
    shown = [int(number) for number in re.findall(r"<h3>Step (\d+)</h3>", page.source)]
    assert (shown[0], shown[-1], len(shown)) == (1, 20, 6)
    assert "14 more steps" in page.text
    assert "b" not in page.tags
    assert "word 20" in page.text
    assert "word 2 " not in page.text
    assert "mine 0.75" in page.text
    assert "mine none" in page.text
    alts = [picture["alt"] for picture in page.pictures]
    assert alts.count("the picture to be edited") == 6
    assert alts.count(f"drawn: {evil}") == 12
    (run / "samples" / "step-000000020.json").write_text("{")
    assert "The samples could not be read" in Page(write_report(run)).text
