"""Digit scenes as a task: a source of prompts, with labels that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lvrpo import random
from lvrpo.data.example import Example, Picture, Skill
from lvrpo.data.sources import LabelErrors, Split
from lvrpo.digits.attacks import layout_attacks
from lvrpo.digits.checks import DigitRules
from lvrpo.digits.encoder import DualEncoder, new_dual_encoder, train_dual_encoder
from lvrpo.digits.judge import digit_judge, gold_reader, reader_accuracy
from lvrpo.digits.phrases import scene_words
from lvrpo.digits.pictures import digit_pools
from lvrpo.digits.questions import SLIPPERY
from lvrpo.digits.scenes import (
    SceneConfig,
    labelled_examples,
    scene_examples,
    with_label_noise,
)


class SceneSource:
    """The embedded data set; its test split has other digits and other requests."""

    def __init__(self, config: SceneConfig) -> None:
        self.config = config

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of every picture."""
        return self.config.picture_shape

    def examples(self, split: Split, skill: Skill, count: int, seed: int) -> list[Example]:
        """See `lvrpo.data.sources.Source`."""
        return scene_examples(self.config, split, skill, count, seed)

    def labelled(
        self, skill: Skill, count: int, errors: LabelErrors, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """See `lvrpo.data.sources.Source`."""
        rng = random.stream(seed, "label noise", skill)
        groups = labelled_examples(self.config, skill, count, seed, bias=errors.bias, copies=copies)
        return [
            [with_label_noise(example, errors.noise, rng) for example in group] for group in groups
        ]


class SceneData:
    """All that the embedded digit scenes bring to a run."""

    spelled = False
    training_rows: Sequence[Mapping[str, Any]] = ()
    all_rows: Sequence[Mapping[str, Any]] = ()

    def __init__(self, scenes: SceneConfig) -> None:
        self.scenes = scenes
        self.source = SceneSource(scenes)
        # The answerer of a run has learned these questions alone, and some of them wrong.
        kinds = [kind for kind, _ in scenes.understand if kind not in SLIPPERY]
        self.rules = DigitRules(kinds=kinds)
        self.words = scene_words()

    def new_encoder(self) -> DualEncoder:
        """Freshly initialised."""
        return new_dual_encoder(self.scenes)

    def fit_encoder(self, seed: int) -> DualEncoder:
        """Fitted on the training split."""
        return train_dual_encoder(self.scenes, seed=seed)

    def attacks(
        self, examples: Sequence[Example], seed: int
    ) -> Mapping[str, Mapping[int, Picture]]:
        """See `layout_attacks`."""
        return layout_attacks(examples, random.stream(seed, "attacks"))

    def facts(self) -> dict[str, Any]:
        """How good the judge itself is, which every result is reported with."""
        return {
            "judge_accuracy": reader_accuracy(digit_judge()),
            "judge_total": len(digit_pools()["test"].labels),
            "gold_accuracy": reader_accuracy(gold_reader()),
        }

    def notes(self) -> list[str]:
        """None."""
        return []
