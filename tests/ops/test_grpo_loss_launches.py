"""How the CUDA kernels cut a call into launches does not show in what they compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_inputs import PARAMS, make_inputs, run_op
from runnable import EMULATED
from torch import Tensor

from lvrpo.ops.grpo_loss import LossParams

pytestmark = [
    pytest.mark.skipif(not EMULATED, reason="the CUDA kernels run here under LVRPO_EMULATE=1"),
    pytest.mark.usefixtures("poison_empty"),
]
#: A ratio of tokens or of sequences, its slope shared or not, with counts and without.
FORMS = ["grpo, all terms", "gspo, all terms", "vespo, clamped KL", "rloo", "gmpo", "token sum"]
#: Slices of several sequences, of few and of more than the blocks of one launch have warps for.
LENGTHS = {"few": [700, 0, 1300, 4], "some": [9] * 60 + [600, 0], "many": [5] * 270 + [0, 600]}


def run(lengths: list[int], params: LossParams) -> list[Tensor]:
    inputs = make_inputs(lengths) | {"params": params, "backend": "cuda (emulated)"}
    leaves = {name: inputs[name].requires_grad_() for name in ("logprobs", "entropy")}
    loss, metrics = run_op(**inputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [loss.detach(), metrics, *(x for x in gradients if x is not None)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_same_bits_with_clusters_and_without(name, lengths, monkeypatch):
    params = dataclasses.replace(PARAMS[name], count_empty=False)
    found = []
    for capability in ("90", "80"):
        monkeypatch.setenv("LVRPO_EMULATE_CAPABILITY", capability)
        found.append(run(lengths, params))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_a_call_without_counts_has_the_gradients_of_one_with_the_same_factors(name):
    lengths = [700, 0, 3]
    params = dataclasses.replace(PARAMS[name], aggregation="token_sum")
    nothing_counted = run(lengths, params)
    params = dataclasses.replace(params, aggregation="seq_mean_token_sum_norm", max_length=2)
    halves = run(lengths, dataclasses.replace(params, count_empty=False))
    sequences = 2  # that have active tokens
    for whole, part in zip(nothing_counted[2:], halves[2:], strict=True):
        torch.testing.assert_close(whole, part * 2 * sequences)
