"""A published BAGEL folder in a run: nothing is fitted, all is as the folder has it."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

import torch

from lvrpo.models.bagel import BagelPolicy, load_bagel, save_bagel
from lvrpo.models.bagel.model import Bagel
from lvrpo.models.bagel.shape import PRESETS, transformer
from lvrpo.models.flow import noise_floor_note
from lvrpo.models.huggingface.loading import freeze
from lvrpo.models.transformer import Parameters, Transformer
from lvrpo.runs.family import FamilyData
from lvrpo.runs.folder import (
    FolderFamily,
    FolderParts,
    require_folder,
    share_frozen,
)
from lvrpo.trainer.config import ConfigError
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import every_window


class BagelFamily(FolderFamily):
    """A `lvrpo.runs.family.Family`. Drawings have the height and width of `[data]`.

    Args:
        config: of a run.
    """

    uncounted = ()

    def check(self, data: FamilyData) -> None:
        """The folder is one of BAGEL's, pictures are RGB, and no key asks for what it has not."""
        config = self.config
        section = config.model
        imitates = config.warm_start.steps or config.run.objective == "supervised"
        drawn = config.warm_start.generate_batch if imitates else 0
        for key, given, expected, why in (
            ("model.lora_rank", section.lora_rank, 0, "BAGEL has no adapters here"),
            ("model.chat", section.chat, True, "BAGEL's prompts are a chat"),
            ("warm_start.generate_batch", drawn, 0, "targets keep a size of their own"),
        ):
            if given != expected:
                raise ConfigError(f"{key} is {given}, expected {expected}: {why}")
        require_folder(self.path)
        channels = data.source.picture_shape[0]
        needed = self._shapes.module.config.image_channels
        if channels != needed:
            raise ConfigError(f"data.source has pictures of {channels} channels, expected {needed}")

    def new_policy(self, parts: FolderParts) -> BagelPolicy:
        """The weights of the folder, in fp32."""
        section, data = self.config.model, self.config.data
        on_meta = torch.get_default_device().type == "meta"
        try:
            checkpoint = load_bagel(self.path, dtype=torch.float32, with_weights=not on_meta)
        except FileNotFoundError as error:
            raise ConfigError(f"model.path: {error}") from error
        policy = BagelPolicy.from_checkpoint(
            checkpoint,
            (data.height, data.width),
            backend=self.config.run.backend or None,
        )
        freeze(policy.module, section.frozen)
        policy.module.gradient_checkpointing = section.gradient_checkpointing
        if not on_meta:
            share_frozen(policy.module, self._frozen)
        return policy

    def drawing_shape(self, parts: FolderParts) -> tuple[int, int, int]:
        """In RGB, with the height and width of `[data]`."""
        data = self.config.data
        return self._shapes.autoencoder.config.channels, data.height, data.width

    def transformer(self, parts: FolderParts) -> Transformer:
        """See `Family`."""
        policy = self._shapes
        low, high = policy.answer_range
        return transformer(policy.module.config, high - low)

    def parameters(self, policy: BagelPolicy) -> Parameters:
        """See `Family`."""
        return Parameters.of(policy.module)

    def answer_length(self, parts: FolderParts, answer: str) -> int:
        """See `Family`."""
        return len(self._shapes.tokenizer.encode(answer))

    def export(self, policy: BagelPolicy, folder: Path, *, adapter: bool) -> None:
        """The folder as it is published, in its own dtypes, with the policy's weights."""
        save_bagel(dataclasses.replace(load_bagel(self.path), model=policy.module), folder)

    def notes(self, parts: FolderParts) -> list[str]:
        """How far the image clip is from rounding."""
        if not self.config.rollout.generate_prompts:
            return []
        tokens, numbers = self._shapes.latent_shape
        schedule = every_window(self.config.rollout)
        image = Objective.from_config(self.config).image
        return [noise_floor_note(schedule, tokens * numbers, image, self.config.run.precision)]

    @cached_property
    def _shapes(self) -> BagelPolicy:
        """A policy without weights."""
        with torch.device("meta"):
            return self.new_policy(FolderParts(""))


def preset_model(name: str) -> tuple[Transformer, Parameters]:
    """A BAGEL as a plan takes it, a name of `PRESETS`."""
    config = PRESETS[name]
    with torch.device("meta"):
        module = Bagel(config)
    return transformer(config), Parameters.of(module)
