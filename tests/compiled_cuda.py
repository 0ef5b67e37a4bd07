"""`csrc/cuda` compiled by nvcc with the options of setup.py: objects, and the words of ptxas."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import runpy
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))


@functools.cache
def setup_script() -> dict[str, Any]:
    """The names of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))


@functools.cache
def toolkit() -> Any:
    """The CUDA toolkit that setup.py finds, or None."""
    return setup_script()["find_toolkit"]()


@dataclass
class Compiled:
    """An object file and the words of ptxas about its kernels."""

    object: Path
    log: str


def compile_all(gpus: Sequence[str], sources: Sequence[Path] = SOURCES) -> list[Compiled]:
    """Compile for what these options of nvcc name; made anew when what is read changes."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: _compile(source, gpus), sources))


def _compile(source: Path, gpus: Sequence[str]) -> Compiled:
    includes = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
    options = [*setup_script()["NVCC_FLAGS"], "-Xptxas", "-v", *gpus]
    options += [f"-I{path}" for path in includes]
    contents = hashlib.sha256(repr((torch.__version__, toolkit(), options)).encode())
    for path in (source, *sorted(ROOT.glob("csrc/c*/*.*h"))):
        contents.update(path.read_bytes())
    target = ROOT / "build/nvcc" / f"{source.stem}-{contents.hexdigest()[:16]}.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_suffix(".log")
    with filelock.FileLock(target.with_suffix(".lock")):
        if not target.exists():
            unfinished = target.with_suffix(".new.o")
            command = [toolkit().home / "bin/nvcc", *options, "-c", source, "-o", unfinished]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc refuses {source}:\n{done.stdout}{done.stderr}")
            log.write_text(done.stdout + done.stderr)
            unfinished.rename(target)
    return Compiled(target, log.read_text())
