"""What makes a folder a run directory: its lock, and the version that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs.tiny import command

from lvrpo import __version__
from lvrpo.runs.directory import (
    FORMAT,
    VERSION,
    RunDirectoryError,
    locked,
    require_format,
    write_version,
)

OTHERS = {
    "none": (None, "lvrpo 0.1.0 or older in format 1"),
    "older": ({"format": FORMAT - 1, "lvrpo": "0.1.7"}, f"lvrpo 0.1.7 in format {FORMAT - 1}"),
    "newer": ({"format": FORMAT + 1, "lvrpo": "9.0.0"}, f"lvrpo 9.0.0 in format {FORMAT + 1}"),
}


def foreign_run(directory: Path, version: dict | None) -> Path:
    directory.mkdir()
    (directory / "config.toml").write_text("[run]\nkey_of_another_version = 1\n")
    if version is not None:
        (directory / VERSION).write_text(json.dumps(version))
    return directory


@pytest.mark.parametrize(("version", "words"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    "arguments", [("train",), ("train", "--dry-run"), ("eval",), ("sample", "draw 3 at top-left")]
)
def test_a_run_of_another_version_is_refused_in_one_line(tmp_path, arguments, version, words):
    run = foreign_run(tmp_path / "run", version)
    name, *rest = arguments
    result = command(name, run, *rest)
    assert result.exit_code == 2
    assert result.stderr == (
        f"lvrpo: {run} was written by {words}, and this is lvrpo {__version__}, which reads format "
        f"{FORMAT}: go on with that version, or give a new directory\n"
    )


def test_no_run_begins_with_the_warm_start_of_another_version(tmp_path):
    run = foreign_run(tmp_path / "old", None)
    result = command("train", tmp_path / "new", "--from", run)
    assert result.exit_code == 2
    assert f"{run} was written by lvrpo 0.1.0 or older" in result.stderr
    assert not (tmp_path / "new").exists()


def test_this_version_reads_what_it_writes(tmp_path):
    write_version(tmp_path)
    require_format(tmp_path)
    assert json.loads((tmp_path / VERSION).read_bytes()) == {"format": FORMAT, "lvrpo": __version__}


@pytest.mark.parametrize("content", ["", "[1]", "2", "{}"])
def test_a_damaged_version_is_named(tmp_path, content):
    (tmp_path / VERSION).write_text(content)
    with pytest.raises(RunDirectoryError, match=rf"{VERSION} is damaged"):
        require_format(tmp_path)


def test_a_lock_that_is_let_go_can_be_taken_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "run"):
            assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
            with (
                pytest.raises(RunDirectoryError, match="is in use by another process"),
                locked(tmp_path / "run"),
            ):
                pass
