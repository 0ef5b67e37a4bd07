"""A study goes on with the settings it began with, and says in one line which differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from runs.tiny import OVERRIDES, command

from lvrpo.cli import studies
from lvrpo.runs.config_file import load_config
from lvrpo.runs.directory import RunDirectoryError, locked
from lvrpo.runs.preflight import check_config
from lvrpo.studies import directory as study_directory
from lvrpo.studies.catalogue import STUDIES
from lvrpo.studies.directory import open_study
from lvrpo.studies.study import Arm, Study
from lvrpo.trainer.config import ConfigError

STUDY = Study(
    "made-up",
    "Made up",
    "Does it run?",
    base=Arm("base", "the base", ("loss.text_kl=0.1",)),
    arms=(Arm("one", "one", ("loss.text_kl=0.5",)),),
    settings=("run.steps=7",),
)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch) -> None:
    """Whether a configuration can be run takes a second to find, and is asked once below."""
    monkeypatch.setattr(study_directory, "check_config", lambda config: None)


def begin(directory: Path, study: Study = STUDY, *overrides: str, seeds: int | None = None) -> int:
    """How many runs there are."""
    with open_study(directory, study, list(overrides), seeds) as runs:
        return len(runs)


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files if p.name != ".lock"}


@pytest.fixture
def begun(tmp_path) -> Path:
    assert begin(tmp_path / "study", STUDY, *OVERRIDES, seeds=2) == 4
    return tmp_path / "study"


def test_it_goes_on_whatever_is_not_named(begun):
    before = contents(begun)
    assert begin(begun) == 4
    assert begin(begun, STUDY, "run.steps=3", "model.layers=1", seeds=2) == 4
    assert contents(begun) == before


def test_what_is_named_wins_over_the_study_and_an_arm_over_both(tmp_path):
    begin(tmp_path / "a")
    assert load_config(tmp_path / "a" / "base.toml").run.steps == 7
    begin(tmp_path / "b", STUDY, "run.steps=9", "loss.text_kl=0.3")
    base = load_config(tmp_path / "b" / "base.toml")
    assert (base.run.steps, base.loss.text_kl) == (9, 0.1)
    assert base.run.threads == 1


def test_a_file_wins_over_the_study_and_what_is_named_over_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("run = { steps = 11, eval_items = 5 }\nloss = { text_kl = 0.3 }\n")
    directory = tmp_path / "study"
    with open_study(directory, STUDY, ["run.eval_items=6"], config=file):
        base = load_config(directory / "base.toml")
    assert (base.run.steps, base.run.eval_items, base.loss.text_kl) == (11, 6, 0.1)
    assert begin(directory) == 10
    file.write_text("run = { steps = 12 }\n")
    with (
        pytest.raises(ConfigError, match=r"run\.steps is 11 there, 12 here"),
        open_study(directory, STUDY, [], config=file),
    ):
        pass


@pytest.mark.parametrize("seeds", [3, 9])
def test_seeds_may_be_added_and_never_removed(begun, seeds):
    assert begin(begun, seeds=seeds) == 2 * seeds
    assert begin(begun) == 2 * seeds
    before = contents(begun)
    with pytest.raises(ConfigError, match=f"--seeds is 2, but {begun} has {seeds} seeds"):
        begin(begun, seeds=2)
    assert contents(begun) == before


OTHERS = {
    "another study": ({"name": "else"}, "has the study made-up, expected else"),
    "one arm more": (
        {"arms": (*STUDY.arms, Arm("two", "two"))},
        "another arm two: none there, the defaults here",
    ),
    "one arm less": ({"arms": ()}, "another arm one: loss.text_kl=0.5 there, none here"),
    "another setting of an arm": (
        {"arms": (Arm("one", "one", ("loss.text_kl=0.6",)),)},
        "another arm one: loss.text_kl=0.5 there, loss.text_kl=0.6 here",
    ),
    "another base": ({"base": Arm("base", "")}, "another arm base"),
    "other settings": ({"settings": ()}, "other settings: run.steps=7 there, the defaults here"),
}


@pytest.mark.parametrize(("change", "said"), OTHERS.values(), ids=OTHERS)
def test_another_definition_is_refused(begun, change, said):
    before = contents(begun)
    with pytest.raises(RunDirectoryError, match=said):
        begin(begun, dataclasses.replace(STUDY, **change))
    assert contents(begun) == before


def test_words_of_a_study_may_change(begun):
    arm = dataclasses.replace(STUDY.arms[0], title="another title")
    changed = dataclasses.replace(STUDY, title="t", question="q", arms=(arm,))
    assert begin(begun, changed) == 4


@pytest.mark.parametrize("setting", ["run.steps=4", "model.hidden=32", "loss.preset=dapo"])
def test_another_setting_is_refused_by_its_key(begun, setting):
    before = contents(begun)
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]} is .* there, .* here"):
        begin(begun, STUDY, setting)
    assert contents(begun) == before


def test_another_format_is_refused(begun):
    (begun / "version.json").write_text(json.dumps({"format": 1, "lvrpo": "0.0.9"}))
    with pytest.raises(RunDirectoryError, match=r"written by lvrpo 0\.0\.9 in format 1"):
        begin(begun)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seeds": 2}', '{"study": "made-up"}'])
def test_a_damaged_record_is_named(begun, text):
    (begun / "study.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"study\.json is damaged"):
        begin(begun)


def test_a_study_is_of_one_process(begun):
    with locked(begun), pytest.raises(RunDirectoryError, match="in use by another process"):
        begin(begun)


@pytest.mark.parametrize("wrong", ["nothing", "loss.preset=gpro", "loss.none=1", "run.seed=3"])
def test_wrong_settings_create_nothing(tmp_path, wrong):
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        begin(tmp_path / "study", STUDY, wrong)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", [name for name, each in STUDIES.items() if each.skills])
@pytest.mark.parametrize("skill", ["understand", "generate"])
def test_a_study_needs_the_prompts_that_its_arms_differ_by(tmp_path, name, skill):
    study, without = STUDIES[name], [f"rollout.{skill}_prompts=0"]
    if skill not in study.skills:
        assert begin(tmp_path / "new", study, *OVERRIDES, *without)
        return
    with pytest.raises(ConfigError, match=f"rollout.{skill}_prompts is 0, expected at least 1 for"):
        begin(tmp_path / "new", study, *OVERRIDES, *without)
    assert not (tmp_path / "new").exists()


def test_what_is_no_study_stays_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"has mine\.txt, no study\.json"):
        begin(tmp_path / "folder")
    with pytest.raises(RunDirectoryError, match="is a file"):
        begin(tmp_path / "file")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine.txt"]


def test_a_study_that_was_killed_before_it_began_begins_anew(begun):
    (begun / "study.json").unlink()
    assert begin(begun, STUDY, "run.steps=4", seeds=1) == 2


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_arm_of_every_study_can_be_run_and_differs_from_the_others(study):
    resolved = []
    for arm in study.all_arms:
        config = load_config(overrides=[*study.settings, *study.base.settings, *arm.settings])
        check_config(config)
        resolved.append(config)
    assert all(each not in resolved[:i] for i, each in enumerate(resolved))
    names = [arm.name for arm in study.all_arms]
    assert len(set(names)) == len(names)


def test_every_study_has_its_command():
    assert set(STUDIES) <= {each.name for each in studies.registered_commands}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "-1"), "run.steps is -1, expected an integer"),
        (("--set", "run.step=1"), "unknown key run.step"),
        (("--set", "run.seed=1"), "give --seeds"),
    ],
)
def test_wrong_input_of_the_command_is_one_line_and_exit_2(tmp_path, name, arguments, said):
    result = command("study", name, tmp_path / "study", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()
