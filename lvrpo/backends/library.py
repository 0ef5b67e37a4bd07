"""Loads `lvrpo._C`, and registers what Python adds to `torch.ops.lvrpo`.

That is a fake of every op, the Triton overloads and the composite ops. The schemas of the C++ ops
are in `csrc/library.cpp`. A Triton overload is the op of the same name with `_triton` at the end,
and of the same schema but for choices: one such as "clip" for the argument `surrogate` is a str
here and for a Triton kernel, and for a C++ op the position of the name in `lvrpo._C.choices()`.
Launchers are `lvrpo.kernels.<op>.<name>`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


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

#: By op: for every argument that is a choice, the names that the C++ kernels know.
CHOICES: Mapping[str, Mapping[str, Sequence[str]]] = getattr(EXTENSION, "choices", dict)()
#: By op: the names of what a tensor holds, in the order of the C++ kernels.
TABLES: Mapping[str, Mapping[str, Sequence[str]]] = getattr(EXTENSION, "tables", dict)()

#: By where they run, a dispatch key or "triton": the names of the ops that have kernels.
KERNELS: dict[str, set[str]] = {"CPU": set(), "CUDA": set(), "triton": set()}

#: By op of `torch.ops.lvrpo`: those of its arguments that are choices, in its order: its last ones.
CHOICE_ARGUMENTS: dict[str, tuple[str, ...]] = {}

#: By op of `torch.ops.lvrpo`: the key of `CHOICES` that has its names.
_CHOICES_OF: dict[str, str] = {}

#: By op that is made of others, without kernels of its own: the ops whose kernels it runs.
COMPOSITES: dict[str, tuple[str, ...]] = {}

_STALE = "it was built from other sources; build it again (pip install -e .)"
_fragment = torch.library.Library("lvrpo", "FRAGMENT")


def register(
    name: str, *, kernels: str, mutates: Sequence[str] = (), choices_of: str | None = None
) -> Callable[[Function], Function]:
    """Register the decorated shape function for `torch.ops.lvrpo.<name>` and its Triton overload.

    Args:
        name: of the op in `csrc/library.cpp`, whose schema the annotations of the shape function
            repeat, a choice as str.
        kernels: module of `lvrpo.kernels` that has a launcher called `name`; where there is no such
            module, there is no Triton overload.
        mutates: arguments that the op writes to.
        choices_of: the op whose choices it has; None for those of its own.

    Raises:
        ImportError: `lvrpo._C` is loaded and does not have the op, or not with this schema.
    """

    def decorate(fake: Function) -> Function:
        schema = torch.library.infer_schema(fake, mutates_args=tuple(mutates))
        schema = schema.replace("SymInt", "int")
        parameters = inspect.signature(fake).parameters.values()
        CHOICE_ARGUMENTS[name] = tuple(x.name for x in parameters if x.annotation == "str")
        _CHOICES_OF[name] = choices_of or op_of(name)
        if EXTENSION is not None:
            _check(name, schema)
            torch.library.register_fake(f"lvrpo::{name}", fake)
            for key in ("CPU", "CUDA"):
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"lvrpo::{name}", key):
                    KERNELS[key].add(name)
        if has_module(kernels):

            def launch(*arguments: Any) -> Any:
                # Only here: importing lvrpo needs no Triton.
                module = importlib.import_module(f"lvrpo.kernels.{kernels}")
                return getattr(module, name)(*arguments)

            # The CPU is for Triton's interpreter; the backend keeps everything else away.
            _define(f"{name}_triton", schema, launch, fake)
            KERNELS["triton"].add(name)
        return fake

    return decorate


def composite(
    name: str, fake: Callable[..., Any], *, of: Sequence[str], mutates: Sequence[str] = ()
) -> Callable[[Function], Function]:
    """Register the decorated function, which runs other ops, as `torch.ops.lvrpo.<name>`.

    A graph that torch.compile makes holds one call of it, instead of what it does to real tensors.
    Its schema is read off its annotations.

    Args:
        name: of the op, "<op>_fwd" or "<op>_bwd".
        fake: its shape function.
        of: the ops whose kernels it runs.
        mutates: arguments that it writes to.
    """

    def decorate(run: Function) -> Function:
        _define(name, torch.library.infer_schema(run, mutates_args=tuple(mutates)), run, fake)
        op = op_of(name)
        COMPOSITES[op] = tuple(sorted({*COMPOSITES.get(op, ()), *of}))
        return run

    return decorate


def op_of(name: str) -> str:
    """The op that `torch.ops.lvrpo.<name>` is a pass of."""
    return name.removesuffix("_fwd").removesuffix("_bwd")


def positions(name: str, choices: Mapping[str, str]) -> dict[str, int]:
    """Choices as `torch.ops.lvrpo.<name>` takes them; all have to be known."""
    known = CHOICES[_CHOICES_OF[name]] if choices else {}
    return {argument: known[argument].index(chosen) for argument, chosen in choices.items()}


def check_table(op: str, name: str, names: Sequence[str]) -> None:
    """Refuse an extension in which a tensor of this op holds something else than `names`.

    Raises:
        ImportError: it does.
    """
    if EXTENSION is None:
        return
    built, expected = TABLES.get(op, {}).get(name), [column.lstrip("_") for column in names]
    if built != expected:
        raise ImportError(f"lvrpo._C has the {name} {built} in {op}, expected {expected}: {_STALE}")


def has_module(op: str) -> bool:
    """Whether there is a `lvrpo.kernels.<op>`; imports nothing."""
    return importlib.util.find_spec(f"lvrpo.kernels.{op}") is not None


def _check(name: str, schema: str) -> None:
    if not hasattr(torch.ops.lvrpo, name):
        raise ImportError(f"lvrpo._C has no op {name}: {_STALE}")
    built = getattr(torch.ops.lvrpo, name).default._schema
    positional = schema.replace("str ", "int ")
    if _contract(built) != _contract(torch._C.parse_schema(name + positional)):
        raise ImportError(f"lvrpo._C has {built}, expected {schema}: {_STALE}")


def _contract(schema: torch.FunctionSchema) -> tuple[Any, ...]:
    """What two schemas of one op have in common: names of results and of aliases are optional."""
    arguments = [(x.name, str(x.type), x.is_write) for x in schema.arguments]
    return arguments, [str(x.type) for x in schema.returns]


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _fragment.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _fragment.impl(name, run, key)
    torch.library.register_fake(f"lvrpo::{name}", fake, lib=_fragment)
