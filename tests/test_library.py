"""The registered ops: an extension built from other sources than this Python code is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lvrpo.ops import _library

pytestmark = pytest.mark.skipif(bool(_library.MISSING), reason=_library.MISSING)


def test_an_op_that_the_extension_does_not_have():
    with pytest.raises(ImportError, match=r"has no op unknown_op: .*build it again"):
        _library.register("unknown_op")(lambda: None)


def test_an_op_of_another_schema(monkeypatch):
    monkeypatch.setattr(_library, "_define_twin", lambda *_: None)
    monkeypatch.setattr(_library, "TWINS", set())

    def fake(logits: Tensor, an_argument_of_tomorrow: float) -> Tensor:
        return logits

    library = torch.library.Library("lvrpo", "FRAGMENT")
    library.define("flow_step_fwd_triton(Tensor logits, float an_argument_of_tomorrow) -> Tensor")
    try:
        with pytest.raises(
            ImportError, match=r"Tensor c_x.*expected .*of_tomorrow.*build it again"
        ):
            _library.register("flow_step_fwd", triton="flow_step")(fake)
    finally:
        library._destroy()


@pytest.mark.parametrize("name", sorted(_library.TWINS))
def test_results_may_have_names_and_aliases_theirs(name):
    assert _library.contract(name) == _library.contract(f"{name}_triton")
    assert "->" in _library.contract(name)
