"""Without a package of an extra: one line that says what to install, and never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs.tiny import OVERRIDES, settings

from lvrpo import info

#: The first argument is a package that nobody finds from here on.
BLOCKER = """
import runpy, sys

BLOCKED = sys.argv.pop(1)

class WithoutIt:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != BLOCKED:
            return self.finder.find_spec(name, path, target)

    def find_distributions(self, *arguments, **options):
        find = getattr(self.finder, "find_distributions", None)
        return find(*arguments, **options) if find else ()

sys.meta_path[:] = map(WithoutIt, sys.meta_path)
"""
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}
TRAIN, REPORT = info.packages_of("train"), info.packages_of("report")
ONLY_REPORT = [package for package in REPORT if package not in TRAIN]
KERNELS = ["triton", "flash-attn"]


def module_of(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def without(package: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKER + code, module_of(package), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def run_module(package: str, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` without the package."""
    code = f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return without(package, code, *arguments)


def refused(result: subprocess.CompletedProcess[str], package: str) -> None:
    assert result.returncode == 2, result.stderr
    *warnings, line = result.stderr.splitlines()
    assert line == (
        f"lvrpo: not installed: {package}; the trainer and the command need: "
        "pip install 'lvrpo[train]'"
    )
    assert "Traceback" not in result.stderr
    assert not warnings or package == "numpy"  # torch itself warns about a missing numpy


def test_the_list_is_that_of_the_project():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for package in TRAIN + REPORT:
        assert f'"{package}>=' in text
    assert {"typer", "einops", "tensorboard", "pillow", "pydantic"} <= set(TRAIN)
    assert {"jinja2", "matplotlib", "statsmodels"} <= set(REPORT)
    assert not {"jinja2", "matplotlib"} & set(TRAIN)


@pytest.mark.parametrize("package", TRAIN)
def test_the_command_says_what_to_install(package, tmp_path):
    refused(run_module(package, "lvrpo", "train", tmp_path / "run"), package)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "x"], []])
def test_every_command_without_typer(arguments):
    refused(run_module("typer", "lvrpo", *arguments), "typer")


@pytest.mark.parametrize("package", ["typer", "numpy", "einops", *KERNELS])
def test_info_needs_torch_only(package):
    result = run_module(package, "lvrpo", "info")
    assert result.returncode == 0, result.stderr
    assert "Optional packages" in result.stdout


@pytest.mark.parametrize("package", KERNELS)
def test_no_kernel_package_is_needed_to_train(package, tmp_path):
    result = run_module(package, "lvrpo", "train", tmp_path / "run", "--print-config")
    assert result.returncode == 0, result.stderr


def test_a_package_that_a_package_needs(tmp_path):
    """joblib is of no extra: scikit-learn brings it, and Python alone knows its name."""
    result = run_module("joblib", "lvrpo", "train", tmp_path / "run", "--set", "run.steps=0")
    assert result.returncode == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("lvrpo: No module named 'joblib")
    assert line.endswith("pip install 'lvrpo[train]'")


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("numpy", "lvrpo.data"),
        ("numpy", "lvrpo.rewards"),
        ("einops", "lvrpo.models.unified.model"),
        ("safetensors", "lvrpo.models.bagel"),
        ("tensorboard", "lvrpo.runs.log"),
    ],
)
def test_importing_names_what_to_install_too(package, module):
    result = without(package, f"import {module}")
    assert result.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: not installed: {package}; the trainer and the command need: "
        "pip install 'lvrpo[train]'"
    )


@pytest.mark.parametrize("package", ONLY_REPORT)
def test_a_report_says_what_to_install(package, tmp_path):
    result = run_module(package, "lvrpo", "report", tmp_path)
    assert (result.returncode, result.stderr) == (
        2,
        f"lvrpo: not installed: {package}; the report needs: pip install 'lvrpo[report]'\n",
    )


@pytest.mark.parametrize("package", ONLY_REPORT)
def test_training_needs_no_package_of_the_report(package, tmp_path):
    short = [*OVERRIDES, "run.steps=1", "warm_start.steps=1"]
    result = run_module(package, "lvrpo", "train", tmp_path / "run", *settings(short))
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"lvrpo: note: no report: not installed: {package}; the report needs: pip install "
        f"'lvrpo[report]', then: lvrpo report {tmp_path / 'run'}"
    )
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "report.html").exists()
