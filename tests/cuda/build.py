"""`make cuda`: compiles the CUDA kernels as far as this machine can, and says how far that was.

With a torch that has CUDA and a matching nvcc lvrpo._C is built, linked and loaded; with nvcc
alone the kernels are compiled, linked into a library of their own, and loaded; without it nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from compiled_cuda import ROOT, SOURCES, compile_all, setup_script, toolkit
from torch.utils import cpp_extension

FOLDER = ROOT / "build/cuda"
LOAD = """
import sys, torch
if sys.argv[2:]: import lvrpo
registered = torch._C._dispatch_get_registrations_for_dispatch_key
before = set(registered("CUDA"))
torch.ops.load_library(sys.argv[1])
print(*sorted(name for name in {*registered("CUDA")} - before), sep="\\n")
"""


def build_extension() -> Path:
    """lvrpo._C, by setup.py."""
    folders = ["--build-lib", FOLDER, "--build-temp", FOLDER / "objects"]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "LVRPO_BUILD": "cuda"}, check=True)
    return next((FOLDER / "lvrpo").glob("_C.*.so"))


def link(objects: list[Path]) -> Path:
    """A library of the kernels alone, of which nothing may be missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / "kernels.so"
    paths = [*toolkit().library_dirs, *cpp_extension.library_paths()]
    names = [*setup_script()["CUDA_LIBRARIES"], "torch_cpu", "torch", "c10"]
    options = [*(f"-L{path}" for path in paths), *(f"-l{name}" for name in names), "-Wl,-z,defs"]
    subprocess.run(["c++", "-shared", *objects, "-o", library, *options], check=True)
    return library


def kernels_of(library: Path, *beside: str) -> list[str]:
    """The ops that a library registers for CUDA, loaded by itself or "beside lvrpo"."""
    command = [sys.executable, "-c", LOAD, library, *beside]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


def main() -> None:
    script, found = setup_script(), toolkit()
    missing = script["why_no_cuda"](torch, found)
    if found is None:
        print("cuda: nothing is compiled, as nvcc is not found; the emulation of make test is all")
        return
    gpus = script["gpu_flags"](found, cpp_extension)
    named = ", ".join(flag.rpartition("=")[2] for flag in gpus)
    by = f"by nvcc {found.release} for {named}"
    if missing is None:
        kernels = kernels_of(build_extension())
        print(f"cuda: lvrpo._C is built, linked against torch {torch.__version__} and loaded, {by}")
    else:
        library = link([compiled.object for compiled in compile_all(gpus)])
        kernels = kernels_of(library, "beside lvrpo")
        print(f"cuda: {len(SOURCES)} files are compiled, linked and loaded, {by}")
        print(f"cuda: lvrpo._C is not built with them: {missing}")
    print(f"cuda: ops: {', '.join(kernels)}")


if __name__ == "__main__":
    main()
