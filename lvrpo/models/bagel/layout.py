"""From texts, pictures, clean and noisy latents to one `PackedBatch`, as BAGEL lays them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lvrpo.models.unified.layout import ROOT, PackBuilder
from lvrpo.models.unified.model import PackedBatch


@dataclass
class BagelBuilder(PackBuilder):
    """A `PackBuilder` with a marker before and after latents, too, and with clean latents.

    Pixels are given in [0, 1] and laid out in [-1, 1], on which the tower was trained.
    """

    markers: tuple[int, int] = (0, 1)  # ids of the tokens before and after every picture
    _clean: list[Tensor] = field(default_factory=list)
    _is_clean: list[bool] = field(default_factory=list)  # per picture of latents

    def read(self, pixels: np.ndarray, parent: int = ROOT) -> int:
        """A full span with the patches of a picture, [C, H, W] in [0, 1]; H, W full patches."""
        return self.picture(2 * np.asarray(pixels) - 1, *self.markers, parent)

    def clean(self, latents: Tensor, height: int, width: int, parent: int = ROOT) -> int:
        """A full span of clean latents: a picture to be edited, or an earlier drawing.

        Args:
            latents: [height * width, latent_dim], row by row.
            height: in latent tokens.
            width: in latent tokens.
            parent: see the class.
        """
        expected = height * width, self.config.latent_dim
        if tuple(latents.shape) != expected:
            found = tuple(latents.shape)
            raise ValueError(f"clean latents have shape {found}, expected {expected}")
        self._clean.append(latents)
        return self._marked(height, width, parent, clean=True)

    def noise(self, height: int, width: int, parent: int = ROOT) -> int:
        """A full span of height * width noisy latents; a leaf."""
        self._noise.add(len(self.lengths))
        return self._marked(height, width, parent, clean=False)

    def _marked(self, height: int, width: int, parent: int, *, clean: bool) -> int:
        row, count = self.rows, height * width
        self._latents(height, width, row + 1)
        self._is_clean.append(clean)
        self._token_ids.extend(self.markers)
        self._text_rows.extend((row, row + count + 1))
        return self._add(count + 2, parent, "full")

    def append(self, other: PackBuilder) -> int:
        """See `PackBuilder.append`."""
        assert isinstance(other, BagelBuilder)
        self._clean += other._clean
        self._is_clean += other._is_clean
        return super().append(other)

    def build(self, latents: Tensor | None = None, timesteps: Tensor | None = None) -> PackedBatch:
        """Lay out everything that was added.

        Args:
            latents: [n_noisy, latent_dim], all noisy pictures in the order they were added.
            timesteps: [n_noisy] in [0, 1].

        Raises:
            ValueError: nothing was added, or latents or timesteps are not those of the rows.
        """
        if not self._clean:
            return super().build(latents, timesteps)
        counts = [len(grid) for grid in self._latent_grid]
        noisy = sum(n for n, clean in zip(counts, self._is_clean, strict=True) if not clean)
        if latents is None:
            latents = torch.zeros(noisy, self.config.latent_dim)
        if timesteps is None:
            timesteps = latents.new_zeros(noisy)
        if len(latents) != noisy or len(timesteps) != noisy:
            raise ValueError(
                f"{len(latents)} noisy latents with {len(timesteps)} times, expected {noisy}"
            )
        given = _in_turn(counts, self._is_clean, latents, torch.cat(self._clean).to(latents))
        times = _in_turn(
            counts, self._is_clean, timesteps, timesteps.new_zeros(sum(counts) - noisy)
        )
        clean = torch.tensor(self._is_clean).repeat_interleave(torch.tensor(counts))
        batch = super().build(given, times)
        return dataclasses.replace(batch, noisy=(~clean).nonzero().flatten())


def _in_turn(
    counts: Sequence[int], is_clean: Sequence[bool], noisy: Tensor, clean: Tensor
) -> Tensor:
    """Rows of both tensors in the order of the pictures that they are of."""
    taken = {False: 0, True: 0}
    parts = []
    for count, kind in zip(counts, is_clean, strict=True):
        source = clean if kind else noisy
        parts.append(source[taken[kind] : taken[kind] + count])
        taken[kind] += count
    return torch.cat(parts)
