"""Answers are kept while they are the same ones for everybody."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from lvrpo.kept import kept, kept_tensor


def test_a_question_is_asked_once():
    asked = []

    @kept
    def square(x: int) -> int:
        asked.append(x)
        return x * x

    assert [square(x) for x in (2, 3, 2, 3)] == [4, 9, 4, 9]
    assert asked == [2, 3]


def test_torch_compile_reads_through_it():
    @kept
    def scale(name: str) -> float:
        return {"one": 1.0, "two": 2.0}[name]

    def scaled(x, name):
        return x * scale(name)

    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    x = torch.arange(3.0)
    assert torch.equal(compiled(x, "two"), scaled(x, "two"))


def test_a_tensor_is_kept_real_and_for_autograd():
    @kept_tensor
    def count(n: int) -> torch.Tensor:
        return torch.arange(n, device="cpu")

    with FakeTensorMode():
        assert isinstance(count(3), FakeTensor)
    with torch.inference_mode():
        first = count(3)
    assert not first.is_inference()
    assert count(3) is first
    assert first.tolist() == [0, 1, 2]
