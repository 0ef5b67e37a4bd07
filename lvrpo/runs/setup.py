"""The parts of a run, made from its configuration: the one module that knows them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lvrpo.data.example import SKILLS, Example, Picture, Skill
from lvrpo.data.jsonl import JsonlExamples
from lvrpo.data.sources import FileSource, JsonlSource, Source
from lvrpo.data.words import common_words
from lvrpo.digits.checks import DigitRules, gold_check
from lvrpo.digits.encoder import DualEncoder
from lvrpo.digits.rules import parse_rule
from lvrpo.digits.scenes import SceneConfig
from lvrpo.digits.task import SceneData
from lvrpo.models.answering import answer_probability
from lvrpo.models.protocol import Policy
from lvrpo.models.transformer import Transformer
from lvrpo.rewards.checks import ChecksBySkill, RewardCheck, VerdictChecks
from lvrpo.rewards.parts import RewardParts, Rules
from lvrpo.rewards.registry import FoundReward, find_reward, reward_label
from lvrpo.rewards.reward import Reward, RewardError
from lvrpo.runs.changes import fingerprint
from lvrpo.runs.checkpoint import load_checkpoint, load_newest, save_checkpoint
from lvrpo.runs.family import Family, FamilyParts, LaidOutPolicy
from lvrpo.runs.unified_family import UnifiedFamily
from lvrpo.trainer.config import ConfigError, DataSection, TrainConfig
from lvrpo.trainer.correction import distribution_notes
from lvrpo.trainer.curriculum import Curriculum
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
    def all_rows(self) -> Sequence[Mapping[str, Any]]:
        """The lines of all files; likewise."""

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

    def __init__(self, section: DataSection, *, own_size: bool) -> None:
        if not section.eval_source:
            raise ConfigError(
                "data.eval_source is empty, expected the JSONL file that a run on "
                f"{section.source} is evaluated with"
            )
        self._section, self._own_size = section, own_size

    @cached_property
    def source(self) -> JsonlSource:
        """Of the prompts."""
        section = self._section
        shape = (section.channels, section.height, section.width)
        if self._own_size:
            shape = (3, 0, 0)
        paths = (section.source, section.eval_source, section.validation_source)
        return JsonlSource(
            *(JsonlExamples(path, shape, parse_rule=parse_rule) for path in paths if path)
        )

    @property
    def training_rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Data`."""
        return self.source.train.rows

    @property
    def all_rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Data`."""
        source = self.source
        files = (source.train, source.validation, source.test)
        return [row for file in files if file is not None for row in file.rows]

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


def data_of(section: DataSection, *, own_size: bool = False) -> Data:
    """The data that a configuration names.

    Args:
        section: of the configuration.
        own_size: whether pictures of files keep their size, and are RGB.

    Raises:
        ConfigError: an entry is missing, or is refused by what reads it.
    """
    if section.source != "scenes":
        return JsonlData(section, own_size=own_size)
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
        family: those of the model family.
        encoder: of pictures and phrases, where a reward needs it.
        fingerprint: of all this as it was saved; empty for parts that never were.
    """

    family: FamilyParts
    encoder: DualEncoder | None = None
    fingerprint: str = ""


def family_of(config: TrainConfig) -> Family:
    """The model family that a configuration names; its packages are imported here.

    Raises:
        ModuleNotFoundError: one is missing; says what to install.
    """
    if config.model.family == "unified":
        return UnifiedFamily(config)
    if config.model.family == "bagel":
        from lvrpo.runs.bagel_family import BagelFamily

        return BagelFamily(config)
    from lvrpo.runs.huggingface_family import HuggingFaceFamily

    return HuggingFaceFamily(config)


class Setup:
    """Everything that a configuration names, each part made once, when it is first asked for.

    Args:
        config: of a run.

    Raises:
        ConfigError: an entry of `[data]` is missing.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.family = family_of(config)
        self.data = data_of(config.data, own_size=self.family.own_size)

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
        return FrozenParts(self.family.unfitted(self.data), encoder)

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
        family, encoder = self.family.fit(self.data), None
        tensors = {f"family.{name}": t for name, t in family.tensors().items()}
        if "encoder" in self.needs:
            encoder = self.data.fit_encoder(self.config.run.seed)
        if encoder is not None:
            tensors |= {f"encoder.{name}": t for name, t in encoder.state_dict().items()}
        state = {
            "fingerprint": fingerprint(self.config),
            "family": family.state(),
            "picture_shape": family.picture_shape,
            "encoder_words": [] if encoder is None else list(encoder.words),
        }
        path = save_checkpoint(run_dir / "task", 0, tensors, state, keep=1)
        return FrozenParts(family, encoder, load_checkpoint(path).fingerprint)

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
        family = self.family.load(_with_prefix(saved.tensors, "family."), state["family"])
        encoder = None
        if state["encoder_words"]:
            encoder = DualEncoder(state["encoder_words"], *state["picture_shape"])
            encoder.load_state_dict(_with_prefix(saved.tensors, "encoder."))
            encoder.eval().requires_grad_(False)
        return FrozenParts(family, encoder, saved.fingerprint)

    def new_policy(self, parts: FrozenParts) -> LaidOutPolicy:
        """The policy that a run begins with; torch's own random state is left alone."""
        return self.family.new_policy(parts.family)

    def transformer(self, parts: FrozenParts) -> Transformer:
        """What the policy's model is made of, for a plan."""
        return self.family.transformer(parts.family)

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
                JsonlExamples(evaluation_file, parts.family.picture_shape, parse_rule=parse_rule)
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

    @cached_property
    def checks(self) -> VerdictChecks:
        """What is counted and watched.

        Raises:
            ConfigError: `rewards.right` names a reward that is made for a run, or none.
        """
        return VerdictChecks(
            ChecksBySkill(
                {
                    skill: RewardCheck(self._plain_reward(skill, name))
                    for skill, name in self.config.rewards.right.items()
                },
                otherwise=self.data.rules.check,
            ),
            audits={"gold": gold_check},
            cut_is_wrong=self.config.rewards.truncated != "keep",
        )

    def _plain_reward(self, skill: Skill, name: str) -> Reward:
        try:
            found = find_reward(name, self.config.rewards.arguments.get(name))
        except RewardError as error:
            raise ConfigError(f"rewards.right.{skill}: {error}") from error
        if hasattr(found.found, "from_parts"):
            raise ConfigError(
                f"rewards.right.{skill} is {name!r}, which is made of the parts of a run: expected "
                "a reward that needs none"
            )
        return found.make()

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
        return [
            *self.family.notes(parts.family),
            *distribution_notes(self.config),
            *self.data.notes(),
            *self._cut_answers_note(parts),
            *self._no_rule_notes(),
        ]

    def _cut_answers_note(self, parts: FrozenParts) -> list[str]:
        answers = [row["answer"] for row in self.data.training_rows if "answer" in row]
        most = self.config.rollout.max_answer_tokens
        length = partial(self.family.answer_length, parts.family)
        cut = [answer for answer in answers if length(answer) > most]
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


def used_rewards(config: TrainConfig) -> dict[Skill, dict[str, float]]:
    """Names of rewards with their weights, of the skills that have prompts in a step."""
    return {
        skill: getattr(config.rewards, skill)
        for skill in SKILLS
        if getattr(config.rollout, f"{skill}_prompts")
    }


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
