"""Loads `lvrpo._C`, and registers what Python adds to `torch.ops.lvrpo`: fakes and Triton twins.

The schemas of the C++ ops are in `csrc/library.cpp`. A Triton twin is the op of the same name with
`_triton` at the end and the same schema; its launcher is `lvrpo.kernels.<op>.<name>`.
"""

from __future__ import annotations

import importlib
import re
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

#: By op that is made of others: the ops whose kernels it runs.
COMPOSED = {
    "linear_grpo_loss": ("gather_logprobs", "grpo_loss"),
    "linear_logprobs": ("gather_logprobs",),
    "logits_grpo_loss": ("gather_logprobs", "grpo_loss"),
}

_STALE = "it was built from other sources; build it again (pip install -e .)"
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
        ImportError: `lvrpo._C` is loaded and does not have the op, or not with this schema.
    """

    def decorate(fake: Fake) -> Fake:
        if EXTENSION is not None:
            if not hasattr(torch.ops.lvrpo, name):
                raise ImportError(f"lvrpo._C has no op {name}: {_STALE}")
            torch.library.register_fake(f"lvrpo::{name}", fake)
        if triton is not None:
            inferred = torch.library.infer_schema(fake, mutates_args=tuple(mutates))
            schema = inferred.replace("SymInt", "int")
            _define_twin(f"{name}_triton", fake, triton, name, schema)
            TWINS.add(name)
            if EXTENSION is not None and contract(name) != contract(f"{name}_triton"):
                raise ImportError(f"lvrpo._C has {contract(name)}, expected {schema}: {_STALE}")
        return fake

    return decorate


def compose(
    name: str, fake: Callable[..., Any], *, mutates: Sequence[str] = ()
) -> Callable[[Fake], Fake]:
    """Register the decorated function, which runs other ops, as `torch.ops.lvrpo.<name>`.

    A graph that torch.compile makes holds one call of it, instead of what it does to real tensors.
    Its schema is read off its annotations.

    Args:
        name: of the op.
        fake: its shape function.
        mutates: arguments that it writes to.
    """

    def decorate(run: Fake) -> Fake:
        _define(name, torch.library.infer_schema(run, mutates_args=tuple(mutates)), run, fake)
        return run

    return decorate


def implements(backend: str, op: str) -> bool:
    """Whether `backend`, "cpp", "triton" or "flash", has kernels for the op of this name."""
    if backend == "flash":
        return op == "packed_attention"
    if op in COMPOSED:
        return all(implements(backend, part) for part in COMPOSED[op])
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


def contract(name: str) -> str:
    """Arguments and result types of `torch.ops.lvrpo.<name>`; names of results are optional."""
    schema = str(getattr(torch.ops.lvrpo, name).default._schema)
    arguments, _, results = schema.partition("(")[2].rpartition(" -> ")
    return (
        re.sub(r"\(\w+!\)", "(!)", arguments)
        + " -> "
        + re.sub(r"(Tensor(?:\[\])?) \w+", r"\1", results)
    )


def _define_twin(
    twin: str, fake: Callable[..., Any], module: str, launcher: str, schema: str
) -> None:
    def run(*arguments: Any) -> Any:
        # Only here: importing lvrpo needs no Triton.
        kernels = importlib.import_module(f"lvrpo.kernels.{module}")
        return getattr(kernels, launcher)(*arguments)

    # The CPU is for Triton's interpreter; `_backend.why_not` keeps everything else away.
    _define(twin, schema, run, fake)


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _fragment.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _fragment.impl(name, run, key)
    torch.library.register_fake(f"lvrpo::{name}", fake, lib=_fragment)
