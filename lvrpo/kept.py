"""Answers that are kept, for questions that every call of an op asks again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

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


def kept_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As `kept`, for a function that makes a small tensor; nobody may write to it."""

    @functools.lru_cache(maxsize=128)
    def cached(*arguments: Any) -> Tensor:
        with torch.inference_mode(False):  # autograd may save it in a later call
            return make(*arguments)

    @functools.wraps(make)
    def ask(*arguments: Any) -> Tensor:
        # A mode may make another kind of tensor, which nobody may meet after it.
        keeps = not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
        return cached(*arguments) if keeps else make(*arguments)

    return ask
