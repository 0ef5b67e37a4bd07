"""The registered ops: an extension built from other sources than this Python code is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lvrpo.backends import library

pytestmark = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)


def test_an_op_that_the_extension_does_not_have():
    def fake(x: Tensor) -> Tensor:
        return x

    with pytest.raises(ImportError, match=r"has no op unknown_op: .*build it again"):
        library.register("unknown_op", kernels="unknown_op")(fake)


def test_an_op_of_another_schema():
    def fake(logits: Tensor, an_argument_of_tomorrow: float) -> Tensor:
        return logits

    with pytest.raises(ImportError, match=r"Tensor c_x.*expected .*of_tomorrow.*build it again"):
        library.register("flow_step_fwd", kernels="flow_step")(fake)


@pytest.mark.parametrize("name", sorted(library.KERNELS["triton"]))
def test_a_triton_overload_has_the_schema_of_its_op(name):
    compiled, triton = (
        getattr(torch.ops.lvrpo, f"{name}{suffix}").default._schema for suffix in ("", "_triton")
    )
    positional = torch._C.parse_schema(str(triton).replace("str ", "int "))
    assert library._contract(compiled) == library._contract(positional)
    assert compiled.arguments


def test_what_an_op_writes_to_is_part_of_its_contract():
    schemas = ("f(Tensor(a!) x) -> ()", "f(Tensor x) -> ()", "f(Tensor(z!) x) -> ()")
    written, read, renamed = (library._contract(torch._C.parse_schema(x)) for x in schemas)
    assert written == renamed != read
