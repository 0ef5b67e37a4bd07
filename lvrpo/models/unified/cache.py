"""A packed layout evaluated piece by piece: prompts first, then whatever hangs below them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lvrpo.models.unified.model import KVCache, PackedBatch, PackedModel


def take_rows(batch: PackedBatch, rows: Tensor) -> PackedBatch:
    """The rows of a layout as a batch that extends a cache of that layout.

    Args:
        batch: the whole layout.
        rows: [n] int64, ascending.
    """
    new_row = torch.full((batch.rows,), -1)
    new_row[rows] = torch.arange(len(rows))

    def kept(of_kind: Tensor) -> tuple[Tensor, Tensor]:
        moved = new_row[of_kind]
        return moved >= 0, moved[moved >= 0]

    text, text_rows = kept(batch.text_rows)
    patch, patch_rows = kept(batch.patch_rows)
    latent, latent_rows = kept(batch.latent_rows)
    is_noisy = torch.zeros_like(latent).index_fill(0, batch.noisy, True)
    return PackedBatch(
        token_ids=batch.token_ids[text],
        text_rows=text_rows,
        patches=batch.patches[patch],
        patch_rows=patch_rows,
        patch_grid=batch.patch_grid[patch],
        latents=batch.latents[latent],
        latent_rows=latent_rows,
        latent_grid=batch.latent_grid[latent],
        timesteps=batch.timesteps[latent],
        noisy=is_noisy[latent].nonzero().flatten(),
        position_ids=batch.position_ids[rows],
        mask=batch.mask.select_queries(rows),
    )


class CachedPass:
    """One layout, whose keys and values are kept on the model's device.

    Args:
        model: evaluates the rows.
        layout: all rows, on the host.
        prompt_rows: [n] int64, ascending, on the host; computed at once.
        backend: of `packed_attention`.
    """

    def __init__(
        self,
        model: PackedModel,
        layout: PackedBatch,
        prompt_rows: Tensor,
        backend: str | None = None,
    ) -> None:
        self.model, self.layout, self.backend = model, layout, backend
        self.cache = KVCache(model.config, layout.rows, model.head.weight)
        #: [n_text of the prompts, hidden], in the order of the prompts' tokens
        self.prompt_text, _ = self.run(*self.part(prompt_rows))

    def part(self, rows: Tensor) -> tuple[PackedBatch, Tensor]:
        """Some rows of the layout as a batch, and those rows, both on the model's device."""
        device = self.cache.keys.device
        return take_rows(self.layout, rows).to(device), rows.to(device)

    def run(self, batch: PackedBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (text, latent) of `rows`, whose keys and values enter the cache."""
        return self.model(batch, self.cache, rows, backend=self.backend)

    def run_latents(self, batch: PackedBatch, rows: Tensor, x: Tensor, time: float) -> Tensor:
        """Velocity [images, tokens, numbers] of noisy pictures at one time."""
        flat = x.flatten(0, 1)
        at = dataclasses.replace(batch, latents=flat, timesteps=flat.new_full(flat.shape[:1], time))
        _, hidden = self.run(at, rows)
        return self.model.velocity(hidden).view_as(x)
