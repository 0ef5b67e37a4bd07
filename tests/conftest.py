"""Fixtures every suite shares."""

from __future__ import annotations

import pytest
import torch

from lvrpo.ops import _library


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and _library.MISSING:
        pytest.skip(f"backend cpp: {_library.MISSING}")
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison_empty():
    """Fill uninitialised memory with NaN, so that an output nobody wrote cannot pass by luck."""
    previous = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous)
    torch.utils.deterministic.fill_uninitialized_memory = fill
