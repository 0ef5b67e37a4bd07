"""The documentation runs: Python blocks are executed, commands and links have to exist."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "kernels/README.md"])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    found = FENCE.findall(path.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def commands() -> list[list[str]]:
    """Every command of a bash block, once."""
    lines = [
        line.removeprefix("$ ")
        for path in PAGES
        for block in blocks(path, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    split = (shlex.split(line, comments=True) for line in lines)
    parts = (command for command in split if command)
    # PYTHON=python3.12 make test
    stripped = ([w for i, w in enumerate(p) if "=" not in w or i > 0] for p in parts)
    return [list(command) for command in dict.fromkeys(tuple(c) for c in stripped if c)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run(page, tmp_path):
    # One process per page: its blocks build on each other, as they do for a reader.
    code = "\n".join(blocks(page, "python"))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    for command in commands():
        program, *arguments = command
        words = [word for word in arguments if not word.startswith("-") and "=" not in word]
        if program == "make":
            assert set(words) <= targets, command
        elif program.endswith("pytest"):
            missing = [word for word in words if "/" in word and not (ROOT / word).exists()]
            assert not missing, command
        elif program.endswith("python") and arguments[:1] == ["-m"]:
            assert importlib.util.find_spec(arguments[1]) is not None, command
        elif "/" in program and not program.startswith(".venv/"):
            assert (ROOT / program).exists(), command


def test_our_own_commands_take_these_options():
    lvrpo = [command[1:] for command in commands() if Path(command[0]).name == "lvrpo"]
    by_subcommand: dict[str, set[str]] = {}
    for subcommand, *arguments in lvrpo:
        if subcommand == "study":  # a group of commands
            subcommand = f"study {arguments[0]}"
        flags = {word.partition("=")[0] for word in arguments if re.match("--?[a-z]", word)}
        by_subcommand.setdefault(subcommand, set()).update(flags)
    for subcommand, flags in by_subcommand.items():
        words = [*subcommand.split(), "--help"]
        command = [sys.executable, "-c", "from lvrpo.cli import main; main()", *words]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"lvrpo {subcommand}: {result.stderr}"
        missing = {flag for flag in flags if not re.search(rf"{flag}\b", result.stdout)}
        assert not missing, f"lvrpo {subcommand} has no {missing}"


def configurations() -> list[tuple[str, str]]:
    """Every toml block, by page."""
    return [(name_of(page), text) for page in PAGES for text in blocks(page, "toml")]


@pytest.mark.parametrize(("page", "text"), configurations(), ids=lambda value: value[:24])
def test_toml_blocks_are_configurations(page, text, tmp_path):
    """Known keys and values in their bounds; what needs no file of the reader's would start."""
    config = pytest.importorskip("lvrpo.runs.config_file", reason="the trainer's extra is missing")
    from lvrpo.runs.preflight import check_config

    (tmp_path / "page.toml").write_text(text, encoding="utf-8")
    loaded = config.load_config(tmp_path / "page.toml")
    if loaded.data.source == "scenes":
        check_config(loaded)


def test_settings_on_a_command_line_are_configurations():
    config = pytest.importorskip("lvrpo.runs.config_file", reason="the trainer's extra is missing")
    tested = 0
    for program, *arguments in commands():
        if Path(program).name == "lvrpo":
            values = itertools.pairwise(arguments)
            overrides = [value for flag, value in values if flag in ("--set", "-s")]
            config.load_config(overrides=overrides)
            tested += len(overrides)
    assert tested


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", text))
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing
