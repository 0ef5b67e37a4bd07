"""Calls of code that others wrote: how long it may take, and where in it something went wrong."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import CodeType
from typing import Any, TypeVar

T = TypeVar("T")


class TimeLimitError(Exception):
    """A call did not come back in time."""


def call_within(seconds: float | None, function: Callable[[], T]) -> T:
    """What the function returns or raises, or `TimeLimitError` after so many seconds.

    With a limit it runs in a thread of its own. Python cannot stop a thread: one that is late goes
    on by itself, its result is thrown away, and the process may end without it. The wait can be
    interrupted by a signal, but neither it nor a signal comes through while the function is in
    compiled code that keeps the interpreter's lock.

    Args:
        seconds: None for no limit, in the caller's thread; 0 or less: not called at all.
        function: without arguments.
    """
    if seconds is None:
        return function()
    if seconds <= 0:
        raise TimeLimitError
    result: Future[T] = Future()

    def work() -> None:
        try:
            found = function()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(found)

    threading.Thread(target=work, name="lvrpo reward", daemon=True).start()
    if not wait([result], seconds).done:
        raise TimeLimitError
    return result.result()


def raised_at(error: BaseException, function: Callable[..., Any]) -> str:
    """ ", at file:line" of the innermost frame in the function's own file.

    What is below it, as a parser that was handed nonsense, is named behind it; the caller's frames
    above it never are.
    """
    places = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    files = _files(function)
    own = [i for i, (name, _) in enumerate(places) if os.path.abspath(name) in files]
    if not own:
        return defined_at(function)
    name, line = places[own[-1]]
    deepest, deepest_line = places[-1]
    below = "" if own[-1] == len(places) - 1 else f" (from {deepest}:{deepest_line})"
    return f", at {name}:{line}{below}"


def defined_at(function: Callable[..., Any]) -> str:
    """ ", at file:line" of the function's definition; empty for one that is not in Python."""
    codes = [code for code in map(_code, _layers(function)) if code is not None]
    return f", at {codes[-1].co_filename}:{codes[-1].co_firstlineno}" if codes else ""


def _layers(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """A function below its decorators and `partial`, which come first."""
    layers = [function]
    while True:
        inner = layers[-1]
        if isinstance(inner, functools.partial):
            layers.append(inner.func)
        elif hasattr(inner, "__wrapped__"):
            layers.append(inner.__wrapped__)
        else:
            return layers


def _code(function: Callable[..., Any]) -> CodeType | None:
    routine = function if inspect.isroutine(function) else type(function).__call__
    return getattr(routine, "__code__", None)


def _files(function: Callable[..., Any]) -> set[str]:
    """Where its layers are, and the module it is of: an object's `__call__` may be inherited."""
    layers = _layers(function)
    module = sys.modules.get(getattr(layers[-1], "__module__", None) or "")
    found = [getattr(_code(layer), "co_filename", None) for layer in layers]
    found.append(getattr(module, "__file__", None))
    return {os.path.abspath(name) for name in found if name}
