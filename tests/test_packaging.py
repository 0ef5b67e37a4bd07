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
    assert "cpp, triton, torch" in succeed(python, "-m", "lvrpo.info", cwd=elsewhere)
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


def toolkit_like(folder: Path, release: str, gpus: str = "sm_80 sm_90 compute_90") -> Path:
    """A folder with an nvcc that describes itself as the real one does."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
        case $1 in
        --version) echo "Cuda compilation tools, release {release}, V{release}.93" ;;
        --list-gpu-code) echo "{gpus}" ;;
        --dryrun) printf '#$ TOP={folder}/bin/..\\n#$ LIBRARIES= "-L{folder}/lib"\\n' >&2 ;;
        esac
        """
    )
    nvcc.chmod(0o755)
    return folder


def test_what_the_cuda_ops_lack(setup_script):
    why, toolkit = setup_script["why_no_cuda"], setup_script["Toolkit"]
    found = toolkit(Path("/toolkit"), "12.8", [], [])
    assert "CPU build" in why(torch_like(), found)
    assert "nvcc is not found" in why(torch_like(cuda="13.0"), None)
    other = why(torch_like(cuda="13.0"), found)
    assert "built with CUDA 13, /toolkit is CUDA 12; set CUDA_HOME to a toolkit of CUDA 13" in other
    assert "\n" not in other
    assert why(torch_like(cuda="12.6"), found) is None


def test_the_toolkit_is_that_of_the_nvcc_that_answers(setup_script, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    real = toolkit_like(tmp_path / "cuda-12.8", "12.8")
    script = tmp_path / "local/bin/nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    found = setup_script["find_toolkit"]()
    assert (found.home, found.release, found.library_dirs) == (real, "12.8", [f"{real}/lib"])

    named = toolkit_like(tmp_path / "cuda-13.0", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert setup_script["find_toolkit"]().home == named
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script["find_toolkit"]() is None


def test_gpus_are_those_that_are_named_or_that_nvcc_knows(setup_script, monkeypatch):
    from torch.utils import cpp_extension

    def flags(*known: str) -> list[str]:
        toolkit = setup_script["Toolkit"](Path("/toolkit"), "12.6", [], list(known))
        return setup_script["gpu_flags"](toolkit, cpp_extension)

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    for known in (["sm_80", "sm_90"], ["sm_80", "sm_90", "sm_100"]):
        codes = [flag.rpartition("=")[2] for flag in flags(*known)]
        assert [code.rstrip("a") for code in codes[:-1]] == known
        # PTX of a GPU with a letter runs on that GPU alone.
        assert codes[-1] == "compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert flags("sm_80", "sm_90") == ["-gencode=arch=compute_90a,code=sm_90a"]


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
