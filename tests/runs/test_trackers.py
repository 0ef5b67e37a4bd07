"""What trackers are told of a run; services are the real ones where they are installed."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs.tiny import OVERRIDES, command, settings

from lvrpo.__main__ import main
from lvrpo.runs.gallery import load_samples, save_samples
from lvrpo.runs.log import read_evals, read_metrics
from lvrpo.runs.trackers import Service, TensorBoard, markdown, open_tracker
from lvrpo.trainer.journal import GalleryItem

RUN = [*OVERRIDES, "run.gallery_every=1"]


def items() -> list[GalleryItem]:
    """A question with two answers, a request with two drawings of a picture."""
    pixels = np.linspace(0, 1, 3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    asked = [
        GalleryItem("understand", "q", "a | b?", 0, pixels[:1], answer, "x", None, scores=scores)
        for answer, scores in (("x", {"exact": 1.0, "mine": None}), ("y", {"exact": 0.0}))
    ]
    drawn = [
        GalleryItem("generate", "g", "red", 0, image, None, None, None, pixels, {"mine": 0.25})
        for image in (pixels, 1 - pixels)
    ]
    return [*asked, *drawn]


class Fake:
    """As much of the interface of wandb, and of trackio, as is used."""

    def __init__(self, name: str) -> None:
        self.name, self.__spec__ = name, ModuleSpec(name, None)
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Fake:
        self.begun = arguments
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        return SimpleNamespace(columns=columns, data=data)

    def Image(self, pixels: np.ndarray, caption: str) -> Any:
        return SimpleNamespace(pixels=pixels, caption=caption)


@pytest.fixture(params=["wandb", "trackio"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)  # type: ignore[arg-type]
    return made


def test_a_table_says_what_there_is():
    assert markdown(items()[:2]).splitlines() == [
        "| prompt | answer | expected | exact |",
        "| --- | --- | --- | --- |",
        "| a \\| b? | x | x | 1 |",
        "| a \\| b? | y | x | 0 |",
    ]
    assert markdown(items()[2:]).splitlines()[0] == "| prompt | mine |"


def test_a_service_is_told_numbers_tables_and_pictures(fake, tmp_path):
    tracker = open_tracker(fake.name, tmp_path, {"run": {"seed": 3}})
    tracker.scalars("grpo", 4, {"loss": 0.5})
    tracker.samples("grpo", 4, "samples", items())
    tracker.close()
    assert fake.begun["config"] == {"run": {"seed": 3}}
    assert fake.begun["resume"] == "allow"
    assert fake.finished == 1
    assert [step for step, _ in fake.logged] == [4, 4, 4]
    numbers, asked, drawn = (values for _, values in fake.logged)
    assert numbers == {"loss": 0.5}
    assert asked["samples/understand"].columns == ["prompt", "answer", "expected", "exact"]
    assert asked["samples/understand"].data[1] == ["a | b?", "y", "x", 0.0]
    # The picture asked about once; the picture to be edited, then the drawings.
    assert set(asked) == {"samples/understand", "samples/understand/0"}
    assert set(drawn) == {"samples/generate", *(f"samples/generate/{n}" for n in range(3))}
    source, first, second = (drawn[f"samples/generate/{n}"].pixels for n in range(3))
    assert source.shape == (4, 6, 3)
    assert source.dtype == np.uint8
    np.testing.assert_array_equal(source, first)
    assert np.abs(255 - second.astype(int) - first).max() <= 1


def test_a_run_that_goes_on_is_the_same_to_a_service(fake, tmp_path):
    def name(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        open_tracker(fake.name, folder, {})
        return str(fake.begun["id" if fake.name == "wandb" else "name"])

    assert name(tmp_path / "a") == name(tmp_path / "a") != name(tmp_path / "b")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_is_not_installed(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lvrpo.info._is_importable", lambda package: package != name)
    overrides = settings([*OVERRIDES, f"run.tracker={name}"])
    monkeypatch.setattr(sys, "argv", ["lvrpo", "train", str(tmp_path / "run"), *overrides])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"lvrpo: not installed: {name}; run.tracker = '{name}' needs: pip install 'lvrpo[{name}]'"
    ]
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_texts_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.samples("grpo", 3, "samples", items())
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "grpo")).Reload()
    tags = {"samples/understand/0/0", *(f"samples/generate/0/{n}" for n in range(3))}
    assert set(events.Tags()["images"]) == tags
    (picture,) = events.Images("samples/generate/0/1")
    assert (picture.step, picture.width, picture.height) == (3, 6, 4)
    (text,) = events.Tensors("samples/understand/text_summary")
    assert text.tensor_proto.string_val[0].decode() == markdown(items()[:2])


def test_a_phase_that_is_begun_again_is_dropped(tmp_path):
    for phase in ("warm_start", "grpo"):
        board = TensorBoard(tmp_path)
        board.scalars(phase, 1, {"loss": 1.0})
        board.close()
    TensorBoard(tmp_path, {"warm_start": 2}, ["grpo", "supervised"])
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["warm_start"]


def test_a_run_tells_its_tracker_steps_evaluations_and_samples(fake, tmp_path):
    run = tmp_path / "run"
    changes = [f"run.tracker={fake.name}", "run.eval_every=1"]
    result = command("train", run, *settings([*RUN, *changes]))
    assert result.exit_code == 0, result.output
    told: dict[str, list[int]] = {}
    for step, values in fake.logged:
        for key in values:
            told.setdefault(key, []).append(step)
    rows = read_metrics(run)
    policy = [row["step"] for row in rows if row["phase"] == "grpo"]
    assert told["time/total"] == [row["step"] for row in rows]
    assert told["samples/understand"] == told["samples/generate"] == policy
    before, *between, after = read_evals(run)
    assert [row["label"] for row in between] == [f"step {step}" for step in policy[:-1]]
    assert (before["label"], after["label"]) == ("warm start", "after")
    assert told["eval/understand/correct"] == [before["step"], *policy]
    assert told["gallery/after/generate"] == policy[-1:]
    steps = [step for step, _ in fake.logged]
    assert steps == sorted(steps), "a service takes no number of an earlier step"
    assert not (run / "tensorboard").exists()
    assert fake.finished == 1
    # What is kept: some samples of the first prompts, the best first.
    assert list(load_samples(run)) == policy
    for found in load_samples(run).values():
        assert {item.task for item in found} == {"understand", "generate"}
        by_prompt: dict[tuple[str, str], list[float]] = {}
        for item in found:
            assert (item.answer is None) == (item.task == "generate")
            total = sum(score for score in item.scores.values() if score is not None)
            by_prompt.setdefault((item.task, item.uid), []).append(total)
        assert len(by_prompt) <= 4
        assert all(len(each) <= 4 for each in by_prompt.values())
        assert all(each == sorted(each, reverse=True) for each in by_prompt.values())


def test_samples_are_those_of_a_run_that_was_not_interrupted(tmp_path):
    def samples() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "run" / "samples").iterdir()}

    kept = settings([*RUN, "run.checkpoint_every=1", "run.keep_checkpoints=9"])
    result = command("train", tmp_path / "run", *kept)
    assert result.exit_code == 0, result.output
    whole, steps = samples(), list(load_samples(tmp_path / "run"))
    save_samples(tmp_path / "run", steps[-1] + 1, items())  # of a future that is not to be
    result = command("train", tmp_path / "run", "--resume-at", steps[0])
    assert result.exit_code == 0, result.output
    assert samples() == whole


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_service_itself_takes_it_offline(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # is read where it is imported
    pytest.importorskip(name, reason=f"pip install 'lvrpo[{name}]'")
    for step in (1, 2):  # and goes on
        tracker = open_tracker(name, tmp_path, {"run": {"seed": 3}})
        assert isinstance(tracker, Service)
        tracker.scalars("grpo", step, {"loss": 0.5})
        tracker.samples("grpo", step, "samples", items())
        tracker.close()
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes >= {".png"}
    assert suffixes & {".wandb", ".db"}
    assert json.loads((tmp_path / "tracker.json").read_bytes())["key"]
