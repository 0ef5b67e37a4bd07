"""`python -m lvrpo.info`: what is installed, which backend runs which op here, and why not others.

Needs torch only: it tells what is missing where the rest cannot.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lvrpo
import lvrpo.ops
from lvrpo import backends
from lvrpo.backends import library


def environment() -> dict[str, Any]:
    """The facts a result should be published with, ready for JSON."""
    facts: dict[str, Any] = {
        "lvrpo": lvrpo.__version__,
        "commit": commit(),
        "path": str(Path(lvrpo.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [],
        "extension": None,
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts["gpus"].append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    if library.EXTENSION is not None:
        facts["extension"] = {
            "file": library.EXTENSION.__file__,
            "cpu_capability": library.EXTENSION.cpu_capability(),
            **library.EXTENSION.build_info(),
        }
    return facts


def commit() -> str | None:
    """The commit of the checkout that lvrpo runs from, ending in "-dirty" with changes on top.

    None where git is missing, and for an installed copy, even inside a checkout of something else.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    # --exclude '*': a hash even where tags exist.
    return _git("describe", "--always", "--abbrev=12", "--dirty", "--exclude", "*")


def _git(*arguments: str) -> str | None:
    """The output of a git command in the package's folder; None if there is no git or no answer."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def op_names() -> list[str]:
    """Every op of this version: the modules of `lvrpo.ops`."""
    modules = (m.name for m in pkgutil.iter_modules(lvrpo.ops.__path__) if not m.ispkg)
    return sorted(name for name in modules if not name.startswith("_"))


def backends_of(op: str) -> list[str]:
    """The backends that `op` has in this build, in order of preference."""
    return [backend.name for backend in backends.ALL if backend.implements(op)]


def optional_packages() -> dict[str, dict[str, str | None]]:
    """By extra of `pip install lvrpo[...]`: each package and its installed version, or None."""
    extras: dict[str, dict[str, str | None]] = {}
    for extra, name in _requirements():
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        extras.setdefault(extra, {})[name] = version
    return extras


def packages_of(extra: str) -> list[str]:
    """The packages of one extra; [] where lvrpo runs from a folder and is not installed."""
    return [name for other, name in _requirements() if other == extra]


def _requirements() -> Iterator[tuple[str, str]]:
    """(extra, package) of every optional requirement that this Python has."""
    try:
        requirements = importlib.metadata.requires("lvrpo") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        before = re.search(r"python_version < ['\"](\d+)\.(\d+)['\"]", requirement)
        too_new = before is not None and sys.version_info >= (int(before[1]), int(before[2]))
        if name is not None and extra is not None and not too_new:
            yield extra[1], name[0]


#: By extra: what to do where one of its packages is missing.
INSTALL = {
    "train": "the trainer and the command need: pip install 'lvrpo[train]'",
    "report": "the report needs: pip install 'lvrpo[report]'",
    "transformers": "models of transformers need: pip install 'lvrpo[transformers]'",
    "wandb": "run.tracker = 'wandb' needs: pip install 'lvrpo[wandb]'",
    "trackio": "run.tracker = 'trackio' needs: pip install 'lvrpo[trackio]'",
    "ocr": "the reward 'ocr' needs: pip install 'lvrpo[ocr]'",
}
#: Packages that are imported by another name than they are installed by.
_MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}


def require(*packages: str, extra: str = "train") -> None:
    """See that packages of an extra are there, without importing them.

    Args:
        packages: by the names that pip knows.
        extra: which has them, one of `INSTALL`.

    Raises:
        ModuleNotFoundError: naming all that are missing, and what to install.
    """
    missing = [package for package in packages if not _is_importable(package)]
    if missing:
        raise ModuleNotFoundError(
            f"not installed: {', '.join(missing)}; {INSTALL[extra]}", name=missing[0]
        )


def _is_importable(package: str) -> bool:
    module = _MODULES.get(package, package.replace("-", "_"))
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def describe() -> str:
    """The whole report as text."""
    facts = environment()
    extension = facts["extension"]
    lines = [
        f"lvrpo      {facts['lvrpo']}{_in_parentheses(facts['commit'])}",
        f"  from     {facts['path']}",
        f"python     {facts['python']} on {facts['platform']}",
        f"torch      {facts['torch']}, CUDA {facts['cuda'] or 'none (CPU build)'}",
        f"cpu        {facts['cpu']}, {facts['threads']} threads",
        f"gpu        {', '.join(facts['gpus']) or 'none visible to torch'}",
    ]
    if extension is None:
        lines.append(f"lvrpo._C   missing: {library.MISSING}")
    else:
        lines += [
            f"lvrpo._C   {extension['file']}",
            f"  built    by {extension['compiler']}, for {extension['stable_abi']}",
            f"  cuda     {_described(extension['cuda'])}",
            f"  runs as  {extension['cpu_capability']}",
        ]

    lines += ["", "Backends, in order of preference:"]
    for backend in backends.ALL:
        available = backend.why_unavailable() or f"available{backend.about()}"
        lines.append(f"  {backend.name:8} {available}")

    width = max(len(op) for op in op_names())
    lines += ["", "Ops:"]
    lines += [f"  {op:{width}}  {', '.join(backends_of(op))}" for op in op_names()]

    lines += ["", "Optional packages (pip install 'lvrpo[EXTRA]'):"]
    for extra, packages in optional_packages().items():
        listed = ", ".join(f"{name} {version or 'MISSING'}" for name, version in packages.items())
        lines.append(f"  {extra}: {listed}")
    if lines[-1].startswith("Optional"):
        lines.append("  unknown: lvrpo is not installed, it runs from a folder on the path")
    return "\n".join(lines)


def cpu_name() -> str:
    """The model name of the processor."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _described(architectures: list[str]) -> str:
    """What the CUDA ops of the extension are compiled for, by the names of nvcc."""
    named = (f"PTX of {name}" if name.startswith("compute") else name for name in architectures)
    return f"ops for {', '.join(named)}" if architectures else "no ops in this build"


def _in_parentheses(text: str | None) -> str:
    return f" ({text})" if text else ""


if __name__ == "__main__":
    print(describe())
