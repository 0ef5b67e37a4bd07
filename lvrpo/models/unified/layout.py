"""From texts, pictures and noisy latents to one `PackedBatch`.

Spans are added in depth-first preorder, each under a parent: a group is a prompt with its G
completions as children, and a completion may be text or a noisy image. Position ids follow BAGEL.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from lvrpo.masks import SpanMask
from lvrpo.masks.positions import bagel_position_ids
from lvrpo.models.unified.model import PackedBatch, PackedSizes

ROOT = -1


@dataclass
class PackBuilder:
    """Collects spans; `build` lays them out.

    Every method that adds a span returns its number, which is what `parent` takes and what `start`
    and `span_rows` answer for.
    """

    config: PackedSizes
    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    _starts: list[int] = field(default_factory=lambda: [0])
    _token_ids: list[int] = field(default_factory=list)
    _text_rows: list[int] = field(default_factory=list)
    _patches: list[np.ndarray] = field(default_factory=list)
    _patch_rows: list[int] = field(default_factory=list)
    _patch_grid: list[np.ndarray] = field(default_factory=list)
    _latent_rows: list[int] = field(default_factory=list)
    _latent_grid: list[np.ndarray] = field(default_factory=list)
    _noise: set[int] = field(default_factory=set)

    @property
    def rows(self) -> int:
        """Rows laid out so far."""
        return self._starts[-1]

    def start(self, span: int) -> int:
        """First row of a span."""
        return self._starts[span]

    def end(self, span: int) -> int:
        """Row after the last of a span."""
        return self._starts[span + 1]

    def text(self, token_ids: Sequence[int], parent: int = ROOT) -> int:
        """A causal span of tokens."""
        count = len(token_ids)
        self._token_ids.extend(token_ids)
        self._text_rows.extend(range(self.rows, self.rows + count))
        return self._add(count, parent, "causal")

    def picture(self, pixels: np.ndarray, opening: int, closing: int, parent: int = ROOT) -> int:
        """A full span: an opening token, the patches of a picture to be read, a closing token.

        Args:
            pixels: [C, H, W] in [0, 1]; H and W are multiples of the model's patch.
            opening: token id of the marker before the patches.
            closing: token id of the marker after them.
            parent: see the class.
        """
        patch, channels = self.config.image_patch, self.config.image_channels
        sides = pixels.shape[1:]
        if len(sides) != 2 or len(pixels) != channels or any(side % patch for side in sides):
            raise ValueError(
                f"a picture is {list(pixels.shape)}, expected {channels} channels and two sides "
                f"that are multiples of {patch}"
            )
        rows, columns = (side // patch for side in sides)
        _check_grid(rows, columns, self.config.vision_grid)
        patches = rearrange(pixels, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)
        count, row = len(patches), self.rows
        self._token_ids.extend((opening, closing))
        self._text_rows.extend((row, row + count + 1))
        self._patches.append(np.asarray(patches, dtype=np.float32))
        self._patch_rows.extend(range(row + 1, row + 1 + count))
        self._patch_grid.append(grid(rows, columns))
        return self._add(count + 2, parent, "full")

    def noise(self, height: int, width: int, parent: int = ROOT) -> int:
        """A full span of height * width noisy latent tokens; a leaf."""
        self._noise.add(len(self.lengths))
        self._latents(height, width, self.rows)
        return self._add(height * width, parent, "full")

    def _latents(self, height: int, width: int, first: int) -> None:
        """Latent tokens at the rows from `first` on."""
        _check_grid(height, width, self.config.latent_grid)
        self._latent_rows.extend(range(first, first + height * width))
        self._latent_grid.append(grid(height, width))

    def append(self, other: PackBuilder) -> int:
        """Everything that another builder holds, as documents of its own.

        Returns:
            The last of its spans, which is what completions of a prompt hang below.
        """
        span, row = len(self.lengths), self.rows
        self.lengths += other.lengths
        self.parents += [parent if parent == ROOT else span + parent for parent in other.parents]
        self.modes += other.modes
        self._starts += [row + start for start in other._starts[1:]]
        self._token_ids += other._token_ids
        self._text_rows += [row + r for r in other._text_rows]
        self._patches += other._patches
        self._patch_rows += [row + r for r in other._patch_rows]
        self._patch_grid += other._patch_grid
        self._latent_rows += [row + r for r in other._latent_rows]
        self._latent_grid += other._latent_grid
        self._noise |= {span + s for s in other._noise}
        return len(self.lengths) - 1

    def build(self, latents: Tensor | None = None, timesteps: Tensor | None = None) -> PackedBatch:
        """Lay out everything that was added.

        Args:
            latents: [n_latent, latent_dim], all noisy images in the order they were added.
            timesteps: [n_latent] in [0, 1].

        Raises:
            ValueError: nothing was added, or latents or timesteps are not those of the rows.
        """
        config = self.config
        if not self.rows:
            raise ValueError("a packed buffer without rows: nothing was added to it")
        patch_width = config.image_channels * config.image_patch**2
        if latents is None:
            latents = torch.zeros(len(self._latent_rows), config.latent_dim)
        if timesteps is None:
            timesteps = latents.new_zeros(len(self._latent_rows))
        count = len(self._latent_rows)
        for name, tensor, shape in (
            ("latents", latents, (count, config.latent_dim)),
            ("timesteps", timesteps, (count,)),
        ):
            if tuple(tensor.shape) != shape:
                found = tuple(tensor.shape)
                raise ValueError(f"{name} of a packed buffer have shape {found}, expected {shape}")
        mask = self.mask()
        return PackedBatch(
            token_ids=as_index(self._token_ids),
            text_rows=as_index(self._text_rows),
            patches=torch.from_numpy(stack(self._patches, patch_width, np.float32)),
            patch_rows=as_index(self._patch_rows),
            patch_grid=torch.from_numpy(stack(self._patch_grid, 2, np.int64)),
            latents=latents,
            latent_rows=as_index(self._latent_rows),
            latent_grid=torch.from_numpy(stack(self._latent_grid, 2, np.int64)),
            timesteps=timesteps,
            noisy=torch.arange(count),
            position_ids=bagel_position_ids(mask),
            mask=mask,
        )

    def mask(self) -> SpanMask:
        """Who sees whom."""
        return SpanMask.from_spans(self.lengths, self.parents, self.modes)

    def _add(self, count: int, parent: int, mode: str) -> int:
        if parent in self._noise:
            raise ValueError(f"span {parent} is a noisy picture, which nothing can follow")
        self.lengths.append(count)
        self.parents.append(parent)
        self.modes.append(mode)
        self._starts.append(self._starts[-1] + count)
        return len(self.lengths) - 1


def _check_grid(height: int, width: int, most: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"a picture of {height} x {width} patches has none")
    if max(height, width) > most:
        raise ValueError(
            f"a picture of {height} x {width} patches, the model has positions for {most} x {most}"
        )


def as_index(values: Sequence[int]) -> Tensor:
    """int64 tensor of row numbers or ids."""
    return torch.tensor(values, dtype=torch.int64)


@functools.cache  # an update has one for every noisy picture
def grid(height: int, width: int) -> np.ndarray:
    """[height * width, 2] int64 (row, column), row-major; read only."""
    found = np.stack(np.divmod(np.arange(height * width, dtype=np.int64), width), axis=1)
    found.flags.writeable = False
    return found


def stack(arrays: list[np.ndarray], width: int, dtype: type) -> np.ndarray:
    """Concatenate [n, width] arrays; an empty list gives [0, width]."""
    return np.concatenate(arrays) if arrays else np.zeros((0, width), dtype)
