"""What is published works where it is installed: sdist and wheel, and setup.py's decisions."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lvrpo.backends import library

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run without this session's import path and with exactly these variables of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LVRPO_", "PYTHONPATH"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def succeed(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files; building in place would find what earlier builds left."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = succeed("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    copy = tmp_path_factory.mktemp("source")
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, source)
    succeed(*build, cwd=out, LVRPO_BUILD="off")
    return next(out.glob("*.tar.gz"))


def build_wheel(sdist: Path, out: Path, **environment: str) -> Path:
    """The wheel of the unpacked sdist, which is how pip builds it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(out)
    unpacked = next(path for path in out.iterdir() if path.is_dir())
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, unpacked)
    succeed(*build, cwd=out, **environment)
    return next(out.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel, which sees the packages of this one; its interpreter."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    succeed(*pip, "--no-index", wheel, cwd=folder.parent)
    site = succeed(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    # A folder named in a .pth file is searched last and its own .pth files are not read, so an
    # editable install of this checkout stays out of sight.
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(site.strip(), "host.pth").write_text("\n".join(packages) + "\n")
    return python


def test_sdist_holds_what_a_build_and_the_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, suffixes in {
        "csrc": (".h", ".cuh", ".cpp", ".cu"),
        "kernels": (".py", ".md"),
        "lvrpo": (".py", ".typed", ".jinja"),
        "tests": (".py",),
        "benchmarks": (".py",),
        "docs": (".md",),
    }.items():
        here = (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and p.is_file())
        assert {str(path.relative_to(ROOT)) for path in here} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


OP = """
import pathlib, sys, torch, lvrpo, lvrpo.kernels
assert pathlib.Path(lvrpo.__file__).is_relative_to(sys.prefix), lvrpo.__file__
assert (pathlib.Path(*lvrpo.kernels.__path__) / "README.md").is_file()
logits = torch.randn(4, 100, requires_grad=True)
logprobs = lvrpo.gather_logprobs(logits, torch.arange(4), backend=sys.argv[1])
logprobs.sum().backward()
expected = torch.log_softmax(logits, dim=-1).diagonal()
torch.testing.assert_close(logprobs, expected)
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)
def test_wheel_with_the_extension_runs_outside_the_repository(sdist, tmp_path):
    wheel = build_wheel(sdist, tmp_path, LVRPO_BUILD="cpu")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"lvrpo", next(root for root in roots if root.endswith(".dist-info"))}
    assert any(name.startswith("lvrpo/_C.") for name in names)
    assert {"lvrpo/py.typed", "lvrpo/kernels/README.md"} <= set(names)

    python = install(wheel, tmp_path / "venv")
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    succeed(python, "-c", OP, "cpp", cwd=elsewhere)
    assert "cpp, torch" in succeed(python, "-m", "lvrpo.info", cwd=elsewhere)
    assert "train" in succeed(tmp_path / "venv/bin/lvrpo", "--help", cwd=elsewhere)


def test_wheel_without_the_extension_runs_the_reference_and_says_so(sdist, tmp_path):
    wheel = build_wheel(sdist, tmp_path, LVRPO_BUILD="off")
    python = install(wheel, tmp_path / "venv")
    succeed(python, "-c", OP, "torch", cwd=tmp_path)
    refused = run(python, "-c", OP, "cpp", cwd=tmp_path)
    assert "lvrpo._C is not built" in refused.stderr


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, which has built nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LVRPO_BUILD", "off")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    return runpy.run_path(str(ROOT / "setup.py"))


def torch_like(version: str = "2.13.0", cuda: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda))


def test_what_the_extension_lacks(setup_script, monkeypatch, tmp_path):
    why = setup_script["why_no_extension"]
    assert "torch is not importable" in why(None)
    assert "torch is 2.9.1" in why(torch_like("2.9.1+cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "'no-such-compiler'" in why(torch_like())
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in why(torch_like())


def test_what_the_cuda_ops_lack(setup_script, monkeypatch, tmp_path):
    why = setup_script["why_no_cuda"]
    monkeypatch.setitem(why.__globals__, "CUDA_SOURCES", [])
    assert "no CUDA sources" in why(torch_like(cuda="13.0"), None)
    monkeypatch.setitem(why.__globals__, "CUDA_SOURCES", ["csrc/cuda/op.cu"])
    assert "CPU build" in why(torch_like(), tmp_path)
    assert "nvcc is not found" in why(torch_like(cuda="13.0"), None)
    assert "nvcc is not found" in why(torch_like(cuda="13.0"), tmp_path)
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.8, V12.8.93\n")
    nvcc.chmod(0o755)
    assert "built with CUDA 13" in why(torch_like(cuda="13.0"), tmp_path)
    assert why(torch_like(cuda="12.6"), tmp_path) is None


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"LVRPO_BUILD": "gpu"}, 1, "LVRPO_BUILD is 'gpu', expected auto, cpu, cuda or off"),
        ({"LVRPO_BUILD": "cpu", "CXX": "none"}, 1, "LVRPO_BUILD=cpu, but there is no C++ compiler"),
        ({"CXX": "none"}, 0, "installing without the C++ ops: there is no C++ compiler 'none'"),
    ],
    ids=["unknown value", "cpu by name", "auto"],
)
def test_setup_says_what_is_missing(environment, code, message):
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, **environment)
    assert result.returncode == code
    assert message in result.stderr
