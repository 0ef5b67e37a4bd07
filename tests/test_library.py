"""The registered ops: one contract, whoever implements it."""

from __future__ import annotations

import re

import pytest
import torch

from lvrpo.ops import _library


def contract(name: str) -> str:
    """Arguments and types of the results; aliases and results have names of their own."""
    schema = str(getattr(torch.ops.lvrpo, name).default._schema)
    arguments, _, results = schema.partition("(")[2].rpartition(" -> ")
    results = re.sub(r"(Tensor(?:\[\])?) \w+", r"\1", results)
    return re.sub(r"\(\w+!\)", "(!)", arguments) + " -> " + results


@pytest.mark.parametrize("name", sorted(_library.TWINS))
def test_a_triton_twin_has_the_schema_of_the_cpp_op(name):
    if _library.MISSING:
        pytest.skip(_library.MISSING)
    assert contract(f"{name}_triton") == contract(name)


def test_extension_of_older_sources_is_named():
    if _library.MISSING:
        pytest.skip(_library.MISSING)
    with pytest.raises(ImportError, match=r"has no op unknown_op.*build it again"):
        _library.register("unknown_op")(lambda: None)
