"""Calls of code that others wrote: how long it may take, and where in it something went wrong."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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


def finished(value: Any) -> Any:
    """A value, or what it comes to where it is awaited: `async def` rewards return such ones.

    It has an event loop of its own, in this thread, or where that runs one, as in a notebook, in
    another.
    """
    if not inspect.isawaitable(value):
        return value

    async def awaited() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, awaited()).result()


def raised_at(error: BaseException, function: Callable[..., Any]) -> str:
    """ ", at file:line" of the innermost frame in the function's own package or file.

    What is below it, as a parser that was handed nonsense, is named behind it; the caller's frames
    above it never are.
    """
    names = set()
    for layer in _layers(function):
        names.add(getattr(layer, "__module__", None) or "")
        names.add(getattr(_routine(layer), "__globals__", {}).get("__name__", ""))
    return frame_of(error, names - {""}) or defined_at(function)


def frame_of(error: BaseException, modules: Iterable[str]) -> str:
    """The same of the innermost frame in the packages of some modules; empty if there is none."""
    frames = list(traceback.walk_tb(error.__traceback__))
    roots = {name.split(".")[0] for name in modules}
    own = [
        (frame, line)
        for frame, line in frames
        if str(frame.f_globals.get("__name__")).split(".")[0] in roots
    ]
    if not own:
        return ""
    (frame, line), (deepest, deepest_line) = own[-1], frames[-1]
    below = "" if frame is deepest else f" (from {deepest.f_code.co_filename}:{deepest_line})"
    return f", at {frame.f_code.co_filename}:{line}{below}"


def defined_at(function: Callable[..., Any]) -> str:
    """ ", at file:line" of the function's definition; empty for one that is not in Python."""
    codes = [getattr(_routine(layer), "__code__", None) for layer in _layers(function)]
    found = [code for code in codes if code is not None]
    return f", at {found[-1].co_filename}:{found[-1].co_firstlineno}" if found else ""


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


def _routine(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if inspect.isroutine(function) else type(function).__call__
