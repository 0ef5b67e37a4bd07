"""What a run learns: its prompts, its rewards, and the frozen parts of its policy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lvrpo import random
from lvrpo.data.example import Example, Skill
from lvrpo.data.jsonl import JsonlExamples
from lvrpo.data.sources import JsonlSource, Source, first_of
from lvrpo.digits.checks import DigitRules, check_samples
from lvrpo.digits.encoder import DualEncoder, train_dual_encoder
from lvrpo.digits.judge import gold_reader
from lvrpo.digits.phrases import scene_words
from lvrpo.digits.rules import parse_rule
from lvrpo.digits.scenes import SceneConfig
from lvrpo.digits.task import SceneSource, judge_facts
from lvrpo.models.answering import answer_probability
from lvrpo.models.protocol import Policy
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.tokenizer import Tokenizer
from lvrpo.rewards.parts import RewardParts, Rules, Verdicts
from lvrpo.rewards.registry import FoundReward
from lvrpo.rewards.reward import Reward, Samples
from lvrpo.runs.changes import fingerprint
from lvrpo.runs.checkpoint import Checkpoint, load_checkpoint, load_newest, save_checkpoint
from lvrpo.runs.rewards import imported, used_rewards
from lvrpo.runs.vocabulary import Vocabulary, common_words, pictures_to_fit
from lvrpo.trainer.config import ConfigError, DataSection, TrainConfig
from lvrpo.trainer.schedule import noise_floor_note


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

    def facts(self) -> dict[str, Any]:
        """What every result is reported with."""

    def notes(self) -> list[str]:
        """Lines worth reading before the first step."""


class SceneData:
    """The embedded digit scenes."""

    spelled = False
    training_rows: Sequence[Mapping[str, Any]] = ()

    def __init__(self, section: DataSection) -> None:
        self.scenes = SceneConfig(
            understand=tuple(section.questions.items()),
            generate=tuple(section.requests.items()),
        )
        self.source = SceneSource(self.scenes)
        # The answerer of a run has learned these questions alone.
        self.rules = DigitRules(kinds=section.questions)
        self.words = scene_words()

    def new_encoder(self) -> DualEncoder:
        """See `Data`."""
        return DualEncoder(self.words, *self.source.picture_shape)

    def fit_encoder(self, seed: int) -> DualEncoder:
        """See `Data`."""
        return train_dual_encoder(self.scenes, seed=seed)

    def facts(self) -> dict[str, Any]:
        """How good the judge itself is."""
        return judge_facts()

    def notes(self) -> list[str]:
        """None."""
        return []


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
        return JsonlSource(
            JsonlExamples(section.source, shape, parse_rule=parse_rule),
            JsonlExamples(section.eval_source, shape, parse_rule=parse_rule),
        )

    @property
    def training_rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Data`."""
        return self.source.train.rows

    @cached_property
    def words(self) -> list[str]:
        """See `Data`."""
        texts = ("prompt", "answer")
        return common_words(
            row[text] for row in self.training_rows for text in texts if text in row
        )

    def new_encoder(self) -> None:
        """None."""

    def fit_encoder(self, seed: int) -> None:
        """None."""

    def facts(self) -> dict[str, Any]:
        """None."""
        return {}

    def notes(self) -> list[str]:
        """See `JsonlSource.notes`."""
        return self.source.notes()


def data_of(section: DataSection) -> Data:
    """The data that a configuration names.

    Raises:
        ConfigError: an entry is missing.
        ValueError: an entry is refused by what reads it.
    """
    return SceneData(section) if section.source == "scenes" else JsonlData(section)


#: Of a drawing prompt in the warm start, each with noise of its own, in label, flow and time; the
#: prompt is computed once for all.
TARGETS_PER_PROMPT = 4


class Task:
    """Everything of a run that is fixed before its first step.

    Vocabulary, autoencoder and r_sem's encoder are made from training data once and kept in the run
    directory, so that nothing depends on what becomes of the data. `data` is
    that of the configuration where it is not given; without a `vocabulary` it is the data's.
    `fingerprint` is of the saved parts, so that checkpoints made with others can be told.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data | None,
        autoencoder: LinearAutoencoder,
        encoder: DualEncoder | None,
        vocabulary: Vocabulary | None = None,
        fingerprint: str = "",
    ) -> None:
        self.config, self.data = config, data or data_of(config.data)
        self.vocabulary = vocabulary or vocabulary_of(self.data)
        self.tokenizer = Tokenizer(self.vocabulary.words)
        self.autoencoder, self.encoder = autoencoder, encoder
        self.fingerprint = fingerprint
        self._evaluation_file: JsonlExamples | None = None
        self._rewards: dict[Skill, list[Reward]] | None = None

    @cached_property
    def found_rewards(self) -> dict[Skill, list[FoundReward]]:
        """Those of the skills that are trained, in the order of the configuration's weights."""
        return {
            skill: [imported(name) for name in weights]
            for skill, weights in used_rewards(self.config).items()
        }

    @property
    def source(self) -> Source:
        """Where the prompts come from; reads the data files if nobody has."""
        return self.data.source

    def model_config(self) -> UnifiedConfig:
        """The model's shape: the configuration's sizes, the data's channels and vocabulary."""
        section = self.config.model
        channels, *sides = self.vocabulary.picture_shape
        patch = min(section.image_patch, section.latent_patch)
        return UnifiedConfig(
            vocab_size=len(self.tokenizer),
            hidden=section.hidden,
            layers=section.layers,
            heads=section.heads,
            mlp=section.mlp,
            image_channels=channels,
            image_patch=section.image_patch,
            latent_dim=section.latent_dim,
            max_grid=max(UnifiedConfig.max_grid, max(sides) // patch),
        )

    def new_model(self) -> UnifiedModel:
        """A model initialised from the run's seed; torch's own random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            return UnifiedModel(self.model_config())

    def policy(self, model: UnifiedModel) -> UnifiedPolicy:
        """A model with the frozen parts around it."""
        _, height, width = self.vocabulary.picture_shape
        patch = self.config.model.latent_patch
        return UnifiedPolicy(
            module=model,
            tokenizer=self.tokenizer,
            autoencoder=self.autoencoder,
            latent_grid=(height // patch, width // patch),
            answer_range=self.vocabulary.answer_range,
            backend=self.config.run.backend or None,
        )

    def training_examples(self, task: Skill, count: int, step: int) -> list[Example]:
        """Prompts of one policy step."""
        return self.source.examples("train", task, count, self._seed("policy", step))

    def warm_start_examples(self, step: int) -> tuple[list[Example], list[list[Example]]]:
        """Questions, and groups of drawings of one prompt, of one supervised step.

        Some of their labels are wrong on purpose, independently within a group.
        """
        section, seed = self.config.warm_start, self._seed("warm start", step)
        questions = self.source.labelled(
            "understand", section.understand_batch, section.label_noise, seed
        )
        drawings = self.source.labelled(
            "generate",
            section.generate_batch,
            section.label_noise,
            seed,
            copies=TARGETS_PER_PROMPT,
        )
        return [group[0] for group in questions], drawings

    def evaluation_examples(self, task: Skill, count: int) -> list[Example]:
        """Held-out prompts: the same for every seed, before and after."""
        if self._evaluation_file is not None:
            return first_of(self._evaluation_file, task, count)
        return self.source.examples("test", task, count, 0)

    def _seed(self, *ids: int | str) -> int:
        return int(random.stream(self.config.run.seed, *ids).integers(1 << 62))

    def rewards(self, reference: Policy) -> Mapping[Skill, list[Reward]]:
        """The rewards of each sampled task, in the order of the configuration's weights."""
        if self._rewards is None:
            parts = RewardParts(
                options=dataclasses.asdict(self.config.rewards),
                rules=self.data.rules,
                answer_probability=partial(answer_probability, reference),
                encoder=self.encoder,
            )
            self._rewards = {
                skill: [reward.make(parts) for reward in found]
                for skill, found in self.found_rewards.items()
            }
        return self._rewards

    def facts(self) -> dict[str, Any]:
        """What every result is reported with: how good the judge itself is."""
        return self.data.facts()

    def notes(self) -> list[str]:
        """Lines worth reading before the first step."""
        elements = self.autoencoder.tokens * self.autoencoder.dim
        draws = self.config.rollout.generate_prompts
        floor = [noise_floor_note(self.config, elements)] if draws else []
        return [*floor, *self.data.notes(), *self._cut_answers_note(), *self._no_rule_notes()]

    def _cut_answers_note(self) -> list[str]:
        answers = [row["answer"] for row in self.data.training_rows if "answer" in row]
        most = self.config.rollout.max_answer_tokens
        cut = [answer for answer in answers if len(self.tokenizer.encode(answer)) > most]
        if not cut:
            return []
        return [
            f"WARNING: {len(cut)} of {len(answers)} training answers, {cut[0]!r} for one, are "
            f"longer than rollout.max_answer_tokens = {most} and can never be given"
        ]

    def _no_rule_notes(self) -> list[str]:
        drawings = [row for row in self.data.training_rows if row["task"] == "generate"]
        without = [row for row in drawings if "rule" not in row]
        found = self.found_rewards.get("generate", ())
        names = [reward.name for reward in found if "rules" in reward.needs]
        if not without:
            return []
        return [
            f"WARNING: {name} has no score for {len(without)} of {len(drawings)} drawing prompts, "
            f"which have no 'rule', {without[0]['prompt']!r} for one"
            for name in names
        ]

    def use_evaluation_file(self, path: Path) -> None:
        """Evaluate on a JSONL file instead of the test split; no other data is read."""
        self._evaluation_file = JsonlExamples(
            path, self.vocabulary.picture_shape, parse_rule=parse_rule
        )

    def is_right(self, samples: Samples) -> Tensor:
        """[B] 1 where everything is right, 0 where not, NaN where no rule tells."""
        return self._checks(samples).strict

    def _checks(self, samples: Samples) -> Verdicts:
        """What the rules say; an answer that was cut is not right, unless it is scored as it is."""
        checks = check_samples(samples)
        if self.config.rewards.truncated != "keep":
            checks.strict[samples.truncated] = 0.0
        return checks

    def measure(self, samples: Samples) -> dict[str, float]:
        """Strict, partial and gold scores of a batch: watched in training, never trained on."""
        task = samples.examples[0].task
        checks = self._checks(samples)
        metrics = {f"strict/{task}": _mean(checks.strict)}
        if task == "generate":
            metrics["partial/generate"] = _mean(checks.partial)
            metrics["gold/generate"] = _mean(check_samples(samples, gold_reader()).strict)
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def count(self, samples: Samples) -> dict[str, Any]:
        """How many samples are right, in all and by kind of prompt, as a row of evals.jsonl.

        Samples that no rule tells about are left out; nothing is said where there are no others.
        """
        task = samples.examples[0].task
        measure = "correct" if task == "understand" else "strict"
        checks = self._checks(samples)
        row: dict[str, Any] = {}
        by_kind: dict[str, list[int]] = {"": list(range(len(samples)))}
        for i, example in enumerate(samples.examples):
            if example.kind:
                by_kind.setdefault(example.kind, []).append(i)
        if len(by_kind) == 2:  # a single kind is the whole
            by_kind = {"": by_kind[""]}
        for kind, members in by_kind.items():
            strict = checks.strict[members]
            total = int((~strict.isnan()).sum())
            prefix = f"{task}/{kind}" if kind else task
            if total:
                row[f"{prefix}/{measure}"] = int(strict.nansum())
                row[f"{prefix}/total"] = total
        if row and task == "generate":
            row["generate/gold"] = int(check_samples(samples, gold_reader()).strict.nansum())
            row["generate/partial"] = float(checks.partial.nanmean())
        return row


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def vocabulary_of(data: Data) -> Vocabulary:
    """The vocabulary of a run that begins."""
    return Vocabulary.of(data.words, data.source.picture_shape, spelled=data.spelled)


def load_or_fit_task(config: TrainConfig, run_dir: Path, data: Data | None = None) -> Task:
    """The task of a run: read from `run_dir/task`, or made from the training data and kept there.

    Args:
        config: of the run.
        run_dir: its directory.
        data: of the configuration, when the caller has it already.

    Raises:
        CheckpointError: `task/` is damaged, or of a run of another configuration.
    """
    saved = load_newest(run_dir / "task")
    if saved is not None:
        return _saved_task(config, saved, data)
    data = data or data_of(config.data)
    section = config.model
    autoencoder = LinearAutoencoder.fit(
        pictures_to_fit(data.source), section.latent_patch, section.latent_dim
    )
    tensors = {f"autoencoder.{name}": t for name, t in autoencoder.state_dict().items()}
    encoder: DualEncoder | None = None
    if _wants_encoder(config):
        encoder = data.fit_encoder(config.run.seed)
    if encoder is not None:
        tensors |= {f"encoder.{name}": t for name, t in encoder.state_dict().items()}
    vocabulary = vocabulary_of(data)
    state = {
        "fingerprint": fingerprint(config),
        "vocabulary": dataclasses.asdict(vocabulary),
        "encoder_words": list(encoder.words) if encoder is not None else [],
    }
    path = save_checkpoint(run_dir / "task", 0, tensors, state, keep=1)
    return Task(config, data, autoencoder, encoder, vocabulary, load_checkpoint(path).fingerprint)


def _saved_task(config: TrainConfig, saved: Checkpoint, data: Data | None) -> Task:
    saved.require({"fingerprint": fingerprint(config)})
    vocabulary = Vocabulary.from_json(saved.state["vocabulary"])
    section = config.model
    autoencoder = LinearAutoencoder(
        *vocabulary.picture_shape, patch=section.latent_patch, dim=section.latent_dim
    )
    autoencoder.load_state_dict(_with_prefix(saved.tensors, "autoencoder."))
    encoder: DualEncoder | None = None
    if saved.state["encoder_words"]:
        encoder = DualEncoder(saved.state["encoder_words"], *vocabulary.picture_shape)
        encoder.load_state_dict(_with_prefix(saved.tensors, "encoder."))
        encoder.eval().requires_grad_(False)
    elif _wants_encoder(config):
        raise ConfigError(
            f"{saved.path} has no encoder of r_sem, which its run did not use; leave r_sem out of "
            "rewards.generate, or start a new run"
        )
    return Task(config, data, autoencoder, encoder, vocabulary, saved.fingerprint)


def _wants_encoder(config: TrainConfig) -> bool:
    return "r_sem" in chain.from_iterable(used_rewards(config).values())


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
