"""The registered ops: an extension built from other sources than this Python code is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lvrpo.backends import library

pytestmark = pytest.mark.skipif(bool(library.MISSING), reason=library.MISSING)


def test_an_op_that_the_extension_does_not_have():
    with pytest.raises(ImportError, match=r"has no op unknown_op: .*build it again"):
        library.register("unknown_op")(lambda: None)


def test_an_op_of_another_schema(monkeypatch):
    monkeypatch.setattr(library, "_define_twin", lambda *_: None)
    monkeypatch.setattr(library, "TWINS", set())

    def fake(logits: Tensor, an_argument_of_tomorrow: float) -> Tensor:
        return logits

    fragment = torch.library.Library("lvrpo", "FRAGMENT")
    fragment.define("flow_step_fwd_triton(Tensor logits, float an_argument_of_tomorrow) -> Tensor")
    try:
        with pytest.raises(
            ImportError, match=r"Tensor c_x.*expected .*of_tomorrow.*build it again"
        ):
            library.register("flow_step_fwd", triton="flow_step")(fake)
    finally:
        fragment._destroy()


@pytest.mark.parametrize("name", sorted(library.TWINS))
def test_results_may_have_names_and_aliases_theirs(name):
    assert library.contract(name) == library.contract(f"{name}_triton")
    assert "->" in library.contract(name)
