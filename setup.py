"""Builds `lvrpo._C` when this machine can; everything else is in pyproject.toml.

LVRPO_BUILD = auto (default) | cpu | cuda | off
    auto: the C++ CPU ops when torch and a C++ compiler are found, the CUDA ops too when torch has
    CUDA and nvcc is found. `cpu` and `cuda` turn a missing piece into an error.
"""

import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

BUILD = os.environ.get("LVRPO_BUILD", "auto")
ROOT = Path(__file__).parent
# The ops are written against LibTorch's stable ABI, so one build serves torch >= 2.10.
TORCH_TARGET_VERSION = "0x020a000000000000"
COMMON_FLAGS = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
# Not -ffast-math: masked rows rely on infinities. These two only drop errno and FP traps, without
# which GCC will not vectorise exp; -fopenmp-simd honours `#pragma omp simd` and links nothing.
CPU_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden"]


def import_host_torch():
    """torch, from the build environment or else from the environment that pip installs into.

    Naming torch as a build requirement would download another torch and compile against its ABI.
    """
    try:
        import torch
    except ImportError:
        # An isolated build runs the host's interpreter on a path of its own. Appending the host's
        # packages at the end adds torch and shadows nothing of the build environment.
        sys.path.extend(host_packages())
        try:
            import torch
        except ImportError:
            return None
    return torch


def host_packages():
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [p for p in dict.fromkeys(paths) if p and p not in sys.path]


def refuse(reason):
    """Stop when the missing piece was asked for by name, otherwise build without it."""
    if BUILD in ("cpu", "cuda"):
        sys.exit(f"lvrpo: LVRPO_BUILD={BUILD} was asked for, but {reason}.")
    print(f"lvrpo: building without the {reason}", file=sys.stderr)


def cuda_reason(torch, cuda_home):
    """Why the CUDA sources cannot be built here, or None."""
    if torch.version.cuda is None:
        return "torch is a CPU build"
    if cuda_home is None:
        return "nvcc is not found (set CUDA_HOME)"
    return None


def extension():
    if BUILD not in ("auto", "cpu", "cuda", "off"):
        sys.exit(f"lvrpo: LVRPO_BUILD is {BUILD!r}, expected auto, cpu, cuda or off.")
    if BUILD == "off":
        return {}
    torch = import_host_torch()
    if torch is None:
        refuse("C++ ops: torch is not importable; install it first, then lvrpo")
        return {}
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        refuse("C++ ops: no C++ compiler; set CXX or install g++")
        return {}
    import pybind11
    from torch.utils import cpp_extension

    sources = ["csrc/library.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
    flags = {"cxx": COMMON_FLAGS + CPU_FLAGS}
    kind = cpp_extension.CppExtension
    cuda_sources = sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
    if cuda_sources and BUILD != "cpu":
        reason = cuda_reason(torch, cpp_extension.CUDA_HOME)
        if reason is None:
            kind = cpp_extension.CUDAExtension
            sources += cuda_sources
            flags["cxx"] = [*flags["cxx"], "-DLVRPO_WITH_CUDA"]
            flags["nvcc"] = [*COMMON_FLAGS, "-lineinfo"]
            if not torch.cuda.is_available():
                os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
        elif BUILD == "cuda":
            refuse(reason)
        else:
            print(f"lvrpo: building without the CUDA ops: {reason}", file=sys.stderr)
    module = kind(
        "lvrpo._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
        extra_compile_args=flags,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


os.chdir(ROOT)
setup(**extension())
