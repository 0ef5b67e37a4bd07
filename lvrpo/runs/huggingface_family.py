"""A folder of transformers in a run: nothing is fitted, all is as the folder has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lvrpo.data.sources import Split
from lvrpo.models.huggingface.loading import (
    Lora,
    check_weights,
    load_folder,
    load_processor,
    make_policy,
)
from lvrpo.models.huggingface.policy import HuggingFacePolicy
from lvrpo.models.huggingface.shape import transformer
from lvrpo.models.transformer import Parameters, Transformer
from lvrpo.runs.family import FamilyData
from lvrpo.runs.folder import (
    FolderFamily,
    FolderParts,
    require_folder,
    share_frozen,
)
from lvrpo.trainer.config import ConfigError

#: Questions of a split that are read before a run.
CHECKED_PROMPTS = 32


class HuggingFaceFamily(FolderFamily):
    """A `lvrpo.runs.family.Family`.

    Args:
        config: of a run.
    """

    def check(self, data: FamilyData) -> None:
        """A policy of transformers answers, and can read the first questions whole."""
        config = self.config
        drawn = {"rollout.generate_prompts": config.rollout.generate_prompts}
        if config.warm_start.steps or config.run.objective == "supervised":
            drawn["warm_start.generate_batch"] = config.warm_start.generate_batch
        for key, count in drawn.items():
            if count:
                raise ConfigError(
                    f"{key} is {count}, expected 0: a model of model.family = 'huggingface' "
                    "answers and does not draw"
                )
        for key in ("rollout", "eval"):
            guidance = getattr(config, key).guidance
            if guidance != 1:
                raise ConfigError(
                    f"{key}.guidance is {guidance}, expected 1: it is of drawings, and a model of "
                    "model.family = 'huggingface' answers and does not draw"
                )
        require_folder(self.path)
        check_weights(self.path)
        with torch.device("meta"):
            policy = self.new_policy(self.unfitted(data))
        splits: tuple[Split, ...] = ("train", "test")
        for split in splits:
            questions = data.source.examples(split, "understand", CHECKED_PROMPTS, 0)
            policy.check_prompts(questions, config.rollout.max_answer_tokens)

    def new_policy(self, parts: FolderParts) -> HuggingFacePolicy:
        """The weights of the folder; a LoRA begins from the run's seed."""
        section = self.config.model
        on_meta = torch.get_default_device().type == "meta"
        model = load_folder(self.path, torch.float32, with_weights=not on_meta)
        lora = None
        if section.lora_rank:
            lora = Lora(section.lora_rank, section.lora_alpha, tuple(section.lora_targets))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            policy = make_policy(
                model,
                self._processor,
                chat=section.chat,
                frozen=section.frozen,
                lora=lora,
                gradient_checkpointing=section.gradient_checkpointing,
                backend=self.config.run.backend or None,
            )
        if not on_meta:
            share_frozen(policy.model, self._frozen)
        return policy

    @cached_property
    def _processor(self) -> Any:
        return load_processor(self.path)

    def drawing_shape(self, parts: FolderParts) -> tuple[int, int, int]:
        """Of no drawings."""
        return parts.picture_shape

    def transformer(self, parts: FolderParts) -> Transformer:
        """The text model; of the folder, its configuration alone is read."""
        try:
            with torch.device("meta"):
                return transformer(load_folder(self.path, torch.float32, with_weights=False))
        except ValueError as error:
            raise ConfigError(f"model.path: {error}") from error

    def parameters(self, policy: HuggingFacePolicy) -> Parameters:
        """Of the whole model; the policy's module has what is trained."""
        return Parameters.of(policy.model)

    @property
    def uncounted(self) -> Sequence[str]:
        """The vision tower."""
        if getattr(self._processor, "tokenizer", None) is None:  # it reads text alone
            return []
        return [
            "the passes of the vision tower are not counted: its parameters are, and the rows of "
            "pictures in the text model"
        ]

    def answer_length(self, parts: FolderParts, answer: str) -> int:
        """See `Family`."""
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        return len(tokenizer(answer, add_special_tokens=False)["input_ids"])

    def export(self, policy: HuggingFacePolicy, folder: Path, *, adapter: bool) -> None:
        """The folder as `save_pretrained` writes it, in fp32; a LoRA is merged, or alone."""
        model = policy.model
        if not adapter:
            policy.reader.processor.save_pretrained(folder)
            if self.config.model.lora_rank:
                model = model.merge_and_unload()
        model.save_pretrained(folder)

    def notes(self, parts: FolderParts) -> list[str]:
        """None."""
        return []
