"""Lay groups out for training: each prompt once, its completions as its children.

Text: the last prompt row predicts the first token of all completions, and row t of a child predicts
its token t + 1. Pictures: every noisy picture (a denoising step of a sample, or a draw of noise in
supervised training) is a leaf under the prompt, so one forward pass evaluates all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.models.packing import PackBuilder
from lvrpo.models.policy import Policy
from lvrpo.models.unified import PackedBatch
from lvrpo.positions import target_index

#: A prompt and the tokens of each of its completions.
TextGroup = tuple[Example, Sequence[Sequence[int]]]
#: A prompt and how many noisy pictures hang below it.
PictureGroup = tuple[Example, int]


@dataclass(frozen=True)
class Pack:
    """One packed buffer: S completions with T tokens, and M noisy pictures.

    The slices say which completions, tokens and pictures, counted over all groups in order.
    """

    batch: PackedBatch
    token_ids: Tensor  # [T] int64 targets
    predictor: Tensor  # [T] int64: which text hidden state predicts each target
    cu_seqlens: Tensor  # [S + 1] int64 into T
    completions: slice
    tokens: slice
    pictures: slice


def pack_groups(
    policy: Policy,
    texts: Sequence[TextGroup],
    pictures: Sequence[PictureGroup] = (),
    latents: Tensor | None = None,
    timesteps: Tensor | None = None,
    max_rows: int = 1 << 30,
) -> Iterator[Pack]:
    """Packs of whole groups; a pack is closed when it has reached `max_rows` rows.

    Args:
        policy: lays out the prompts.
        texts: groups of completions.
        pictures: groups of noisy pictures.
        latents: [M_total, tokens, latent_dim], all noisy pictures in order.
        timesteps: [M_total], their times.
        max_rows: token budget.
    """
    open_pack = _OpenPack(policy, 0, 0, 0)
    for example, completions in texts:
        open_pack.add_text(example, completions)
        if open_pack.builder.rows >= max_rows:
            yield open_pack.close(latents, timesteps)
            open_pack = open_pack.next()
    for example, count in pictures:
        open_pack.add_pictures(example, count)
        if open_pack.builder.rows >= max_rows:
            yield open_pack.close(latents, timesteps)
            open_pack = open_pack.next()
    if open_pack.builder.rows:
        yield open_pack.close(latents, timesteps)


class _OpenPack:
    def __init__(self, policy: Policy, completion: int, token: int, picture: int) -> None:
        self.policy = policy
        self.builder: PackBuilder = policy.builder()
        self.first = completion, token, picture
        self.token_ids: list[int] = []
        self.text_spans: list[int] = []
        self.pictures = 0

    def add_text(self, example: Example, completions: Sequence[Sequence[int]]) -> None:
        builder = self.builder
        prompt = self.policy.add_prompt(builder, example)
        for tokens in completions:
            self.text_spans.append(builder.text(tokens[:-1], prompt))
            self.token_ids.extend(tokens)

    def add_pictures(self, example: Example, count: int) -> None:
        prompt = self.policy.add_prompt(self.builder, example)
        for _ in range(count):
            self.builder.noise(*self.policy.latent_grid, parent=prompt)
        self.pictures += count

    def _end(self) -> tuple[int, int, int]:
        completion, token, picture = self.first
        return (
            completion + len(self.text_spans),
            token + len(self.token_ids),
            picture + self.pictures,
        )

    def next(self) -> _OpenPack:
        return _OpenPack(self.policy, *self._end())

    def close(self, latents: Tensor | None, timesteps: Tensor | None) -> Pack:
        completions, tokens, pictures = map(slice, self.first, self._end())
        if self.pictures:
            assert latents is not None
            assert timesteps is not None
            per_picture = self.policy.latent_shape[0]
            batch = self.builder.build(
                latents[pictures].flatten(0, 1),
                timesteps[pictures].repeat_interleave(per_picture),
            )
        else:
            batch = self.builder.build()
        targets = target_index(batch.mask, self.text_spans, last_has_row=False)
        return Pack(
            batch=batch,
            token_ids=torch.tensor(self.token_ids, dtype=torch.int64),
            predictor=torch.searchsorted(batch.text_rows, targets.row_index),
            cu_seqlens=targets.cu_seqlens,
            completions=completions,
            tokens=tokens,
            pictures=pictures,
        )
