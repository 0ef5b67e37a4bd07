"""What the corrections of `lvrpo.sampler_correction` take, checked and in one form.

T packed tokens of B sequences, or [B, C] padded ones, whose sequences are the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.dtypes import widen
from lvrpo.token_layout import TokenLayout, token_layout

#: What log-probs, masks and advantages are given as.
Numbers = Tensor | Sequence[Any]


class Sequences:
    """Sums over the active tokens of sequences, in fp64 and in the order of the tokens."""

    def __init__(self, layout: TokenLayout, active: Tensor) -> None:
        # Offsets that do not fit are refused on a CPU; where nobody reads them they stay in range.
        self.offsets = layout.offsets.clamp(0, layout.tokens)
        position = torch.arange(layout.tokens, device=active.device)
        sequence = torch.searchsorted(self.offsets, position, right=True) - 1
        self.sequence = sequence.clamp(0, max(layout.sequences - 1, 0))
        self.count = self.sum(active)

    def sum(self, x: Tensor) -> Tensor:
        """[T] -> [B]; 0 for an empty sequence."""
        # Unlike index_add on a GPU, the same bits every time.
        return torch.segment_reduce(x.double(), "sum", offsets=self.offsets, unsafe=True)

    def mean(self, x: Tensor) -> Tensor:
        """[T] -> [B]; 0 for a sequence without active tokens."""
        return self.sum(x) / self.count.clamp(min=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B] -> [T]."""
        return x[self.sequence]

    def at_level(self, x: Tensor, level: str) -> Tensor:
        """[T] -> [T]: every token's own, or what its sequence has."""
        if level == "token":
            return x
        return self.to_tokens(self.sum(x) if level == "seq_sum" else self.mean(x))

    def mean_weight(self, weights: Tensor, by_sequence: bool) -> Tensor:
        """Of the active tokens, or of the sequences that have any."""
        if not by_sequence:
            return weights.double().sum() / self.count.sum().clamp(min=1)
        return self.mean(weights).sum() / (self.count > 0).sum().clamp(min=1)


def as_logprobs(op: str, given: dict[str, Any], like: Tensor | None = None) -> dict[str, Tensor]:
    """Floating tensors; a list becomes one where `like`, or else the first tensor of all, is."""
    tensors = [x for x in (like, *given.values()) if isinstance(x, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    found = {}
    for name, value in given.items():
        tensor = checks.as_tensor(op, name, value, device)
        if tensor is not value and not tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        checks.check_floating(op, name, tensor)
        found[name] = tensor.detach()
    return found


def as_active(op: str, like: Tensor, mask: Numbers | None) -> Tensor:
    """The mask as bool, in the shape of `like`."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    active = checks.as_tensor(op, "mask", mask, like.device)
    checks.check_shape(op, "mask", active, tuple(like.shape))
    checks.check_same_device(op, **{"mask": active, "the tokens": like})
    return checks.as_mask(op, "mask", active)


def without(op: str, name: str, values: Tensor, active: Tensor, bad: Tensor) -> Tensor:
    """The active tokens that are not bad; the first that is, is refused where values are read."""
    if checks.check_values(values):
        expected = "a finite number where the mask lets the token in"
        checks.refuse_first(op, name, values, active & bad, expected)
    return active & ~bad


def token_inputs(
    op: str,
    given: dict[str, Any],
    cu_seqlens: Tensor | Sequence[int] | None,
    mask: Numbers | None,
) -> tuple[TokenLayout, list[Tensor], Tensor]:
    """Their layout, the tensors as [T], and the active tokens as bool [T]."""
    tensors = as_logprobs(op, given)
    name, first = next(iter(tensors.items()))
    layout = token_layout(op, name, first, cu_seqlens)
    checks.check_same_device(op, **tensors, cu_seqlens=layout.offsets)
    active = as_active(op, first, mask)
    for name, tensor in tensors.items():
        checks.check_shape(op, name, tensor, layout.shape)
        bad = tensor.isinf() if name == "sampler_logprobs" else ~tensor.isfinite()
        active = without(op, name, tensor, active, bad)
    return layout, [layout.flatten(*named) for named in tensors.items()], active.reshape(-1)


def advantage_of_token(
    layout: TokenLayout, sequences: Sequences, advantages: Numbers, like: Tensor
) -> Tensor:
    """[T], from advantages per sequence or per token."""
    op, count = layout.op, layout.sequences
    values = as_logprobs(op, {"advantages": advantages}, like)["advantages"]
    shape = tuple(values.shape)
    checks.check_same_device(op, advantages=values, cu_seqlens=layout.offsets)
    by_sequence = checks.is_shape(shape, (count,)) or checks.is_shape(shape, (count, 1))
    by_token = checks.is_shape(shape, layout.shape)
    if not by_sequence and not by_token:
        raise ValueError(
            f"{op}: advantages has shape {shape}, expected [{count}] or [{count}, 1] per sequence, "
            f"or {list(layout.shape)}"
        )
    if by_sequence and by_token and len(shape) == 1 and count > 0:
        each_has_one = checks.check_values(layout.offsets) and bool(
            (layout.offsets.diff() == 1).all()
        )
        if not each_has_one:
            raise ValueError(
                f"{op}: advantages has shape {shape}, which is [B] and [T]; give [B, 1] if there "
                "is one per sequence, and padded tokens if there is one per token"
            )
    flat = values.reshape(-1)
    return sequences.to_tokens(flat) if by_sequence else flat


def advantage_inputs(
    layout: TokenLayout, advantages: Numbers, like: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """[T] advantages, and the active tokens whose advantage is finite; the first other is refused
    where values are read.
    """
    advantage = advantage_of_token(layout, Sequences(layout, active), advantages, like)
    if checks.check_values(advantage):
        op, bad = layout.op, layout.restore(active & ~advantage.isfinite())
        expected = "finite numbers where the mask lets the token in"
        checks.refuse_first(op, "advantages, by token", layout.restore(advantage), bad, expected)
    return advantage, active & advantage.isfinite()


def entropy_inputs(op: str, entropy: Numbers, mask: Numbers | None) -> tuple[Tensor, Tensor]:
    """The values, and which tokens are active; both in the caller's shape."""
    values = as_logprobs(op, {"entropy": entropy})["entropy"]
    active = as_active(op, values, mask)
    return widen(values), without(op, "entropy", values, active, ~values.isfinite())
