"""The parts of a run, made from its configuration: the one module that knows them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lvrpo.data.example import SKILLS, Example, Picture, Skill
from lvrpo.data.jsonl import JsonlExamples
from lvrpo.data.sources import FileSource, JsonlSource, LabelErrors, Source
from lvrpo.data.words import common_words
from lvrpo.digits.checks import DigitRules, gold_check
from lvrpo.digits.encoder import DualEncoder
from lvrpo.digits.rules import parse_rule
from lvrpo.digits.scenes import SceneConfig
from lvrpo.digits.task import SceneData
from lvrpo.models.answering import answer_probability
from lvrpo.models.flow import noise_floor_note
from lvrpo.models.protocol import Policy
from lvrpo.models.transformer import Parameters, Transformer
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.shape import transformer
from lvrpo.models.unified.tokenizer import Tokenizer
from lvrpo.rewards.checks import VerdictChecks
from lvrpo.rewards.parts import RewardParts, Rules
from lvrpo.rewards.registry import FoundReward, find_reward, reward_label
from lvrpo.rewards.reward import RewardError
from lvrpo.runs.changes import fingerprint
from lvrpo.runs.checkpoint import load_checkpoint, load_newest, save_checkpoint
from lvrpo.trainer.config import ConfigError, DataSection, TrainConfig
from lvrpo.trainer.correction import distribution_notes
from lvrpo.trainer.curriculum import Curriculum
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.schedule import every_window
from lvrpo.trainer.task import Rewards, Task


class Data(Protocol):
    """What `[data]` of a configuration names; files are read when they are first asked for."""

    @property
    def source(self) -> Source:
        """Of the prompts."""

    @property
    def words(self) -> Sequence[str]:
        """Those of one token each, in the order of their ids."""

    @property
    def spelled(self) -> bool:
        """Whether an answer may hold words that are none of these, byte by byte."""

    @property
    def training_rows(self) -> Sequence[Mapping[str, Any]]:
        """The lines of the training file; empty where examples are made and not read."""

    @property
    def rules(self) -> Rules:
        """What is right, and what can be asked about it."""

    def new_encoder(self) -> DualEncoder | None:
        """Of pictures and their words, freshly initialised; None where there is none to fit."""

    def fit_encoder(self, seed: int) -> DualEncoder | None:
        """The same, fitted on the training split."""

    def attacks(
        self, examples: Sequence[Example], seed: int
    ) -> Mapping[str, Mapping[int, Picture]]:
        """Drawings that are wrong in ways of their own, by name, for some of the examples."""

    def facts(self) -> dict[str, Any]:
        """What every result is reported with: how good the judge itself is."""

    def notes(self) -> list[str]:
        """Lines worth reading before the first step."""


class JsonlData:
    """A user's files; their rules are those of digit scenes."""

    spelled = True
    rules = DigitRules()

    def __init__(self, section: DataSection) -> None:
        if not section.eval_source:
            raise ConfigError(
                "data.eval_source is empty, expected the JSONL file that a run on "
                f"{section.source} is evaluated with"
            )
        self._section = section

    @cached_property
    def source(self) -> JsonlSource:
        """Of the prompts."""
        section = self._section
        shape = (section.channels, section.height, section.width)
        paths = (section.source, section.eval_source, section.validation_source)
        return JsonlSource(
            *(JsonlExamples(path, shape, parse_rule=parse_rule) for path in paths if path)
        )

    @property
    def training_rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Data`."""
        return self.source.train.rows

    @cached_property
    def words(self) -> list[str]:
        """See `Data`."""
        return common_words(
            text
            for row in self.training_rows
            for text in (row["prompt"], row.get("answer", ""), *row.get("other_answers", ()))
        )

    def new_encoder(self) -> None:
        """None."""

    def fit_encoder(self, seed: int) -> None:
        """None."""

    def attacks(
        self, examples: Sequence[Example], seed: int
    ) -> Mapping[str, Mapping[int, Picture]]:
        """None: whose digits a user's drawings are made of is not known."""
        return {}

    def facts(self) -> dict[str, Any]:
        """None."""
        return {}

    def notes(self) -> list[str]:
        """See `JsonlSource.notes`."""
        return self.source.notes()


def data_of(section: DataSection) -> Data:
    """The data that a configuration names.

    Raises:
        ConfigError: an entry is missing, or is refused by what reads it.
    """
    if section.source != "scenes":
        return JsonlData(section)
    scenes = SceneConfig()
    for key, skill, weights in (
        ("questions", "understand", section.questions),
        ("requests", "generate", section.requests),
    ):
        kinds: dict[str, Any] = {skill: tuple(weights.items())}
        try:
            scenes = dataclasses.replace(scenes, **kinds)
        except ValueError as error:
            raise ConfigError(f"data.{key}: {error}") from error
    return SceneData(scenes)


@dataclass(frozen=True)
class FrozenParts:
    """What the weights of a run are made for; kept with them, for data files change.

    Attributes:
        words: of one token each; their order fixes their ids.
        picture_shape: [C, H, W].
        answer_range: [low, high) of the tokens that answers are sampled from.
        autoencoder: between pictures and latents.
        encoder: of pictures and phrases, where a reward needs it.
        fingerprint: of all this as it was saved; empty for parts that never were.
    """

    words: tuple[str, ...]
    picture_shape: tuple[int, int, int]
    answer_range: tuple[int, int]
    autoencoder: LinearAutoencoder
    encoder: DualEncoder | None = None
    fingerprint: str = ""


class Setup:
    """Everything that a configuration names, each part made once, when it is first asked for.

    Args:
        config: of a run.

    Raises:
        ConfigError: an entry of `[data]` is missing.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.data = data_of(config.data)

    @cached_property
    def rewards(self) -> Mapping[Skill, Mapping[str, FoundReward]]:
        """Those of each skill that has prompts, by label; a user's file is executed for it.

        Raises:
            RewardError: one cannot be imported.
        """
        used, arguments = used_rewards(self.config), self.config.rewards.arguments
        found = {
            name: find_reward(name, arguments.get(name))
            for name in dict.fromkeys(chain.from_iterable(used.values()))
        }
        return {
            skill: {reward_label(name): found[name] for name in names}
            for skill, names in used.items()
        }

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `RewardParts` that rewards cannot do without."""
        found = [reward for rewards in self.rewards.values() for reward in rewards.values()]
        return frozenset().union(*(reward.needs for reward in found))

    def unfitted_parts(self) -> FrozenParts:
        """Parts of the right shape that have learned nothing."""
        encoder = self.data.new_encoder() if "encoder" in self.needs else None
        return self._parts(self._new_autoencoder(self.data.source.picture_shape), encoder)

    def _parts(self, autoencoder: LinearAutoencoder, encoder: DualEncoder | None) -> FrozenParts:
        data, tokenizer = self.data, Tokenizer(self.data.words)
        answers = tokenizer.text_token_range if data.spelled else tokenizer.word_token_range
        return FrozenParts(
            tuple(data.words), data.source.picture_shape, answers, autoencoder, encoder
        )

    def _new_autoencoder(self, picture_shape: tuple[int, int, int]) -> LinearAutoencoder:
        section = self.config.model
        return LinearAutoencoder(*picture_shape, patch=section.latent_patch, dim=section.latent_dim)

    def frozen_parts(self, run_dir: Path) -> FrozenParts:
        """The parts of a run: read from `run_dir/task`, or made from the data and kept there.

        Raises:
            CheckpointError: `task/` is damaged, or of a run of another configuration.
            ConfigError: the data has no picture, or a reward needs what its run did not keep.
        """
        kept = self.saved_parts(run_dir)
        if kept is not None:
            if kept.encoder is None and "encoder" in self.needs:
                raise ConfigError(
                    f"{run_dir / 'task'} has no encoder of pictures and phrases, which no reward "
                    "of its run needed; leave the new one out, or start a new run"
                )
            return kept
        section, encoder = self.config.model, None
        autoencoder = LinearAutoencoder.fit(
            pictures_to_fit(self.data.source), section.latent_patch, section.latent_dim
        )
        tensors = {f"autoencoder.{name}": t for name, t in autoencoder.state_dict().items()}
        if "encoder" in self.needs:
            encoder = self.data.fit_encoder(self.config.run.seed)
        if encoder is not None:
            tensors |= {f"encoder.{name}": t for name, t in encoder.state_dict().items()}
        parts = self._parts(autoencoder, encoder)
        state = {
            "fingerprint": fingerprint(self.config),
            "vocabulary": {key: getattr(parts, key) for key in _VOCABULARY},
            "encoder_words": [] if encoder is None else list(encoder.words),
        }
        path = save_checkpoint(run_dir / "task", 0, tensors, state, keep=1)
        return dataclasses.replace(parts, fingerprint=load_checkpoint(path).fingerprint)

    def saved_parts(self, run_dir: Path) -> FrozenParts | None:
        """What `frozen_parts` kept, whatever became of the data; None before it was called.

        Raises:
            CheckpointError: `task/` is damaged, or of a run of another configuration.
        """
        saved = load_newest(run_dir / "task")
        if saved is None:
            return None
        saved.require({"fingerprint": fingerprint(self.config)})
        state: Mapping[str, Any] = saved.state
        vocabulary: dict[str, Any] = {key: tuple(state["vocabulary"][key]) for key in _VOCABULARY}
        shape = vocabulary["picture_shape"]
        autoencoder = self._new_autoencoder(shape)
        autoencoder.load_state_dict(_with_prefix(saved.tensors, "autoencoder."))
        encoder = None
        if state["encoder_words"]:
            encoder = DualEncoder(state["encoder_words"], *shape)
            encoder.load_state_dict(_with_prefix(saved.tensors, "encoder."))
            encoder.eval().requires_grad_(False)
        return FrozenParts(
            **vocabulary, autoencoder=autoencoder, encoder=encoder, fingerprint=saved.fingerprint
        )

    def new_policy(self, parts: FrozenParts) -> UnifiedPolicy:
        """A policy initialised from the run's seed; torch's own random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            module = UnifiedModel(self._model_config(parts))
        _, height, width = parts.picture_shape
        patch = self.config.model.latent_patch
        return UnifiedPolicy(
            module=module,
            tokenizer=Tokenizer(parts.words),
            autoencoder=parts.autoencoder,
            latent_grid=(height // patch, width // patch),
            answer_range=parts.answer_range,
            backend=self.config.run.backend or None,
        )

    def transformer(self, parts: FrozenParts) -> Transformer:
        """What the policy's model is made of, for a plan."""
        low, high = parts.answer_range
        return transformer(self._model_config(parts), high - low)

    def _model_config(self, parts: FrozenParts) -> UnifiedConfig:
        """The model's shape: the configuration's sizes, the data's channels and vocabulary."""
        section = self.config.model
        channels, *sides = parts.picture_shape
        patch = min(section.image_patch, section.latent_patch)
        return UnifiedConfig(
            vocab_size=len(Tokenizer(parts.words)),
            hidden=section.hidden,
            layers=section.layers,
            heads=section.heads,
            mlp=section.mlp,
            image_channels=channels,
            image_patch=section.image_patch,
            latent_dim=section.latent_dim,
            max_grid=max(UnifiedConfig.max_grid, max(sides) // patch),
        )

    def task(self, parts: FrozenParts, evaluation_file: Path | None = None) -> Task:
        """What the run learns.

        Args:
            parts: of the run.
            evaluation_file: JSONL, to measure with instead of the data; that is not read then.

        Raises:
            DataError: the file is wrong.
        """
        source: Source
        if evaluation_file is None:
            source = self.data.source
        else:
            source = FileSource(
                JsonlExamples(evaluation_file, parts.picture_shape, parse_rule=parse_rule)
            )
        return Task(
            source=source,
            checks=self.checks,
            new_policy=partial(self.new_policy, parts),
            make_rewards=partial(self.make_rewards, parts),
            fingerprint=parts.fingerprint,
            curriculum=self.curriculum,
        )

    @cached_property
    def curriculum(self) -> Curriculum | None:
        """The hook for the prompts of a step, whose file is executed for it.

        Raises:
            ConfigError: it cannot be imported.
        """
        rollout = self.config.rollout
        if not rollout.curriculum:
            return None
        if ":" not in rollout.curriculum:
            raise ConfigError(
                f"rollout.curriculum is {rollout.curriculum!r}, expected 'module:function' or "
                "'file.py:function'"
            )
        try:
            return Curriculum(find_reward(rollout.curriculum).found, rollout.curriculum_pool)
        except RewardError as error:
            said = str(error).removeprefix("reward ")
            raise ConfigError(f"rollout.curriculum: {said}") from error

    @property
    def checks(self) -> VerdictChecks:
        """What is counted and watched."""
        return VerdictChecks(
            self.data.rules.check,
            audits={"gold": gold_check},
            cut_is_wrong=self.config.rewards.truncated != "keep",
        )

    def make_rewards(self, parts: FrozenParts, reference: Policy) -> Rewards:
        """The rewards, made for a run.

        Args:
            parts: of the run.
            reference: the frozen policy that answers.

        Raises:
            RewardError: one cannot be imported, or made from these parts.
        """
        given = RewardParts(
            options=dataclasses.asdict(self.config.rewards),
            rules=self.data.rules,
            answer_probability=partial(answer_probability, reference),
            encoder=parts.encoder,
        )
        return {
            skill: {label: reward.make(given) for label, reward in rewards.items()}
            for skill, rewards in self.rewards.items()
        }

    def notes(self, parts: FrozenParts) -> list[str]:
        """Lines worth reading before the first step."""
        elements = parts.autoencoder.tokens * parts.autoencoder.dim
        draws = self.config.rollout.generate_prompts
        schedule = every_window(self.config.rollout)
        objective = Objective.from_config(self.config)
        floor = [noise_floor_note(schedule, elements, objective.image)] if draws else []
        return [
            *floor,
            *distribution_notes(self.config),
            *self.data.notes(),
            *self._cut_answers_note(parts),
            *self._no_rule_notes(),
        ]

    def _cut_answers_note(self, parts: FrozenParts) -> list[str]:
        answers = [row["answer"] for row in self.data.training_rows if "answer" in row]
        most, tokenizer = self.config.rollout.max_answer_tokens, Tokenizer(parts.words)
        cut = [answer for answer in answers if len(tokenizer.encode(answer)) > most]
        if not cut:
            return []
        return [
            f"WARNING: {len(cut)} of {len(answers)} training answers, {cut[0]!r} for one, are "
            f"longer than rollout.max_answer_tokens = {most} and can never be given"
        ]

    def _no_rule_notes(self) -> list[str]:
        drawings = [row for row in self.data.training_rows if row["task"] == "generate"]
        without = [row for row in drawings if "rule" not in row]
        if not without:
            return []
        return [
            f"WARNING: {label} has no score for {len(without)} of {len(drawings)} drawing prompts, "
            f"which have no 'rule', {without[0]['prompt']!r} for one"
            for label, reward in self.rewards.get("generate", {}).items()
            if "rules" in reward.needs
        ]


def preset_model(name: str) -> tuple[Transformer, Parameters]:
    """A model of published sizes as a plan takes it; see `UnifiedConfig.preset`."""
    config = UnifiedConfig.preset(name)
    with torch.device("meta"):
        module = UnifiedModel(config)
    return transformer(config), Parameters.of(module)


_VOCABULARY = ("words", "picture_shape", "answer_range")


def used_rewards(config: TrainConfig) -> dict[Skill, dict[str, float]]:
    """Names of rewards with their weights, of the skills that have prompts in a step."""
    return {
        skill: getattr(config.rewards, skill)
        for skill in SKILLS
        if getattr(config.rollout, f"{skill}_prompts")
    }


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


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
