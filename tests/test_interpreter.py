"""Triton's interpreter as users meet it: without what the tests' own session repairs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lvrpo.backends.triton import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")

SCRIPT = """
import torch
from lvrpo import SpanMask, gather_logprobs, info, packed_attention
from lvrpo.testing import (
    DEFAULT_ULPS, check_against_plain, interpreter_has_bf16, interpreter_with_bf16
)

torch.manual_seed(0)
mask = SpanMask.from_cu_seqlens([0, 5, 9])
q, k, v = (torch.randn(9, 2, 16).bfloat16() for _ in range(3))
logits, ids = torch.randn(4, 9).bfloat16(), torch.tensor([1, 2, 3, 4])


def both():
    attended = packed_attention(q, k, v, mask, backend="triton")
    return attended, gather_logprobs(logits, ids, backend="triton")


for _ in range(2):
    for call in (
        lambda: packed_attention(q, k, v, mask, backend="triton"),
        lambda: gather_logprobs(logits, ids, backend="triton"),
    ):
        try:
            call()
        except ValueError as error:
            assert "multiplies the bit patterns of bf16" in str(error), error
        else:
            raise AssertionError("computed with bf16")
    assert not interpreter_has_bf16()
    with interpreter_with_bf16():
        assert interpreter_has_bf16()
        attended, logprobs = both()
        with interpreter_with_bf16():
            assert torch.equal(both()[0], attended)
        assert torch.equal(both()[1], logprobs)
visible = torch.block_diag(torch.ones(5, 5).tril(), torch.ones(4, 4).tril()).bool()
z = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / 4
p = z.masked_fill(~visible, -torch.inf).softmax(-1)
gold, summands = (torch.einsum("hqk,khd->qhd", p, x.double()) for x in (v, v.abs()))
# The kernel takes probabilities in bf16, which is a part in 2^8 of every summand.
scale = summands * (2 + 2**16 / DEFAULT_ULPS)
check_against_plain(attended, gold, gold.bfloat16(), scale=scale)
right = logits.double().log_softmax(-1)[range(4), ids]
torch.testing.assert_close(logprobs, right.float())
assert "in the interpreter, but for bf16" in info.describe()
fp32 = packed_attention(q.float(), k.float(), v.float(), mask, backend="triton")
torch.testing.assert_close(fp32, gold.float())
"""


def test_bf16_is_refused_or_right():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
