"""The unified model in a run: its vocabulary is of the data, and so is its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvrpo.data.sources import LabelErrors, Source
from lvrpo.models.flow import noise_floor_note
from lvrpo.models.transformer import Parameters, Transformer
from lvrpo.models.unified.folder import save_unified
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy, check_shown
from lvrpo.models.unified.shape import transformer
from lvrpo.models.unified.tokenizer import Tokenizer
from lvrpo.runs.family import FamilyData
from lvrpo.trainer.config import ConfigError, TrainConfig
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import every_window

_VOCABULARY = ("words", "picture_shape", "answer_range")


@dataclass(frozen=True)
class UnifiedParts:
    """A `lvrpo.runs.family.FamilyParts`.

    Attributes:
        words: of one token each; their order fixes their ids.
        picture_shape: [C, H, W].
        answer_range: [low, high) of the tokens that answers are sampled from.
        autoencoder: between pictures and latents.
    """

    words: tuple[str, ...]
    picture_shape: tuple[int, int, int]
    answer_range: tuple[int, int]
    autoencoder: LinearAutoencoder

    def tensors(self) -> dict[str, Tensor]:
        """Those of the autoencoder."""
        return dict(self.autoencoder.state_dict())

    def state(self) -> dict[str, Any]:
        """The vocabulary."""
        return {key: getattr(self, key) for key in _VOCABULARY}


class UnifiedFamily:
    """A `lvrpo.runs.family.Family`.

    Args:
        config: of a run.
    """

    own_size = False
    uncounted = ()

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def described(self) -> str:
        """See `Family`."""
        model = self.config.model
        return (
            f"model.hidden = {model.hidden}, model.mlp = {model.mlp} and model.layers = "
            f"{model.layers}"
        )

    def check(self, data: FamilyData) -> None:
        """Patches tile the pictures, of which a prompt has one, and there is one to fit latents."""
        rows = data.training_rows
        if rows and not any("target" in row or "image" in row for row in rows):
            raise ConfigError(
                f"data.source is {self.config.data.source!r}, which has no picture to fit the "
                "latents on: expected a 'target' with some drawing prompts, or some questions with "
                "an 'image'"
            )
        for row in data.all_rows:
            images = ("image" in row) + len(row.get("further_images", ()))
            videos = len(row.get("videos", ()))
            try:
                check_shown(row["task"], row["uid"], row["prompt"], images=images, videos=videos)
            except ValueError as error:
                raise ConfigError(f"data: {error}") from error
        for key in ("rollout", "eval"):
            scale = getattr(self.config, key).guidance_image
            if scale != 1:
                raise ConfigError(
                    f"{key}.guidance_image is {scale}, expected 1: it is of pictures to be edited, "
                    "and the unified model edits none"
                )
        section = self.config.model
        channels, height, width = data.source.picture_shape
        for key in ("image_patch", "latent_patch"):
            patch = getattr(section, key)
            if height % patch or width % patch:
                raise ConfigError(
                    f"model.{key} is {patch}, which does not tile pictures of {height} x {width} "
                    "pixels"
                )
        numbers = channels * section.latent_patch**2
        tokens, dim = section.latent_tokens_per_patch, section.latent_dim
        if tokens * dim > numbers:
            raise ConfigError(
                f"model.latent_dim is {dim}, in each of model.latent_tokens_per_patch = {tokens}, "
                f"expected at most {numbers} numbers in all, those of a patch of {channels} x "
                f"{section.latent_patch} x {section.latent_patch}"
            )

    def unfitted(self, data: FamilyData) -> UnifiedParts:
        """See `Family`."""
        return self._parts(data, self._new_autoencoder(data.source.picture_shape))

    def fit(self, data: FamilyData) -> UnifiedParts:
        """See `Family`."""
        try:
            autoencoder = LinearAutoencoder.fit(pictures_to_fit(data.source), **self._latents)
        except ValueError as error:
            raise ConfigError(f"model.latent_dim: {error}; give fewer, or more pictures") from error
        return self._parts(data, autoencoder)

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> UnifiedParts:
        """See `Family`."""
        vocabulary: dict[str, Any] = {key: tuple(state[key]) for key in _VOCABULARY}
        autoencoder = self._new_autoencoder(vocabulary["picture_shape"])
        autoencoder.load_state_dict(dict(tensors))
        return UnifiedParts(**vocabulary, autoencoder=autoencoder)

    def new_policy(self, parts: UnifiedParts) -> UnifiedPolicy:
        """Initialised from the run's seed; torch's own random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            module = UnifiedModel(self._model_config(parts))
        module.gradient_checkpointing = self.config.model.gradient_checkpointing
        return UnifiedPolicy(
            module=module,
            tokenizer=Tokenizer(parts.words),
            autoencoder=parts.autoencoder,
            latent_grid=parts.autoencoder.grid,
            answer_range=parts.answer_range,
            backend=self.config.run.backend or None,
        )

    def drawing_shape(self, parts: UnifiedParts) -> tuple[int, int, int]:
        """As pictures that are read."""
        return parts.picture_shape

    def transformer(self, parts: UnifiedParts) -> Transformer:
        """See `Family`."""
        low, high = parts.answer_range
        return transformer(self._model_config(parts), high - low)

    def parameters(self, policy: UnifiedPolicy) -> Parameters:
        """See `Family`."""
        return Parameters.of(policy.module)

    def answer_length(self, parts: UnifiedParts, answer: str) -> int:
        """See `Family`."""
        return len(Tokenizer(parts.words).encode(answer))

    def export(self, policy: UnifiedPolicy, folder: Path, *, adapter: bool) -> None:
        """A folder that `load_unified` reads."""
        save_unified(policy, folder)

    def notes(self, parts: UnifiedParts) -> list[str]:
        """How far the image clip is from rounding."""
        if not self.config.rollout.generate_prompts:
            return []
        elements = parts.autoencoder.tokens * parts.autoencoder.dim
        schedule = every_window(self.config.rollout)
        image = Objective.from_config(self.config).image
        return [noise_floor_note(schedule, elements, image, self.config.run.precision)]

    def _parts(self, data: FamilyData, autoencoder: LinearAutoencoder) -> UnifiedParts:
        tokenizer = Tokenizer(data.words)
        answers = tokenizer.text_token_range if data.spelled else tokenizer.word_token_range
        return UnifiedParts(tuple(data.words), data.source.picture_shape, answers, autoencoder)

    @property
    def _latents(self) -> dict[str, int]:
        section = self.config.model
        return {
            "patch": section.latent_patch,
            "dim": section.latent_dim,
            "tokens_per_patch": section.latent_tokens_per_patch,
        }

    def _new_autoencoder(self, picture_shape: tuple[int, int, int]) -> LinearAutoencoder:
        return LinearAutoencoder(*picture_shape, **self._latents)

    def _model_config(self, parts: UnifiedParts) -> UnifiedConfig:
        """The model's shape: the configuration's sizes, the data's channels and vocabulary."""
        section = self.config.model
        channels, *sides = parts.picture_shape
        patches = max(sides) // section.image_patch
        return UnifiedConfig(
            vocab_size=len(Tokenizer(parts.words)),
            hidden=section.hidden,
            layers=section.layers,
            heads=section.heads,
            mlp=section.mlp,
            image_channels=channels,
            image_patch=section.image_patch,
            latent_dim=section.latent_dim,
            max_grid=max(UnifiedConfig.max_grid, patches, *parts.autoencoder.grid),
        )


def pictures_to_fit(source: Source) -> Tensor:
    """[N, C, H, W] target pictures; where there is none, the pictures that are asked about.

    Raises:
        ConfigError: there is none either.
    """
    pictures = [
        example.target for (example,) in source.labelled("generate", 1024, LabelErrors(), 0)
    ]
    if not any(picture is not None for picture in pictures):
        pictures = [
            example.image for (example,) in source.labelled("understand", 1024, LabelErrors(), 0)
        ]
    found = [torch.from_numpy(picture) for picture in pictures if picture is not None]
    if not found:
        raise ConfigError(
            "data: the training file has no picture to fit the latents on: expected a 'target' "
            "with some drawing prompts, or some questions with an 'image'"
        )
    return torch.stack(found)
