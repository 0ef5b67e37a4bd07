"""Fixtures every suite shares."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from interpreter_memory import checked_memory
from runnable import EMULATED, RUNNABLE

from lvrpo import backends, info
from lvrpo.testing import interpreter_with_bf16

# How long an example takes is no property of the code on a machine that does other things too.
hypothesis.settings.register_profile("lvrpo", deadline=None)
hypothesis.settings.load_profile("lvrpo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the CPU seven of eight cases of a GPU's kernel are slow: many take seconds."""
    slow = {"triton": backends.triton_interprets(), "emulated": EMULATED}
    cases: collections.Counter[tuple[str, str]] = collections.Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        for kernels in (x for x, is_here in slow.items() if is_here and x in item.nodeid):
            if cases[name, kernels] % 8:
                item.add_marker(pytest.mark.slow)
            cases[name, kernels] += 1


@pytest.fixture(params=RUNNABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a backend; where it needs a GPU, the tensors that the test makes are on it."""
    name, stem = str(request.param), request.path.stem.removeprefix("test_")
    ops = [op for op in info.op_names() if stem.startswith(op)]
    found = backends.named(name)
    reasons = found.why_not(max(ops, key=len)) if ops else []
    if reasons:
        pytest.skip(f"backend {name}: {'; '.join(reasons)}")
    if found.device == "cuda":
        with torch.device("cuda"):
            yield name
    else:
        yield name


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> Iterator[None]:
    """It computes with bf16, and kernels stay inside their tensors."""
    if "triton" not in RUNNABLE or not backends.triton_interprets():
        yield
        return
    with interpreter_with_bf16(), checked_memory():
        yield


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
