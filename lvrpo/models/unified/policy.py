"""What a policy is made of, and how a prompt enters the packed buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.layout import ROOT, PackBuilder
from lvrpo.models.unified.model import KVCache, PackedBatch, UnifiedModel
from lvrpo.models.unified.tokenizer import BOS, DRAW, EOS, IMAGE, IMAGE_END, Tokenizer


@dataclass(frozen=True)
class Policy:
    """The trained model with the frozen parts that turn words and pixels into its inputs."""

    model: UnifiedModel
    tokenizer: Tokenizer
    autoencoder: LinearAutoencoder
    latent_grid: tuple[int, int]  # rows and columns of latent tokens of a picture
    answer_range: tuple[int, int]  # [low, high) of the tokens an answer may hold
    backend: str | None = None

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, numbers per token) of one picture."""
        return self.latent_grid[0] * self.latent_grid[1], self.model.config.latent_dim

    def builder(self) -> PackBuilder:
        """An empty packed buffer for this model."""
        return PackBuilder(self.model.config)

    def add_prompt(self, builder: PackBuilder, example: Example) -> int:
        """Lay out the picture (if any) and the words of a prompt; returns its last span."""
        span = ROOT
        if example.image is not None:
            span = builder.picture(example.image, IMAGE, IMAGE_END, span)
        words = [BOS, *self.tokenizer.encode(example.prompt)]
        if example.task == "generate":
            words.append(DRAW)
        return builder.text(words, span)

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of a complete answer, closed by the end token."""
        return [*self.tokenizer.encode(text), EOS]

    def decode_answer(self, token_ids: Sequence[int]) -> str:
        """Words of a sampled answer, without its end token."""
        kept = list(token_ids)
        return self.tokenizer.decode(kept[: kept.index(EOS)] if EOS in kept else kept)


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
        position_ids=batch.position_ids[rows],
        mask=batch.mask.select_queries(rows),
    )


class CachedPass:
    """A packed layout evaluated piece by piece: prompts first, then whatever hangs below them."""

    def __init__(self, policy: Policy, layout: PackedBatch, prompt_rows: Tensor) -> None:
        self.policy, self.layout = policy, layout
        like = policy.model.head.weight
        self.cache = KVCache(policy.model.config, layout.rows, like)
        #: [n_text of the prompts, hidden], in the order of the prompts' tokens
        self.prompt_text, _ = self.run(take_rows(layout, prompt_rows), prompt_rows)

    def run(self, batch: PackedBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (text, latent) of `rows`, whose keys and values enter the cache."""
        return self.policy.model(batch, self.cache, rows, backend=self.policy.backend)  # type: ignore[no-any-return]

    def run_latents(self, batch: PackedBatch, rows: Tensor, x: Tensor, time: float) -> Tensor:
        """Velocity [images, tokens, numbers] of noisy pictures at one time."""
        flat = x.flatten(0, 1)
        at = dataclasses.replace(batch, latents=flat, timesteps=flat.new_full(flat.shape[:1], time))
        _, hidden = self.run(at, rows)
        return self.policy.model.velocity(hidden).view_as(x)
