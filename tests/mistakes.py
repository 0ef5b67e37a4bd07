"""A mistake in the text of the real code, and whether a test notices it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest


class Mistake(NamedTuple):
    """A piece of a function's text, what stands in its place, and the test that has to fail.

    Attributes:
        function: of lvrpo.
        right: stands once in its text.
        wrong: in its place.
        test: that notices; of a property, what is checked of one example.
        arguments: of the test.
    """

    function: Callable[..., Any]
    right: str
    wrong: str
    test: Callable[..., Any]
    arguments: Mapping[str, Any] = MappingProxyType({})

    def is_noticed(self) -> bool:
        """Whether the test fails, and not by an error of another kind, for whoever calls it."""
        plain: Any = inspect.unwrap(self.function)
        source = textwrap.dedent(inspect.getsource(plain))
        assert source.count(self.right) == 1, f"{self.right!r} does not stand once in {plain}"
        found: dict[str, Any] = {}
        lines = f"from __future__ import annotations\n{source.replace(self.right, self.wrong)}"
        exec(lines, dict(plain.__globals__), found)
        of_one_example = getattr(self.test, "hypothesis", None)
        test = self.test if of_one_example is None else of_one_example.inner_test
        with pytest.MonkeyPatch.context() as patch:
            test(**self.arguments)  # which has nothing to complain of yet
            patch.setattr(plain, "__code__", inspect.unwrap(found[plain.__name__]).__code__)
            try:
                test(**self.arguments)
            except AssertionError:
                return True
        return False
