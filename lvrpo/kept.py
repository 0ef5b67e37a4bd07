"""Answers that are kept, for questions that every call of an op asks again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def kept(function: Function) -> Function:
    """Decorate a function of hashable arguments that always answers the same, to ask it once.

    torch.compile reads through it: it does not know caches, and warns of them.
    """
    cached = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def ask(*arguments: Any) -> Any:
        return function(*arguments) if torch.compiler.is_compiling() else cached(*arguments)

    return cast(Function, ask)
