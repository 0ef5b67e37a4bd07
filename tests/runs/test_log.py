"""The logs of a run: exact under kills and resumes, strict about damage, true intervals."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from lvrpo import info
from lvrpo.intervals import (
    clustered_mean,
)
from lvrpo.runs import gallery
from lvrpo.runs.environment import environment, read_environment, write_environment
from lvrpo.runs.evals import reward_row
from lvrpo.runs.gallery import (
    drop_samples,
    load_gallery,
    load_samples,
    save_gallery,
    save_samples,
)
from lvrpo.runs.log import RunWriter, read_evals, read_metrics
from lvrpo.runs.scores import eval_rewards, eval_scores
from lvrpo.runs.trackers import TensorBoard
from lvrpo.trainer.journal import GalleryItem


def write_steps(writer: RunWriter, steps: range, phase: str = "grpo") -> None:
    for step in steps:
        writer.write_metrics({"step": step, "phase": phase, "loss/total": 1 / step})


def log_bytes(run_dir: Path) -> bytes:
    return (run_dir / "metrics.jsonl").read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The log of a run that nobody interrupted: five warm-start steps, eight GRPO steps."""
    with RunWriter(tmp_path / "whole") as writer:
        write_steps(writer, range(1, 6), "warm_start")
        write_steps(writer, range(1, 9))
    return log_bytes(tmp_path / "whole")


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    row = {"step": 3, "phase": "grpo", "kl/text": 0.1 + 0.2, "alarm": ["one", "two"], "n": 7}
    with RunWriter(tmp_path) as writer:
        writer.write_metrics(row)
    assert read_metrics(tmp_path) == [row]
    assert read_evals(tmp_path) == []


def test_tensors_become_numbers_and_nan_stays_valid_json(tmp_path: Path) -> None:
    row = {"step": 1, "a": torch.tensor(0.5), "b": np.float32(0.25), "c": math.inf, "d": math.nan}
    with RunWriter(tmp_path) as writer:
        writer.write_metrics(row)
    assert b"NaN" not in log_bytes(tmp_path)
    assert b"Infinity" not in log_bytes(tmp_path)
    (read,) = read_metrics(tmp_path)
    assert (read["a"], read["b"]) == (0.5, 0.25)
    assert math.isnan(read["c"])
    assert math.isnan(read["d"])


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"loss": 1.0}, "int step"),
        ({"step": 1, "phase": "sft"}, "'sft'"),
        ({"step": 1, "nested": {"a": 1}}, "nested of a log row is a dict"),
    ],
)
def test_a_row_that_could_not_be_read_back_is_refused(
    tmp_path: Path, row: dict[str, object], named: str
) -> None:
    writer = RunWriter(tmp_path)
    with pytest.raises(ValueError, match=named):
        writer.write_metrics(row)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_half_written_line_is_dropped(tmp_path: Path, whole: bytes, cut: int) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-cut])
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps[-1] < 8
    assert steps == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7, 8][: len(steps)]


@pytest.mark.parametrize(
    ("phase", "step", "behind"),  # what the checkpoint holds, and how many rows lie behind it
    [("warm_start", 0, 0), ("warm_start", 3, 3), ("grpo", 0, 5), ("grpo", 4, 9), ("grpo", 8, 13)],
)
def test_a_killed_and_resumed_run_leaves_the_same_log(
    tmp_path: Path, whole: bytes, phase: str, step: int, behind: int
) -> None:
    earliest = len(b"\n".join(whole.split(b"\n")[:behind])) + 1
    for killed_at in range(earliest, len(whole) + 1, 29):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:killed_at])
        with RunWriter(tmp_path, resume_from=step, phase=phase) as writer:
            if phase == "warm_start":
                write_steps(writer, range(step + 1, 6), phase)
            write_steps(writer, range(1 if phase == "warm_start" else step + 1, 9))
        assert log_bytes(tmp_path) == whole


def test_a_new_run_does_not_overwrite_a_log(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    with pytest.raises(ValueError, match="already has a log"):
        RunWriter(tmp_path)
    assert log_bytes(tmp_path) == whole


def test_damage_in_the_middle_names_file_and_line(tmp_path: Path, whole: bytes) -> None:
    lines = whole.split(b"\n")
    lines[2] = lines[2][:-5]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: "):
        read_metrics(tmp_path)


def test_an_evaluation_made_again_counts_once(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        for correct in (3, 4):
            writer.write_eval(
                {"step": 0, "label": "warm start", "a/correct": correct, "a/total": 9}
            )
        writer.write_eval({"step": 8, "label": "after", "a/correct": 5, "a/total": 9})
    assert [row["a/correct"] for row in read_evals(tmp_path)] == [4, 5]


def test_a_full_disk_leaves_no_part_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self) -> FullDisk:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            return self.file.write(data[:4])

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    with RunWriter(tmp_path) as writer:
        write_steps(writer, range(1, 3))
        before = log_bytes(tmp_path)
        open_file = Path.open
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *args, **kw: FullDisk(open_file(*args, **kw)))
            with pytest.raises(OSError, match="No space left"):
                write_steps(writer, range(3, 4))
    assert log_bytes(tmp_path) == before


def test_scores_are_found_by_their_totals() -> None:
    row = {
        "step": 1,
        "label": "after",
        "generate/strict": 30,
        "generate/partial": 0.5,
        "generate/total": 100,
        "generate/pair/strict": 7,
        "generate/pair/total": 20,
        "understand/correct": 3,
        "generate/note": "x",
        "generate/broken": math.nan,
    }
    found = {score.name: (score.successes, score.total) for score in eval_scores(row)}
    assert found == {
        "generate/strict": (30, 100),
        "generate/partial": (50, 100),
        "generate/pair/strict": (7, 20),
    }


def test_tensorboard_has_the_scalars_of_each_phase(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunWriter(tmp_path, tracker=TensorBoard(tmp_path)) as writer:
        write_steps(writer, range(1, 3), "warm_start")
        write_steps(writer, range(1, 5))
    with RunWriter(tmp_path, resume_from=2, tracker=TensorBoard(tmp_path, {"grpo": 3})) as writer:
        writer.write_metrics({"step": 3, "loss/total": 9.0})
        writer.write_eval({"step": 3, "label": "after", "a/correct": 3, "a/total": 4})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "grpo")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3]
    assert events.Scalars("eval/a/correct")[0].value == 0.75


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gallery_comes_back(tmp_path: Path, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (channels, 4, 6)).astype(np.float32) / 255
    item = GalleryItem("understand", "u1", "how many?", 5, image, "2", "3", False)
    path = save_gallery(tmp_path, "warm start", [item])
    assert path.name == "warm-start.json"
    assert json.loads(path.read_bytes())["label"] == "warm start"
    (read,) = load_gallery(tmp_path)["warm start"]
    np.testing.assert_array_equal(read.image, image)
    assert {**asdict(read), "image": 0} == {**asdict(item), "image": 0}


def sampled(number: int, side: int = 4) -> list[GalleryItem]:
    """Two drawings of one picture, and an answer about another."""
    draw = np.random.default_rng(number)
    first, second, source = draw.random((3, 3, side, side)).astype(np.float32)
    scores = {"r_ins": 0.5, "mine": None}
    kept = {"source": source, "scores": scores}
    return [
        GalleryItem("generate", "g", "red", 0, first, None, None, None, **kept),
        GalleryItem("generate", "g", "red", 0, second, None, None, None, **kept),
        GalleryItem("understand", "u", "what", 0, source, "a", "b", None, scores={"exact": 0.0}),
    ]


def test_samples_of_training_come_back_and_go_with_their_steps(tmp_path: Path) -> None:
    for step in (1, 21, 41):
        save_samples(tmp_path, step, sampled(step))
    drop_samples(tmp_path, 21)
    found = load_samples(tmp_path)
    assert list(found) == [1, 21]
    for step, items in found.items():
        for ours, given in zip(items, sampled(step), strict=True):
            for name in ("image", "source"):
                pixels = getattr(given, name)
                if pixels is not None:
                    kept = np.rint(getattr(ours, name) * 255)
                    np.testing.assert_array_equal(kept, np.rint(pixels * 255))
            told = {"image": 0, "source": 0}
            assert {**asdict(ours), **told} == {**asdict(given), **told}
    # The picture that all three share is one file.
    assert len(list((tmp_path / "samples").glob("step-000000021-*.png"))) == 3
    assert not list((tmp_path / "samples").glob("*41*"))


def test_samples_are_bounded_in_number_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MOST_STEPS", 5)
    for step in range(1, 40):
        save_samples(tmp_path, step, sampled(step))
        found = list(load_samples(tmp_path))
        assert len(found) <= 5
        assert (found[0], found[-1]) == (1, step)
    names = {path.stem.split("-")[1] for path in (tmp_path / "samples").iterdir()}
    assert len(names) == len(found)  # no picture is left behind
    monkeypatch.setattr(gallery, "MOST_STEPS", 10**6)
    monkeypatch.setattr(gallery, "MOST_BYTES", 40_000)
    for step in range(1, 30):
        save_samples(tmp_path / "bytes", step, sampled(step, side=32))
        kept = sum(path.stat().st_size for path in (tmp_path / "bytes" / "samples").iterdir())
        assert kept < 60_000
    monkeypatch.setattr(gallery, "SIDE", 16)
    save_samples(tmp_path / "small", 1, sampled(1, side=32))
    assert load_samples(tmp_path / "small")[1][0].image.shape == (3, 16, 16)


def test_a_picture_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    item = GalleryItem("generate", "g7", "", 0, np.zeros((4, 4)), None, None, True)
    with pytest.raises(ValueError, match="image of g7 has shape"):
        save_gallery(tmp_path, "after", [item])


def test_the_environment_is_written_even_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    found = environment(seed=3)
    assert found["commit"] is None
    assert found["seed"] == 3
    assert found["versions"]["torch"] == torch.__version__
    write_environment(tmp_path, judge_accuracy=0.98)
    assert read_environment(tmp_path)["judge_accuracy"] == 0.98
    assert read_environment(tmp_path / "nowhere") == {}


def test_the_commit_of_a_foreign_checkout_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": None, "describe": "f" * 12}
    monkeypatch.setattr(info, "_git", lambda *a: answers[a[0]])
    assert environment()["commit"] is None


def test_rewards_of_an_evaluation_come_back(tmp_path: Path) -> None:
    name = "mine/my_rewards.py:colour"
    mean = clustered_mean([0.25, 0.5, -3.0], [0, 1, 2])
    lone = clustered_mean([2.0], [0])
    with RunWriter(tmp_path) as writer:
        row = {"step": 3, "label": "after", "generate/strict": 1, "generate/total": 3}
        writer.write_eval(
            row | reward_row("generate", name, mean) | reward_row("understand", "total", lone)
        )
    (row,) = read_evals(tmp_path)
    found = eval_rewards(row)
    assert found["generate", name] == mean
    assert (found["understand", "total"].value, found["understand", "total"].count) == (2.0, 1)
    assert math.isnan(found["understand", "total"].error)
    assert [score.name for score in eval_scores(row)] == ["generate/strict"]
