"""Loads `lvrpo._C`, and registers what Python adds to `torch.ops.lvrpo`: fakes and Triton twins.

The schemas of the C++ ops are in `csrc/library.cpp`. A Triton twin is the op of the same name with
`_triton` at the end and the same schema; its launcher is `lvrpo.kernels.<op>.<name>`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch

Fake = TypeVar("Fake", bound=Callable[..., Any])


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("lvrpo._C"), ""
    except ModuleNotFoundError:
        return None, (
            "lvrpo._C is not built; reinstall lvrpo in an environment that has torch and a C++ "
            "compiler (pip install -e .)"
        )
    except ImportError as error:
        return None, f"lvrpo._C does not load with torch {torch.__version__}: {error}"


#: The compiled extension, or None; and why it is missing.
EXTENSION, MISSING = _load()

#: Names of the ops that have a Triton twin.
TWINS: set[str] = set()

_fragment = torch.library.Library("lvrpo", "FRAGMENT")


def register(
    name: str, *, triton: str | None = None, mutates: Sequence[str] = ()
) -> Callable[[Fake], Fake]:
    """Register the decorated shape function for `torch.ops.lvrpo.<name>`, and its Triton twin.

    Args:
        name: of the op in `csrc/library.cpp`.
        triton: module in `lvrpo.kernels` that has a launcher called `name`; None without one. The
            twin's schema is read off the annotations of the shape function.
        mutates: arguments that the op writes to.

    Raises:
        ImportError: `lvrpo._C` is loaded and does not have the op.
    """

    def decorate(fake: Fake) -> Fake:
        if EXTENSION is not None:
            if not hasattr(torch.ops.lvrpo, name):
                raise ImportError(
                    f"lvrpo._C has no op {name}: it was built from older sources; build it again "
                    "(pip install -e .)"
                )
            torch.library.register_fake(f"lvrpo::{name}", fake)
        if triton is not None:
            _define_twin(f"{name}_triton", fake, triton, name, mutates)
            TWINS.add(name)
        return fake

    return decorate


def implements(backend: str, op: str) -> bool:
    """Whether `backend`, "cpp" or "triton", has kernels for the op of this name."""
    names = (op, f"{op}_fwd")
    if backend == "triton":
        return not TWINS.isdisjoint(names)
    return EXTENSION is None or any(hasattr(torch.ops.lvrpo, name) for name in names)


def op(name: str, backend: str) -> Callable[..., Any]:
    """The op that `backend`, "cpp" or "triton", runs."""
    function: Callable[..., Any] = getattr(
        torch.ops.lvrpo, name if backend == "cpp" else f"{name}_triton"
    )
    return function


def _define_twin(
    twin: str, fake: Callable[..., Any], module: str, launcher: str, mutates: Sequence[str]
) -> None:
    def run(*arguments: Any) -> Any:
        # Only here: importing lvrpo needs no Triton.
        kernels = importlib.import_module(f"lvrpo.kernels.{module}")
        return getattr(kernels, launcher)(*arguments)

    schema = torch.library.infer_schema(fake, mutates_args=tuple(mutates))
    _fragment.define(twin + schema.replace("SymInt", "int"), tags=(torch.Tag.pt2_compliant_tag,))
    # The CPU is for Triton's interpreter; `_backend.why_not` keeps everything else away.
    for key in ("CUDA", "CPU"):
        _fragment.impl(twin, run, key)
    torch.library.register_fake(f"lvrpo::{twin}", fake, lib=_fragment)
