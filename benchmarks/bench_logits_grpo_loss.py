"""The policy loss with an entropy bonus from logits, by how many rows have a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.providers import Case, Peer
from torch import Tensor

import lvrpo
from lvrpo.ops.grpo_loss import LossParams

LENGTH = 16
# (rows, vocabulary), share of the sequences with an advantage, share of those that are let in
SHAPES = {
    "small": {"odd vocabulary": ((64, 3203), 1.0, 1.0)},
    "full": {
        "every row": ((256, 151_936), 1.0, 1.0),
        "half of them live": ((256, 151_936), 0.5, 1.0),
        "half of them masked": ((256, 151_936), 1.0, 0.5),
    },
}


def two_ops(logits: Tensor, token_ids: Tensor, params: LossParams, **inputs: Any) -> Any:
    """The same by the two ops that this one fuses."""
    logprobs, entropy = lvrpo.gather_logprobs(logits, token_ids, return_entropy=True)
    return lvrpo.grpo_loss(logprobs, entropy=entropy, params=params, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_logits_grpo_loss(measure, shape, dtype):
    (rows, vocab), live, active = shape
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    token_ids = torch.randint(0, vocab, (rows,))
    count = rows // LENGTH
    share = torch.arange(count) / count
    inputs = {
        "logits": logits,
        "token_ids": token_ids,
        "old_logprobs": lvrpo.gather_logprobs(logits, token_ids) + 0.1 * torch.randn(rows),
        "advantages": torch.randn(count) * (share < live),
        "cu_seqlens": torch.arange(count + 1) * LENGTH,
        "mask": (share < active).repeat_interleave(LENGTH),
    }
    # Without an entropy bonus: it is a gradient of every row that is let in.
    params = LossParams(entropy_coef=0.01 * (live == 1.0))

    def call(functional: Any, **given: Any) -> Tensor:
        return functional(**given, params=params).loss

    largest = 1 + float(logits.abs().max())
    case = Case(
        "logits_grpo_loss",
        inputs,
        ("logits",),
        call=call,
        # Each row is read and its gradient written; a dead one is read for the metrics.
        bytes_moved={"forward+backward": int((1 + active) * logits.nbytes)},
        peers={"two ops": Peer(lambda: two_ops)},
        scales={"out0": largest, "dlogits": largest * largest / (rows * active)},
    )
    measure(case, "forward+backward")
