"""The CUDA kernels on the CPU, as a backend: `csrc/cuda` compiled with `tests/cuda/emulate.h`.

The ops have the schemas of `lvrpo._C`, in a namespace of their own, and run on CPU tensors.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch
from torch.utils import cpp_extension

from lvrpo.backends import library
from lvrpo.backends.cpp import CompiledBackend

ROOT = Path(__file__).parents[1]
NAMESPACE = "lvrpo_emulated"
FLAGS = [
    *("-x", "c++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"),
    *("-Wall", "-Werror", "-Wno-unknown-pragmas"),
    *("-DLVRPO_EMULATE", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda'}"),
    *(f"-I{path}" for path in cpp_extension.include_paths()),
    f"-I{sysconfig.get_path('include')}",
]
#: By sanitizer, the options of a build under it; "1" is none.
SANITIZED = {
    "1": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
#: A compiler runs without the runtime that Python has.
_WITHOUT_SANITIZER = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def compiler() -> list[str]:
    """The C++ compiler that the extension is built with."""
    return shlex.split(os.environ.get("CXX") or "c++")


def build(sources: Sequence[Path], options: Sequence[str]) -> Path:
    """A library of these .cu files, made anew when they, a header, torch or the options change."""
    read = sorted({*sources, *ROOT.glob("csrc/c*/*.h"), *ROOT.glob("csrc/cuda/*.cuh")})
    read.append(ROOT / "tests/cuda/emulate.h")
    contents = hashlib.sha256(repr((torch.__version__, compiler(), FLAGS, options)).encode())
    for path in read:
        contents.update(path.read_bytes())
    folder = ROOT / "build" / f"emulated-{contents.hexdigest()[:16]}"
    built = folder / f"{NAMESPACE}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        if not built.exists():
            _compile(sources, options, folder, built)
    return built


def _compile(sources: Sequence[Path], options: Sequence[str], folder: Path, built: Path) -> None:
    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [*compiler(), *options, *FLAGS, "-c", source, "-o", target]
        subprocess.run(command, check=True, env=_WITHOUT_SANITIZER)
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    linked = built.with_suffix(".new")
    command = [*compiler(), *options, "-shared", *objects, "-o", linked, *paths]
    libraries = ("-ltorch_cpu", "-ltorch", "-lc10")
    subprocess.run([*command, *libraries], check=True, env=_WITHOUT_SANITIZER)
    linked.rename(built)


class EmulatedCudaBackend(CompiledBackend):
    """`csrc/cuda` on CPU tensors."""

    name = "cuda (emulated)"
    device = "cpu"
    key = NAMESPACE
    namespace = NAMESPACE


def load(sanitizer: str = "1") -> EmulatedCudaBackend:
    """Build and load it, and register its ops; a sanitizer's runtime is loaded already."""
    torch.ops.load_library(build(sorted(ROOT.glob("csrc/cuda/*.cu")), SANITIZED[sanitizer]))
    namespace = torch.library.Library(NAMESPACE, "FRAGMENT")
    kernels = library.KERNELS.setdefault(NAMESPACE, set())
    for registered in sorted(torch._C._dispatch_get_registrations_for_dispatch_key("CPU")):
        if not registered.startswith(f"{NAMESPACE}::"):
            continue
        name = registered.removeprefix(f"{NAMESPACE}::")
        schema = getattr(torch.ops.lvrpo, name).default._schema
        namespace.define(str(schema).removeprefix("lvrpo::"), tags=(torch.Tag.pt2_compliant_tag,))
        fake = torch._library.simple_registry.singleton.find(f"lvrpo::{name}").fake_impl.kernel
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake.func, lib=namespace)
        kernels.add(name)
    _KEPT.append(namespace)
    return EmulatedCudaBackend()


#: A library takes its definitions back when it is collected.
_KEPT: list[torch.library.Library] = []
