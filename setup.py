"""Builds `lvrpo._C` when this machine can; everything else is in pyproject.toml.

LVRPO_BUILD = auto (default) | cpu | cuda | off
    auto: the C++ CPU ops when torch, a C++ compiler and Python's headers are found, the CUDA ops
    too when torch has CUDA and a matching nvcc is found. `cpu` and `cuda` turn a missing piece into
    an error, `off` builds nothing.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

os.chdir(Path(__file__).parent)
BUILD = os.environ.get("LVRPO_BUILD", "auto")
# The ops are written against LibTorch's stable ABI, so one build serves torch >= 2.10.
MINIMUM_TORCH = (2, 10)
COMMON_FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Not -ffast-math: masked rows rely on infinities. These two only drop errno and FP traps, without
# which GCC will not vectorise exp; -fopenmp-simd honours `#pragma omp simd` and links nothing.
CPU_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden"]
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))


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


def why_no_cuda(torch, cuda_home):
    """What the CUDA ops lack here, or None."""
    if not CUDA_SOURCES:
        return "this version has no CUDA sources"
    if torch.version.cuda is None:
        return "torch is a CPU build"
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    if cuda_home is None or not nvcc.exists():
        return "nvcc is not found; set CUDA_HOME"
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", printed)
    major = torch.version.cuda.split(".")[0]
    if release is None or release[1] != major:
        found = release[1] if release else "unreadable"
        return f"torch was built with CUDA {major}, {nvcc} is CUDA {found}; set CUDA_HOME"
    return None


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

    kind, flags = cpp_extension.CppExtension, {"cxx": COMMON_FLAGS + CPU_FLAGS}
    sources = ["csrc/library.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    no_cuda = "not asked for" if BUILD == "cpu" else why_no_cuda(torch, cpp_extension.CUDA_HOME)
    if no_cuda is None:
        kind, sources = cpp_extension.CUDAExtension, sources + CUDA_SOURCES
        flags["cxx"] = [*flags["cxx"], "-DLVRPO_WITH_CUDA"]
        flags["nvcc"] = [*COMMON_FLAGS, "-lineinfo"]
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    elif BUILD == "cuda":
        sys.exit(f"lvrpo: LVRPO_BUILD=cuda, but {no_cuda}")
    elif BUILD == "auto" and CUDA_SOURCES and torch.version.cuda is not None:
        print(f"\nlvrpo: building WITHOUT the CUDA ops: {no_cuda}.\n", file=sys.stderr)
    include_dirs = [str(Path("csrc").absolute()), pybind11.get_include()]
    module = kind("lvrpo._C", sources, include_dirs=include_dirs, extra_compile_args=flags)
    module.depends = sorted(map(str, Path("csrc").rglob("*.h")))
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**extension())
