"""Builds `lvrpo._C` when this machine can; everything else is in pyproject.toml.

LVRPO_BUILD = auto (default) | cpu | cuda | off
    auto: the C++ CPU ops when torch, a C++ compiler and Python's headers are found, the CUDA ops
    too when torch has CUDA and a matching nvcc is found. `cpu` and `cuda` turn a missing piece into
    an error, `off` builds nothing.
CUDA_HOME names a toolkit other than that of the nvcc on the path, TORCH_CUDA_ARCH_LIST other GPUs.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup

BUILD = os.environ.get("LVRPO_BUILD", "auto")
# The ops are written against LibTorch's stable ABI, so one build serves torch >= 2.10.
MINIMUM_TORCH = (2, 10)
COMMON_FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Not -ffast-math: masked rows rely on infinities. These two only drop errno and FP traps, without
# which GCC will not vectorise exp; -fopenmp-simd honours `#pragma omp simd` and links nothing.
CPU_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden"]
NVCC_FLAGS = [
    *(*COMMON_FLAGS, "-DUSE_CUDA", "-lineinfo", "--expt-relaxed-constexpr"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
]
# The runtime is part of the library, which then loads beside a torch without CUDA, too.
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]
# Machine code for these, as far as nvcc knows them, and PTX for GPUs that are newer. Not the PTX of
# 90a, which no newer GPU takes; nor that of 80, which has no clusters.
GPUS = ["sm_80", "sm_90a", "sm_100a"]
PTX = "compute_90"


def import_host_torch():
    """torch, from the build environment or else from the environment that pip installs into.

    Naming torch as a build requirement would download another torch and compile against its ABI.
    """
    try:
        import torch
    except ImportError:
        # An isolated build runs the host's interpreter on a path of its own. Appending the host's
        # packages at the end adds torch and shadows nothing of the build environment.
        host = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        if site.ENABLE_USER_SITE:
            host.append(site.getusersitepackages())
        sys.path.extend(path for path in dict.fromkeys(host) if path not in sys.path)
        try:
            import torch
        except ImportError:
            return None
    return torch


def why_no_extension(torch):
    """What the C++ ops lack here, or None."""
    if torch is None:
        return "torch is not importable; install torch first (with uv: --no-build-isolation)"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < MINIMUM_TORCH:
        return f"torch is {torch.__version__}, the C++ ops need 2.10"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}; install g++ or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is not found; install Python's headers (Debian: python3-dev)"
    return None


@dataclass
class Toolkit:
    """A CUDA toolkit, as its nvcc describes it."""

    home: Path
    release: str
    library_dirs: list
    gpus: list


def find_toolkit():
    """The toolkit at CUDA_HOME, or else of the nvcc on the path or in /usr/local/cuda, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    nvcc = str(Path(named, "bin", "nvcc")) if named else on_path

    def ask(*options):
        done = subprocess.run([nvcc, *options], capture_output=True, text=True)
        return done.stdout + done.stderr

    if shutil.which(nvcc) is None:
        return None
    # Not the folder above nvcc's: the one on the path may be a script that starts another.
    plan = ask("--dryrun", "-E", "-x", "cu", os.devnull)
    home = re.search(r"^#\$ TOP=(.+?)\s*$", plan, re.MULTILINE)
    release = re.search(r"release ([\d.]+)", ask("--version"))
    if home is None or release is None:
        return None
    library_dirs, gpus = re.findall(r'"-L([^"]+)"', plan), ask("--list-gpu-code").split()
    return Toolkit(Path(home[1]).resolve(), release[1], library_dirs, gpus)


def why_no_cuda(torch, toolkit):
    """What the CUDA ops lack here, or None."""
    if torch.version.cuda is None:
        return "torch is a CPU build"
    if toolkit is None:
        return "nvcc is not found; set CUDA_HOME"
    wanted, found = torch.version.cuda.split(".")[0], toolkit.release.split(".")[0]
    if wanted != found:
        return (
            f"torch was built with CUDA {wanted}, {toolkit.home} is CUDA {found}; "
            f"set CUDA_HOME to a toolkit of CUDA {wanted}, or install a torch for CUDA {found}"
        )
    return None


def gpu_flags(toolkit, cpp_extension):
    """nvcc's options for what TORCH_CUDA_ARCH_LIST names, or for GPUS and PTX."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return cpp_extension._get_cuda_arch_flags()
    pairs = [(gpu.replace("sm", "compute"), gpu) for gpu in GPUS if gpu.rstrip("a") in toolkit.gpus]
    return [f"-gencode=arch={virtual},code={real}" for virtual, real in [*pairs, (PTX, PTX)]]


def add_cuda(keywords, toolkit, cpp_extension):
    """To the keywords of an Extension, what builds the CUDA ops."""
    cpp_extension.CUDA_HOME = str(toolkit.home)
    gpus = gpu_flags(toolkit, cpp_extension)
    built_for = ",".join(re.findall(r",code=(\w+)", " ".join(gpus)))
    print(f"lvrpo: building with CUDA ops for {built_for}, by {toolkit.home}", file=sys.stderr)
    keywords["sources"] += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    keywords["extra_compile_args"]["cxx"] += [f"-DLVRPO_CUDA_ARCHITECTURES={built_for}"]
    keywords["extra_compile_args"]["nvcc"] = NVCC_FLAGS + gpus
    keywords["libraries"] = CUDA_LIBRARIES
    keywords["library_dirs"] = toolkit.library_dirs


def extension():
    """The keywords for `setup` that build lvrpo._C, or none."""
    if BUILD not in ("auto", "cpu", "cuda", "off"):
        sys.exit(f"lvrpo: LVRPO_BUILD is {BUILD!r}, expected auto, cpu, cuda or off")
    if BUILD == "off":
        return {}
    torch = import_host_torch()
    missing = why_no_extension(torch)
    if missing and BUILD != "auto":
        sys.exit(f"lvrpo: LVRPO_BUILD={BUILD}, but {missing}")
    if missing:
        print(f"lvrpo: installing without the C++ ops: {missing}", file=sys.stderr)
        return {}
    import pybind11
    from torch.utils import cpp_extension

    keywords = {
        "sources": ["csrc/library.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
        "include_dirs": [str(Path("csrc").absolute()), pybind11.get_include()],
        "extra_compile_args": {"cxx": COMMON_FLAGS + CPU_FLAGS},
    }
    toolkit = None if BUILD == "cpu" else find_toolkit()
    no_cuda = "not asked for" if BUILD == "cpu" else why_no_cuda(torch, toolkit)
    if no_cuda is None:
        add_cuda(keywords, toolkit, cpp_extension)
    elif BUILD == "cuda":
        sys.exit(f"lvrpo: LVRPO_BUILD=cuda, but {no_cuda}")
    elif BUILD == "auto" and torch.version.cuda is not None:
        print(f"\nlvrpo: building WITHOUT the CUDA ops: {no_cuda}.\n", file=sys.stderr)
    # Not CUDAExtension, which links torch's own CUDA libraries: the stable ABI needs none of them.
    module = cpp_extension.CppExtension("lvrpo._C", **keywords)
    module.depends = sorted(str(x) for x in Path("csrc").rglob("*") if x.suffix in (".h", ".cuh"))
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    setup(**extension())
