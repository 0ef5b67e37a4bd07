"""BAGEL as a policy that answers and draws: its chat, its pictures, its autoencoder.

A text is `<|im_start|> ... <|im_end|>`. A question is its pictures, each in its own size, and its
words, a text wherever pictures divide them, after which the answer's own `<|im_start|>` stands:
what is sampled begins behind it and ends with `<|im_end|>`. A request to draw is the words, then
the noisy latents between their markers; a picture to be edited is before the words or among them,
first its clean latents, then its patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from lvrpo.data.example import Example, Picture, Skill, Video
from lvrpo.data.marks import parts_of, words_of_parts
from lvrpo.models.bagel.autoencoder import FluxAutoencoder
from lvrpo.models.bagel.checkpoint import BagelCheckpoint, load_bagel
from lvrpo.models.bagel.layout import BagelBuilder
from lvrpo.models.bagel.model import Bagel
from lvrpo.models.bagel.pictures import PictureSides, resize
from lvrpo.models.bagel.tokenizer import ChatTokenizer, QwenTokenizer
from lvrpo.models.unified.layout import ROOT, PackBuilder
from lvrpo.models.unified.policy import PackedPolicy


@dataclass(frozen=True)
class BagelPolicy(PackedPolicy):
    """A `lvrpo.models.protocol.Policy`; the autoencoder is frozen, and on the module's device.

    Answers may hold all tokens up to `<|im_end|>`, so that none has a marker of a picture in it.
    """

    module: Bagel
    tokenizer: ChatTokenizer
    autoencoder: FluxAutoencoder
    latent_grid: tuple[int, int]
    answer_range: tuple[int, int]
    sides: PictureSides  # of pictures to be read
    backend: str | None = None

    keeps_noise = False  # of 1024 pixels, a megabyte of every step

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: BagelCheckpoint,
        drawing: tuple[int, int],
        *,
        tokenizer: ChatTokenizer | None = None,
        sides: PictureSides | None = None,
        backend: str | None = None,
    ) -> BagelPolicy:
        """The policy of a published folder.

        Args:
            checkpoint: of the folder.
            drawing: (height, width) in pixels of what it draws, multiples of 16.
            tokenizer: None reads that of the folder, for which transformers is needed.
            sides: of pictures to be read; None for BAGEL's own.
            backend: of every op; None for the first that can run.

        Raises:
            ValueError: the drawing is no multiple of a latent token, or larger than the model's
                grid; the tokenizer is not the model's.
        """
        config, token = checkpoint.model.config, checkpoint.autoencoder.config.token
        grid = drawing[0] // token, drawing[1] // token
        if any(side < token or side % token for side in drawing):
            raise ValueError(f"a drawing is {drawing} pixels, expected multiples of {token}")
        if max(grid) > config.latent_grid:
            raise ValueError(
                f"a drawing is {drawing} pixels, expected at most {token * config.latent_grid} "
                "along a side: the model has no positions for more"
            )
        if tokenizer is None:
            tokenizer = QwenTokenizer(checkpoint.other_files, config.vocab_size)
        return cls(
            module=checkpoint.model,
            tokenizer=tokenizer,
            autoencoder=checkpoint.autoencoder,
            latent_grid=grid,
            answer_range=(0, tokenizer.end + 1),
            sides=PictureSides.of(config) if sides is None else sides,
            backend=backend,
        )

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        drawing: tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> BagelPolicy:
        """See `load_bagel` and `from_checkpoint`."""
        return cls.from_checkpoint(load_bagel(path, dtype=dtype), drawing, backend=backend)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `PackedPolicy`."""
        layers = self.module.language_model["model"].layers
        assert isinstance(layers, nn.ModuleList)
        return [*layers]

    def to(self, device: torch.device) -> BagelPolicy:
        """See `lvrpo.models.protocol.Policy`."""
        autoencoder = self.autoencoder.to(device)
        return dataclasses.replace(self, module=self.module.to(device), autoencoder=autoencoder)

    def builder(self) -> BagelBuilder:
        """An empty packed buffer for this model."""
        return BagelBuilder(self.module.config, markers=self.tokenizer.markers)

    def add_prompt(self, builder: PackBuilder, example: Example) -> int:
        """See `PackedPolicy`.

        Raises:
            ValueError: it has a video, or no picture for a mark.
        """
        assert isinstance(builder, BagelBuilder)
        span = ROOT
        for part in parts_of(example):
            if isinstance(part, str):
                span = builder.text(self._text_ids(part), span)
            elif isinstance(part, Video):
                raise ValueError(
                    f"{example.uid}: the prompt has a video, which BAGEL does not read, expected "
                    "its frames as 'images'"
                )
            else:
                span = self._add_picture(builder, part, span, example.task)
        if example.task == "understand":
            span = builder.text([self.tokenizer.start], span)
        return span

    def _add_picture(self, builder: BagelBuilder, picture: Picture, span: int, task: Skill) -> int:
        """Lay out a picture to be read, or to be edited and read."""
        if task == "generate":
            token = self.autoencoder.config.token
            picture = resize(picture, PictureSides.of_latents(self.module.config, token))
            with torch.no_grad():
                latents = self.autoencoder.encode(torch.from_numpy(picture)[None].to(self.device))
            height, width = (side // token for side in picture.shape[1:])
            span = builder.clean(latents[0].cpu(), height, width, span)
        return builder.read(resize(picture, self.sides), span)

    def add_without_words(self, builder: PackBuilder, example: Example) -> int:
        """See `PackedPolicy`; BAGEL's drawing without a text has no context but pictures."""
        assert isinstance(builder, BagelBuilder)
        span = ROOT
        for picture in example.images:
            span = self._add_picture(builder, picture, span, "generate")
        return span

    def add_without_pictures(self, builder: PackBuilder, example: Example) -> int:
        """See `PackedPolicy`; words that a picture has parted stay texts of their own."""
        span = ROOT
        for words in words_of_parts(example):
            span = builder.text(self._text_ids(words), span)
        return span

    def prompt_ids(self, example: Example) -> list[int]:
        """See `PackedPolicy`."""
        texts = (self._text_ids(words) for words in words_of_parts(example))
        ids = list(chain.from_iterable(texts))
        return ids if example.task == "generate" else [*ids, self.tokenizer.start]

    def _text_ids(self, words: str) -> list[int]:
        tokens = self.tokenizer
        return [tokens.start, *tokens.encode(words), tokens.end]

    @property
    def end_id(self) -> int:
        """See `PackedPolicy`."""
        return self.tokenizer.end

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of a complete answer, closed by the end token."""
        return [*self.tokenizer.encode(text), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """See `PackedPolicy`."""
        return self.tokenizer.decode(ids)

    def encode(self, images: Tensor) -> Tensor:
        """See `PackedPolicy`."""
        token = self.autoencoder.config.token
        expected = tuple(side * token for side in self.latent_grid)
        if tuple(images.shape[2:]) != expected:
            raise ValueError(
                f"pictures to learn from have shape {tuple(images.shape)}, expected {expected} "
                "pixels, as drawings have"
            )
        with torch.no_grad():
            return self.autoencoder.encode(images.to(self.device))

    def draw(self, latents: Tensor) -> Tensor:
        """See `PackedPolicy`."""
        return self.autoencoder.decode(latents, self.latent_grid)
