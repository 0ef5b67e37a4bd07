"""Long rows, which blocks of a GPU share, keep on the chip or read again."""

from __future__ import annotations

import functools

import pytest
import torch
from logits_inputs import make_inputs, run_op
from loss_inputs import PARAMS
from ops.test_logits_grpo_loss import check, in_place
from runnable import WITH_KERNELS

pytestmark = pytest.mark.usefixtures("poison_empty")

#: By dtype, columns of a row that four blocks share and one block cannot keep; one is odd, so that
#: rows begin anywhere.
LONG = {torch.float32: 24_581, torch.bfloat16: 49_168}


@pytest.fixture(params=[90, 80], ids=["clusters", "no clusters"], autouse=True)
def _capability(request, monkeypatch):
    monkeypatch.setenv("LVRPO_EMULATE_CAPABILITY", str(request.param))


@pytest.mark.parametrize("dtype", LONG, ids=str)
@pytest.mark.parametrize("op", [run_op, in_place])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
def test_matches_reference(backend, dtype, op, options):
    inputs = make_inputs([2, 1], dtype, width=2, vocab=LONG[dtype])
    inputs |= {"params": PARAMS["grpo, all terms"]} | options
    check(functools.partial(op, backend=backend), inputs)


def test_a_range_that_begins_and_ends_within_the_parts_of_a_row(backend):
    vocab = LONG[torch.float32]
    inputs = make_inputs([3], width=2, vocab=vocab) | {"params": PARAMS["grpo, all terms"]}
    inputs["vocab_range"] = torch.tensor([[0, 6000], [5999, 20_001], [vocab - 7, vocab]])
    inputs["token_ids"] = torch.tensor([5999, 6150, vocab - 1])
    check(functools.partial(run_op, backend=backend), inputs)


@pytest.mark.parametrize("backend", WITH_KERNELS, indirect=True)
def test_a_row_has_the_same_bits_wherever_it_lies(backend):
    inputs = make_inputs([1], width=2, vocab=LONG[torch.float32])
    inputs |= {"params": PARAMS["grpo, all terms"]}
    memory = torch.zeros(1, LONG[torch.float32] + 8)

    def run(begin: int) -> list[torch.Tensor]:
        logits = memory[:, begin : begin + LONG[torch.float32]]
        logits.copy_(inputs["logits"])
        leaf = logits.detach().requires_grad_()
        loss, *others = run_op(**inputs | {"logits": leaf}, backend=backend)
        return [loss, *others, *torch.autograd.grad(loss, leaf)]

    first = run(0)
    for begin in (1, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(begin), strict=True))
