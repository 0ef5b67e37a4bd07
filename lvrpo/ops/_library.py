"""Loads `lvrpo._C` and registers the fakes of its ops; the schemas are in `csrc/library.cpp`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """Register a shape function for `torch.ops.lvrpo.<name>`; does nothing without `lvrpo._C`."""

    def decorate(fake: Fake) -> Fake:
        if EXTENSION is not None:
            if not hasattr(torch.ops.lvrpo, name):
                raise ImportError(
                    f"lvrpo._C has no op {name}: it was built from older sources; build it again "
                    "(pip install -e .)"
                )
            torch.library.register_fake(f"lvrpo::{name}", fake)
        return fake

    return decorate
