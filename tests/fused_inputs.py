"""The two ops that form the log-probs of a policy loss themselves, called alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import plain_losses
import pytest
import torch
from torch import Tensor

import lvrpo
from lvrpo.dtypes import numbers, numbers_by_name
from lvrpo.ops.head.rows import OUTSIDE
from lvrpo.params.policy_loss import LOSS_NUMBERS, FusedPolicyLoss, LossParams

VOCAB = 7


def composite_arguments(inputs: Mapping[str, Any], params: LossParams) -> tuple[Any, ...]:
    """What composite ops take of these inputs, besides factors or logits and how they run."""
    indices = "token_ids", "row_index", "vocab_range"
    loss = "old_logprobs", "advantages", "cu_seqlens", "ref_logprobs", "mask", "policy_weights"
    tensors = [
        *(*(inputs.get(name) for name in indices), numbers(0.9, 0.0, OUTSIDE)),
        *(inputs.get(name) for name in loss),
        *(numbers_by_name(LOSS_NUMBERS, params.numbers()), None, None, None, None, None),
    ]
    flags = [False, params.count_empty, params.sequence_level, True, True]
    return tensors, flags, " ".join(f"{kind}={name}" for kind, name in params.choices().items())


Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Head:
    """One of them.

    Attributes:
        op: it.
        rows: which of its factors has a row for each token.
    """

    op: Callable[..., FusedPolicyLoss]
    rows: str

    def factors(self, logits: Tensor) -> dict[str, Tensor]:
        """What gives these logits [R, V]."""
        if self.rows == "logits":
            return {"logits": logits}
        made = torch.Generator().manual_seed(7)
        weight = torch.randn(logits.shape[1], logits.shape[1] + 2, generator=made).to(logits)
        bias = torch.randn(logits.shape[1], generator=made).to(logits)
        return {
            "hidden": (logits - bias) @ torch.linalg.pinv(weight).T,
            "weight": weight,
            "bias": bias,
        }

    def logits(self, factors: Tensors) -> Tensor:
        """What the factors give."""
        if self.rows == "logits":
            return factors["logits"]
        return factors["hidden"] @ factors["weight"].T + factors["bias"]

    def where(self, factors: Tensors, kept: Tensor) -> dict[str, Tensor]:
        """The factors without the other rows."""
        return {**factors, self.rows: factors[self.rows][kept]}

    def shaped(self, factors: Tensors, *shape: int) -> dict[str, Tensor]:
        """The factors with rows in this shape."""
        return {**factors, self.rows: factors[self.rows].unflatten(0, shape)}

    def run(self, factors: Tensors, **inputs: Any) -> tuple[FusedPolicyLoss, dict[str, Tensor]]:
        """The result, and the gradients of the factors."""
        return differentiated(self.op, factors, **inputs)

    def unread(self) -> Head:
        """The same where no value may be read."""
        torch.compiler.reset()
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        return dataclasses.replace(self, op=compiled)

    def plain(
        self, factors: Tensors, token_ids: Tensor, lengths: list[int], **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients by `plain_losses`."""

        def loss(**leaves: Tensor) -> tuple[Tensor]:
            terms = plain_losses.softmax_terms(self.logits(leaves), token_ids)
            return (plain_losses.policy_loss(*terms, lengths, **inputs),)

        (found,), gradients = differentiated(loss, factors)
        return found.detach(), gradients


def differentiated(
    function: Callable[..., Any], factors: Tensors, **inputs: Any
) -> tuple[Any, dict[str, Tensor]]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in factors.items()}
    result = function(**leaves, **inputs)
    gradients = torch.autograd.grad(result[0], list(leaves.values()))
    return result, dict(zip(leaves, gradients, strict=True))


HEADS = {
    "logits": Head(lvrpo.logits_grpo_loss, "logits"),
    "linear": Head(lvrpo.linear_grpo_loss, "hidden"),
}
both_heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def params_of(name: str, **changes: Any) -> LossParams:
    length = {"max_length": 8} if name == "dr_grpo" else {}
    return LossParams.preset(name, **length, **changes)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclasses.dataclass
class Batch:
    """Packed tokens with all that a loss takes, of fp64; a mask that leaves some of them out."""

    factors: dict[str, Tensor]
    token_ids: Tensor
    lengths: list[int]
    inputs: dict[str, Tensor]

    @property
    def tokens(self) -> dict[str, Any]:
        """Arguments of an op, besides the factors."""
        return {"token_ids": self.token_ids, "cu_seqlens": offsets(self.lengths), **self.inputs}

    @property
    def plainly(self) -> dict[str, Any]:
        """Arguments of `Head.plain`."""
        renamed = {"old_logprobs": "old", "ref_logprobs": "ref", "policy_weights": "weights"}
        given = {renamed.get(name, name): x for name, x in self.inputs.items()}
        if len(given["advantages"]) == len(self.lengths):
            given["advantages"] = given["advantages"].repeat_interleave(torch.tensor(self.lengths))
        return {"token_ids": self.token_ids, "lengths": self.lengths, **given}


def make_batch(head: Head, lengths: list[int], seed: int = 0) -> Batch:
    made, count = torch.Generator().manual_seed(seed), sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).double()

    logits = 2 * normal(count, VOCAB)
    token_ids = torch.randint(0, VOCAB, (count,), generator=made)
    logp, _ = plain_losses.softmax_terms(logits, token_ids)
    weights = torch.rand(count, generator=made).double() + 0.5
    return Batch(
        head.factors(logits),
        token_ids,
        lengths,
        {
            "old_logprobs": logp + 0.3 * normal(count),
            "ref_logprobs": logp + 0.4 * normal(count),
            "advantages": normal(len(lengths)),
            "mask": torch.arange(count) % 4 != 1,
            "policy_weights": weights * (torch.arange(count) % 5 != 3),
        },
    )
