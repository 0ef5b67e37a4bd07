"""The two ways in which sequences of tokens come: packed [T], or padded [B, C].

T packed tokens, B sequences, C columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lvrpo import checks

#: What a tensor with one number for each has: tokens, or sequences.
Level = Literal["token", "sequence"]


def sequences_of(offsets: Tensor, tokens: int) -> Tensor:
    """[T] the sequence of each token; of one that none has, and nobody read that, any there is."""
    token = torch.arange(tokens, device=offsets.device)
    after = torch.searchsorted(offsets, token, right=True)
    return (after - 1).clamp(0, max(0, offsets.shape[0] - 2))


def held_tokens(offsets: Tensor, tokens: int) -> Tensor:
    """[T] whether a sequence has the token: all of them, unless nobody read the offsets."""
    token = torch.arange(tokens, device=offsets.device)
    return (token >= offsets[0]) & (token < offsets[-1])


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How the tokens of a call are laid out.

    Attributes:
        op: who asks, for the errors.
        shape: of a tensor with one number per token: (T,) or (B, C).
        offsets: [B + 1] int64, where the sequences begin and end in the flattened tokens.
    """

    op: str
    shape: tuple[int, ...]
    offsets: Tensor

    @property
    def tokens(self) -> int:
        """T, or B * C."""
        return self.shape[0] if len(self.shape) == 1 else self.shape[0] * self.shape[1]

    @property
    def sequences(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    def flatten(self, name: str, tensor: Tensor) -> Tensor:
        """One number per token as [T].

        Raises:
            ValueError: the tensor has another shape.
        """
        checks.check_shape(self.op, name, tensor, self.shape)
        return tensor if len(self.shape) == 1 else tensor.reshape(-1)

    def restore(self, tensor: Tensor) -> Tensor:
        """[T] in the shape that the caller has."""
        return tensor.reshape(self.shape)

    def held(self) -> Tensor:
        """[T] whether a sequence has the token; see `held_tokens`."""
        return held_tokens(self.offsets, self.tokens)

    def per_token(
        self, name: str, tensor: Tensor, level: Level | None, only_sequences: str | None = None
    ) -> bool:
        """Whether a tensor has a number per token, or one per sequence: [B] or [B, 1].

        Args:
            name: of the tensor, for the errors.
            tensor: it.
            level: what the caller says it is; None to go by its shape.
            only_sequences: what takes numbers per sequence only, if anything does.

        Raises:
            ValueError: it is neither, not what it has to be, or may be both.
        """
        shape = tuple(tensor.shape)
        # One comparison at a time: a compiled graph has no tuples of sizes that vary.
        fits = {
            "sequence": any(
                checks.is_shape(shape, x) for x in ((self.sequences,), (self.sequences, 1))
            ),
            "token": checks.is_shape(shape, self.shape),
        }
        has = f"{self.op}: {name} has shape {shape}"
        if level is not None and level not in fits:
            raise ValueError(
                f"{self.op}: level is {level!r}, expected 'token' or 'sequence', or None"
            )
        if not (fits[level] if level else fits["sequence"] or fits["token"]):
            of_token = "[T]" if len(self.shape) == 1 else "[B, C]"
            wanted = {
                "sequence": f"[B] = [{self.sequences}]",
                "token": f"{of_token} = {list(self.shape)}",
            }
            expected = wanted[level] if level else f"{wanted['sequence']} or {wanted['token']}"
            raise ValueError(f"{has}, expected {expected}")
        if only_sequences is not None:
            if not fits["sequence"] or level == "token":
                raise ValueError(
                    f"{has}, but {only_sequences} takes one per sequence, [{self.sequences}]"
                )
            return False
        if level is not None:
            return level == "token"
        if fits["sequence"] and fits["token"] and len(self.shape) == 1 and self.sequences > 0:
            each_has_one = checks.check_values(self.offsets) and bool(
                (self.offsets.diff() == 1).all()
            )
            if not each_has_one:
                raise ValueError(
                    f"{has}, which is [B] and [T]; say which with level='sequence' or level='token'"
                )
        return not fits["sequence"]


def token_layout(
    op: str, name: str, tensor: Tensor, cu_seqlens: Tensor | Sequence[int] | None
) -> TokenLayout:
    """The layout that a tensor with one number per token, and offsets or their absence, say.

    Raises:
        ValueError: packed tokens without offsets, padded ones with them, or offsets that do not
            fit.
    """
    if tensor.dim() not in (1, 2):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected [T] with cu_seqlens, or [B, C]"
        )
    if tensor.dim() == 1:
        if cu_seqlens is None:
            raise ValueError(
                f"{op}: cu_seqlens is None, but {name} has shape {tuple(tensor.shape)}; packed "
                "tokens [T] need the [B + 1] offsets of their sequences (padded ones are [B, C])"
            )
        total = tensor.shape[0]
        offsets = checks.as_offsets(op, "cu_seqlens", cu_seqlens, total, tensor.device)
        return TokenLayout(op, (total,), offsets)
    if cu_seqlens is not None:
        raise ValueError(
            f"{op}: cu_seqlens is given, but {name} has shape {tuple(tensor.shape)}, a sequence a "
            "row; expected None, with mask= saying which tokens of the rows count"
        )
    sequences, columns = tensor.shape
    offsets = torch.arange(sequences + 1, device=tensor.device) * columns
    return TokenLayout(op, (sequences, columns), offsets)
