"""What packed buffers hold, counted: rows by kind, and who sees whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lvrpo.masks import SpanMask
from lvrpo.models.packs import Pack, SpanBatch


class PackedRows(SpanBatch, Protocol):
    """A buffer of spans whose rows are of three kinds."""

    @property
    def patch_rows(self) -> Tensor:
        """[n_patch] int64, ascending; the patches of a span are one picture."""

    @property
    def latent_rows(self) -> Tensor:
        """[n_latent] int64."""


@dataclass(frozen=True)
class Rows:
    """Rows of one packed buffer, or the sum of several.

    Attributes:
        text: tokens.
        patches: of pictures that are read.
        latents: of pictures that are drawn.
        predictors: text rows that are projected on the vocabulary.
        tokens: targets of the text loss, of which a row may have several.
        pairs: (query, key) pairs that the mask shows the language model.
        patch_pairs: those of the vision tower, in which the patches of a picture see each other.
    """

    text: int = 0
    patches: int = 0
    latents: int = 0
    predictors: int = 0
    tokens: int = 0
    pairs: int = 0
    patch_pairs: int = 0

    @property
    def read(self) -> int:
        """Rows of the understanding expert."""
        return self.text + self.patches

    @property
    def total(self) -> int:
        """L."""
        return self.read + self.latents

    def __add__(self, other: Rows) -> Rows:
        """Both."""
        return self._each(lambda mine, its: mine + its, other)

    def __sub__(self, other: Rows) -> Rows:
        """Without those of another."""
        return self._each(lambda mine, its: mine - its, other)

    def __mul__(self, times: int) -> Rows:
        """So many times."""
        return self._each(lambda mine, _: times * mine, self)

    def _each(self, of: Callable[[int, int], int], other: Rows) -> Rows:
        names = [field.name for field in dataclasses.fields(self)]
        return Rows(**{name: of(getattr(self, name), getattr(other, name)) for name in names})

    @classmethod
    def of_pack(cls, pack: Pack) -> Rows:
        """Count those of a pack of spans, on the host."""
        batch: PackedRows = pack.batch  # type: ignore[assignment]
        edges = torch.tensor(batch.mask.span_offsets)
        of_spans = torch.searchsorted(batch.patch_rows, edges).diff()
        return cls(
            text=len(batch.text_rows),
            patches=len(batch.patch_rows),
            latents=len(batch.latent_rows),
            predictors=len(pack.predictors),
            tokens=len(pack.token_ids),
            pairs=visible_pairs(batch.mask),
            patch_pairs=int(of_spans.square().sum()),
        )


def visible_pairs(mask: SpanMask) -> int:
    """(query, key) pairs of a mask without selected queries and without a window."""
    return int((mask.q_hi - mask.q_lo).sum(dtype=torch.int64))


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, for buffers that there are no examples of.

    Attributes:
        text: tokens of the prompt, without the two around a picture.
        patches: of a picture before them; 0 for none.
        completions: texts or noisy pictures.
        tokens: of each text, the end token included; 0 where pictures are drawn.
        latents: tokens of each noisy picture.
    """

    text: int
    patches: int
    completions: int
    tokens: int = 0
    latents: int = 0

    def rows(self, *, share_prompts: bool = True) -> Rows:
        """What the group adds to a buffer, with one prompt or one of each completion's own."""
        if not share_prompts:
            return dataclasses.replace(self, completions=1).rows() * self.completions
        picture = [(self.patches + 2, "full")] if self.patches else []
        completion = (self.latents, "full") if self.latents else (self.tokens - 1, "causal")
        prompt = [*picture, (self.text, "causal")]
        mask = SpanMask.from_groups([(prompt, [[completion]] * self.completions)])
        of_text = 0 if self.latents else self.completions * (self.tokens - 1)
        return Rows(
            text=self.text + 2 * len(picture) + of_text,
            patches=self.patches,
            latents=self.completions * self.latents,
            predictors=0 if self.latents else 1 + of_text,
            tokens=0 if self.latents else self.completions * self.tokens,
            pairs=visible_pairs(mask),
            patch_pairs=self.patches**2,
        )
