"""What comes after the decoder, next to the libraries that have it: TRL, verl, Liger, CCE, quack.

R rows of H hidden numbers, a vocabulary of V. "live" is the share of groups whose rewards differ,
the others having advantages of 0; "active" the share of tokens that a mask lets in.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness.providers import Case, Peer
from peers import loss_heads
from torch import Tensor

import lvrpo
from lvrpo.params.advantages import AdvantageParams
from lvrpo.params.policy_loss import LossParams

BOTH = (torch.float32, torch.bfloat16)
GROUP = 8  # completions of a prompt
LENGTH = 16  # tokens of a completion
GATE_ROWS = 512  # whose gradients in fp64 fit anywhere
DAPO = LossParams.preset("dapo")
PAPER = AdvantageParams.preset("paper")

FROM_LOGITS = {
    "small": [((32, 3203), BOTH)],
    "full": [((256, 151_936), BOTH)],
    "gpu": [((8192, 151_936), (torch.bfloat16,))],
}
# (rows, hidden, vocabulary), dtypes, entropy
FROM_HIDDEN = {
    "small": [((64, 32, 1003), (torch.float32,), entropy) for entropy in (False, True)],
    "full": [((512, 512, 32_768), (torch.float32,), entropy) for entropy in (False, True)],
    "gpu": [
        ((8192, 4096, 151_936), (torch.bfloat16,), False),
        ((4096, 2048, 151_936), (torch.bfloat16,), True),
    ],
}
# ((rows, hidden, vocabulary), live, active), dtypes
WHOLE = {
    "small": [(((64, 32, 1003), 1.0, 1.0), (torch.float32,))],
    "full": [
        (((512, 512, 32_768), live, active), (torch.float32,))
        for live, active in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))
    ],
    "gpu": [
        (((8192, 4096, 151_936), live, active), (torch.bfloat16,))
        for live, active in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))
    ],
}
GROUPS = {"small": 48, "full": 65_536, "gpu": 65_536}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each benchmark's `case_of` from the table of its size, one for every dtype."""
    tables = {
        "bench_logprobs_from_logits": FROM_LOGITS,
        "bench_logprobs_from_hidden": FROM_HIDDEN,
        "bench_loss_from_logits": FROM_LOGITS,
        "bench_loss_from_hidden": WHOLE,
    }
    table = tables.get(metafunc.function.__name__)
    if table is not None:
        entries = table[metafunc.config.getoption("--size")]
        cases = [(shape, dtype, *rest) for shape, dtypes, *rest in entries for dtype in dtypes]
        metafunc.parametrize("case_of", cases, ids=lambda case: "-".join(map(str, case)))


@pytest.mark.parametrize("entropy", [True, False], ids=["with entropy", "log-probs only"])
def bench_logprobs_from_logits(measure, direction, case_of, entropy):
    (rows, vocab), dtype = case_of
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    some = (
        loss_heads.FROM_LOGITS_WITH_ENTROPY if entropy else loss_heads.FROM_LOGITS_WITHOUT_ENTROPY
    )
    # A log-prob is a difference of numbers as large as the largest logit.
    largest = 1 + float(logits.abs().max())
    inputs = {"logits": logits, "token_ids": torch.randint(0, vocab, (rows,))}
    case = Case(
        "gather_logprobs",
        inputs | {"return_entropy": entropy},
        ("logits",),
        gate=some_rows(inputs) | {"return_entropy": entropy},
        plain=loss_heads.plain_gather_logprobs,
        # The backward reads the logits again and writes their gradient.
        bytes_moved={"forward": logits.nbytes, "forward+backward": 3 * logits.nbytes},
        peers={**loss_heads.FROM_LOGITS, **some},
        scales={"out0": largest, "out1": largest, "dlogits": largest / min(rows, GATE_ROWS)},
        shape=f"{rows}x{vocab}{' with entropy' * entropy}",
    )
    measure(case, direction)


def bench_logprobs_from_hidden(measure, direction, case_of):
    (rows, width, vocab), dtype, entropy = case_of
    inputs = head_inputs(rows, width, vocab, dtype)
    case = Case(
        "linear_logprobs",
        inputs | {"return_entropy": entropy},
        ("hidden", "weight"),
        gate=some_rows(inputs) | {"return_entropy": entropy},
        plain=loss_heads.plain_linear_logprobs,
        # One product forward, two more for the gradients.
        flops=head_flops(rows, width, vocab),
        peers={
            **loss_heads.FROM_HIDDEN,
            **({} if entropy else loss_heads.FROM_HIDDEN_WITHOUT_ENTROPY),
        },
        scales=head_scales(inputs),
        shape=f"{rows}x{width}x{vocab}{' with entropy' * entropy}",
    )
    measure(case, direction)


def first_of(functional: Any, **inputs: Any) -> Tensor:
    found = functional(params=DAPO, **inputs)
    return found[0] if isinstance(found, tuple) else found


def two_ops(**inputs: Any) -> Tensor:
    """The log-probs and their loss by the two ops of lvrpo that have them."""
    head = {name: inputs.pop(name) for name in ("logits", "token_ids")}
    return lvrpo.grpo_loss(lvrpo.gather_logprobs(**head), **inputs).loss


def bench_loss_from_logits(measure, case_of):
    (rows, vocab), dtype = case_of
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    inputs = {"logits": logits, "token_ids": torch.randint(0, vocab, (rows,))}
    inputs |= loss_inputs(lvrpo.gather_logprobs(**inputs), live=1.0, active=1.0)
    largest = 1 + float(logits.abs().max())
    case = Case(
        "logits_grpo_loss",
        inputs,
        ("logits",),
        call=first_of,
        gate=some_rows(inputs),
        plain=loss_heads.with_plain_loss(loss_heads.plain_gather_logprobs),
        bytes_moved={"forward+backward": 2 * logits.nbytes},
        peers={**loss_heads.LOSS_FROM_LOGITS, "two ops": Peer(lambda: two_ops)},
        scales={"out0": largest, "dlogits": largest / min(rows, GATE_ROWS)},
    )
    measure(case, "forward+backward")


def bench_loss_from_hidden(measure, case_of):
    ((rows, width, vocab), live, active), dtype = case_of
    inputs = head_inputs(rows, width, vocab, dtype)
    with torch.no_grad():
        logprobs = loss_heads.plain_linear_logprobs(**inputs)
    inputs |= loss_inputs(logprobs, live, active)
    case = Case(
        "linear_grpo_loss",
        inputs,
        ("hidden", "weight"),
        call=first_of,
        gate=some_rows(inputs),
        plain=loss_heads.with_plain_loss(loss_heads.plain_linear_logprobs),
        flops=head_flops(rows, width, vocab),
        peers=loss_heads.WHOLE_LOSS,
        # The loss is a mean of terms of order 1 that cancel.
        scales=head_scales(inputs) | {"out0": 1.0},
        shape=f"{rows}x{width}x{vocab}, live {live:.0%}, active {active:.0%}",
    )
    measure(case, "forward+backward")


def head_inputs(rows: int, width: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(rows, width).to(dtype),
        "weight": (torch.randn(vocab, width) * 2 / width**0.5).to(dtype),
        "token_ids": torch.randint(0, vocab, (rows,)),
    }


def loss_inputs(logprobs: Tensor, live: float, active: float) -> dict[str, Tensor]:
    rows = len(logprobs)
    sequences = rows // LENGTH
    groups = math.ceil(sequences / GROUP)
    varies = (torch.arange(groups) < round(live * groups)).repeat_interleave(GROUP)[:sequences]
    return {
        "old_logprobs": logprobs + 0.1 * torch.randn(rows),
        "advantages": torch.randn(sequences) * varies,
        "cu_seqlens": torch.arange(sequences + 1) * LENGTH,
        "mask": torch.rand(rows) < active,
    }


def some_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole sequences, as many as the gate takes."""
    sizes = dict.fromkeys(("advantages", "cu_seqlens"), GATE_ROWS // LENGTH)
    sizes["cu_seqlens"] += 1
    return {
        name: value if name == "weight" else value[: sizes.get(name, GATE_ROWS)]
        for name, value in inputs.items()
    }


def head_flops(rows: int, width: int, vocab: int) -> dict[str, int]:
    product = 2 * rows * width * vocab
    return {"forward": product, "forward+backward": 3 * product}


def head_scales(inputs: dict[str, Any]) -> dict[str, float]:
    """Of a log-prob, the largest logit; of a gradient, the terms of a sum after a mean."""
    hidden, weight = (float(inputs[name].abs().max()) for name in ("hidden", "weight"))
    rows = min(len(inputs["hidden"]), GATE_ROWS)
    logit = 5 * float(inputs["weight"].square().sum(dim=1).mean().sqrt())  # of a standard normal
    return {
        "out0": logit,
        "out1": logit,
        "dhidden": logit * weight / rows,
        "dweight": logit * hidden / rows,
    }


def loops(rewards: Tensor, group: int, **_: Any) -> Tensor:
    """A loop over prompts, as in the first trainers and in verl's default estimator."""
    summed, advantages = rewards.sum(dim=1), torch.zeros_like(rewards[:, 0])
    for begin in range(0, len(rewards), group):
        of_group = summed[begin : begin + group]
        spread = of_group.std() + PAPER.eps
        advantages[begin : begin + group] = (of_group - of_group.mean()) / spread
    return advantages


def vectorised(rewards: Tensor, group: int, **_: Any) -> Tensor:
    """For groups of one size and rewards that all apply, as in TRL."""
    grouped = rewards.sum(dim=1).view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    return (centred / (grouped.std(dim=1, keepdim=True) + PAPER.eps)).flatten()


def values_of(functional: Any, rewards: Tensor) -> Tensor:
    found = functional(rewards, GROUP, params=PAPER)
    return found if isinstance(found, Tensor) else found.values


def bench_advantages(measure, request):
    samples = GROUPS[request.config.getoption("--size")] * GROUP
    rewards = torch.rand(samples, 3)
    case = Case(
        "normalize_advantages",
        {"rewards": rewards},
        call=values_of,
        plain=vectorised,
        bytes_moved={"forward": 2 * rewards.nbytes + 4 * samples},
        peers={"loops": Peer(lambda: loops)},
        # An advantage is a difference of rewards of order 1 over a spread of order 0.3.
        scales={"out0": 10.0},
        shape=f"{samples // GROUP} groups of {GROUP}, K=3",
    )
    measure(case, "forward")
