"""What a run does: one frozen data class per section, checked when it is made.

docs/configuration.md explains the keys, and lvrpo/runs/config_file.py reads them from TOML and from
the command line. A bound is where a value stops being meant: beyond it a run would diverge, sample
nothing, or not fit any machine that lvrpo trains on. Sizes that fit the bounds and not the machine
are refused when the run is set up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, core_schema

from lvrpo.data.example import Skill
from lvrpo.models.flow import Dynamics
from lvrpo.params.advantages import ADVANTAGE_PRESETS
from lvrpo.params.flow import KlForm, Renorm, Variant
from lvrpo.params.policy_loss import LOSS_PRESETS, PRESET_DATA
from lvrpo.params.sampler_correction import SAMPLER_CORRECTION_PRESETS
from lvrpo.rewards.score import Truncated

#: The losses that need no more than what a rollout has.
TEXT_PRESETS = tuple(name for name in LOSS_PRESETS if name not in PRESET_DATA)


class ConfigError(ValueError):
    """A configuration that cannot be run; one line that begins with the key."""


@plain_dataclass(frozen=True)
class OneOf:
    """Annotates a string that is one of `names`, which are known when the module is imported."""

    names: Iterable[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """A string that is none of them is refused with the whole list."""
        return core_schema.literal_schema(list(self.names))


TrackerName = Literal["tensorboard", "wandb", "trackio"]
Count = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[int, Field(ge=1, le=10**12)]
Batch = Annotated[int, Field(ge=0, le=65536)]
Size = Annotated[int, Field(ge=1, le=65536)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Rate = Annotated[float, Field(ge=0, le=1e20)]
TopP = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=0.01, le=100)]
Weights = dict[str, Weight]
RewardWeights = dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]]
RewardArguments = dict[str, dict[str, Any]]

#: A number is not a string and true is not 1; an int is welcome where a float is expected.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class RunSection:
    """How long, how often, and from which random stream."""

    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
    steps: Count = 80
    objective: Literal["grpo", "supervised"] = "grpo"  # of the steps after the warm start
    checkpoint_every: Positive = 20
    keep_checkpoints: Positive = 2
    eval_every: Count = 0  # policy steps between held-out evaluations; 0: before and after alone
    gallery_every: Count = 20  # policy steps between samples that are kept to be looked at; 0: none
    tracker: TrackerName = "tensorboard"  # what shows the numbers and these samples
    eval_items: Count = 2048
    frontier_items: Count = 256  # sampled in groups, from sharp to diverse; 0: none
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: torch's own choice
    device: str = ""  # of the policy and its reference: "cpu", "cuda" or "cuda:N"; empty: the CPU
    precision: Literal["fp32", "bf16"] = "fp32"  # of a pass; what is trained stays in fp32
    shard: bool = False  # weights, gradients and optimizer over the processes
    backend: str = ""  # of every op, a name of `lvrpo.backends.ALL`; empty: the first that can run
    shuffle_rewards: bool = False  # the control: rewards are permuted within each group

    @model_validator(mode="after")
    def _has_rewards_to_shuffle(self) -> RunSection:
        if self.shuffle_rewards and self.objective == "supervised":
            raise ValueError(
                "run.shuffle_rewards is true, expected false where run.objective is 'supervised': "
                "supervised steps learn from labels, and there is no reward to shuffle"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class DataSection:
    """Where prompts come from."""

    source: str = "scenes"  # or the path of a JSONL file
    eval_source: str = ""  # JSONL file that a run on a JSONL file is evaluated with
    validation_source: str = ""  # JSONL file for `lvrpo eval --split validation`
    channels: Annotated[int, Field(ge=1, le=3)] = 1  # of a JSONL run's pictures, which are
    height: Pixels = 32  # converted and resized
    width: Pixels = 32
    questions: Weights = field(
        default_factory=lambda: {"name": 0.2, "count": 0.1, "list": 0.35, "sum": 0.35}
    )
    requests: Weights = field(default_factory=lambda: {"place": 1.0})


#: Keys of `ModelSection` that size the unified model.
OF_UNIFIED = (
    *("hidden", "layers", "heads", "mlp", "image_patch"),
    *("latent_patch", "latent_dim", "latent_tokens_per_patch"),
)
#: Keys of it for a model that is read from a folder.
OF_FOLDERS = ("chat", "frozen", "lora_rank", "lora_alpha", "lora_targets")


@dataclass(frozen=True, config=STRICT)
class ModelSection:
    """Which model: the unified one and its size, or a folder of transformers or of BAGEL."""

    family: Literal["unified", "huggingface", "bagel"] = "unified"
    hidden: Size = 96
    layers: Annotated[int, Field(ge=1, le=1024)] = 3
    heads: Size = 4
    mlp: Size = 256
    image_patch: Pixels = 8
    latent_patch: Pixels = 8
    latent_dim: Size = 12
    latent_tokens_per_patch: Size = 1
    gradient_checkpointing: bool = False  # of every family
    # Of a folder alone:
    path: str = ""  # as save_pretrained writes it, or as BAGEL is published
    chat: bool = True  # a prompt is a user's turn in its chat template; False: the text as it is
    frozen: list[str] = field(default_factory=list)  # what names of parameters begin with
    lora_rank: Annotated[int, Field(ge=0, le=65536)] = 0  # 0: all that is not frozen is trained
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 16.0
    lora_targets: list[str] = field(default_factory=list)  # empty: the text model's linear layers

    @model_validator(mode="after")
    def _has_a_folder(self) -> ModelSection:
        if self.family != "unified" and not self.path:
            raise ValueError(
                "model.path is '', expected the folder of a model where model.family is "
                f"{self.family!r}"
            )
        if self.family == "unified" and self.path:
            raise ValueError(
                f"model.path is {self.path!r}, expected model.family = 'huggingface' with it, or "
                "'bagel'"
            )
        foreign = OF_FOLDERS if self.family == "unified" else OF_UNIFIED
        for made in dataclasses.fields(self):
            default = [] if made.default is dataclasses.MISSING else made.default
            given = getattr(self, made.name)
            if made.name in foreign and given != default:
                raise ValueError(
                    f"model.{made.name} is {given!r}, expected no such key where model.family is "
                    f"{self.family!r}, whose models do not go by it"
                )
        if not self.lora_rank and (self.lora_targets or self.lora_alpha != ModelSection.lora_alpha):
            raise ValueError(
                "model.lora_rank is 0, expected at least 1 where model.lora_alpha or "
                "model.lora_targets is given: there is no LoRA"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class WarmStartSection:
    """Supervised training before the first reward.

    The labels are biased on purpose: the model learns to draw and to answer, and honestly imitates
    what its annotators get wrong, which more supervised training cannot remove and a verifier can.
    """

    steps: Count = 700
    lr: Rate = 2e-3
    understand_batch: Batch = 96
    generate_batch: Batch = 32
    label_bias: Share = 0.7  # where the annotator's slip is possible, its probability
    label_noise: Share = 0.0  # of any wrong answer; of each digit of a target


@dataclass(frozen=True, config=STRICT)
class RolloutSection:
    """Sampling of groups."""

    group_size: Annotated[int, Field(ge=2, le=65536)] = 8
    understand_prompts: Batch = 32
    generate_prompts: Batch = 32
    # Most times that other prompts are sampled in place of those whose samples all score the same.
    resample_rounds: Annotated[int, Field(ge=0, le=100)] = 0
    curriculum: str = ""  # function that chooses the prompts of a step, "module:function"
    curriculum_pool: Annotated[int, Field(ge=1, le=1024)] = 4  # times as many to choose from
    temperature: Annotated[float, Field(ge=1e-4, le=1e4)] = 1.0
    top_k: Count = 0  # 0: all tokens
    top_p: TopP = 1.0
    min_p: Share = 0.0
    repetition_penalty: Penalty = 1.0
    max_answer_tokens: Size = 8
    min_answer_tokens: Count = 0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[Count] = field(default_factory=list)
    denoise_steps: Annotated[int, Field(ge=1, le=4096)] = 10
    shift: Annotated[float, Field(ge=1e-3, le=1e3)] = 3.0
    dynamics: Dynamics = "flow_sde"
    noise_level: Annotated[float, Field(ge=0, le=100)] = 0.7
    # A window of them; all of these are trained.
    stochastic_steps: Annotated[int, Field(ge=1, le=4096)] = 3
    window: Literal["first", "sliding", "random"] = "random"  # where it is in a policy step
    window_interval: Positive = 25  # policy steps before a sliding window moves on by one
    guidance: Scale = 1.0  # of drawings, sampled and trained; 1: none
    guidance_image: Scale = 1.0  # of edits, by the velocity without their pictures; 1: none
    guidance_renorm: Renorm = "global"
    guidance_renorm_min: Share = 0.0
    guidance_until: Share = 0.4  # guided from the noise, at time 1, to this time

    @model_validator(mode="after")
    def _samples_something(self) -> RolloutSection:
        if self.stochastic_steps > self.denoise_steps:
            raise ValueError(
                f"rollout.stochastic_steps is {self.stochastic_steps}, expected 1 to "
                f"rollout.denoise_steps = {self.denoise_steps}"
            )
        if self.dynamics == "cps" and self.noise_level > 1:
            raise ValueError(
                f"rollout.noise_level is {self.noise_level}, expected at most 1 where "
                "rollout.dynamics is 'cps'"
            )
        _check_guidance("rollout", self)
        if self.min_answer_tokens > self.max_answer_tokens:
            raise ValueError(
                f"rollout.min_answer_tokens is {self.min_answer_tokens}, expected 0 to "
                f"rollout.max_answer_tokens = {self.max_answer_tokens}"
            )
        if "" in self.stop:
            raise ValueError(f"rollout.stop is {self.stop}, expected strings that are not empty")
        if not self.understand_prompts + self.generate_prompts:
            raise ValueError(
                "rollout.understand_prompts and rollout.generate_prompts are 0, expected at least "
                "one prompt a step"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class EvalSection:
    """Sampling that a run is measured by beside its own and the policy's mode."""

    temperature: Annotated[float, Field(ge=0, le=1e4)] = 0.0  # 0: no further way
    top_k: Count = 0
    top_p: TopP = 1.0
    min_p: Share = 0.0
    repetition_penalty: Penalty = 1.0
    guidance: Scale = 1.0  # of drawings; 1: no further way
    guidance_image: Scale = 1.0  # of edits, by the velocity without their pictures; 1: none
    guidance_renorm: Renorm = "global"
    guidance_renorm_min: Share = 0.0
    guidance_until: Share = 0.4  # guided from the noise, at time 1, to this time

    @model_validator(mode="after")
    def _is_a_way_of_its_own(self) -> EvalSection:
        if 0 < self.temperature < 1e-4:
            raise ValueError(
                f"eval.temperature is {self.temperature}, expected 0 or a number in [0.0001, 10000]"
            )
        _check_guidance("eval", self)
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        for name, value in off.items():
            if not self.temperature and getattr(self, name) != value:
                raise ValueError(
                    f"eval.{name} is {getattr(self, name)}, expected {value} where "
                    "eval.temperature is 0: nothing is sampled with it"
                )
        return self


def _check_guidance(key: str, section: RolloutSection | EvalSection) -> None:
    """See that images guide only what the words do, too: BAGEL guides nothing else."""
    if section.guidance == 1 and section.guidance_image != 1:
        raise ValueError(
            f"{key}.guidance_image is {section.guidance_image}, expected 1 where {key}.guidance is "
            "1: nothing is guided"
        )


@dataclass(frozen=True, config=STRICT)
class RewardSection:
    """Which rewards, and how they become advantages."""

    understand: RewardWeights = field(default_factory=lambda: {"r_ins": 1.0})
    generate: RewardWeights = field(
        default_factory=lambda: {"r_ins": 1.0, "r_sem": 0.25, "r_kn": 0.25}
    )
    arguments: RewardArguments = field(default_factory=dict)  # of classes of rewards, by name
    right: dict[Skill, str] = field(default_factory=dict)  # by which reward; else the data's rules
    advantage: Annotated[str, OneOf(ADVANTAGE_PRESETS)] = "decoupled"  # "paper": Eq 3 of the paper
    strict_weight: Share = 0.5  # of r_ins; the rest is the partial score, and 1 the paper's choice
    semantic_pool: Literal["softmax", "topk", "max"] = (
        "softmax"  # of r_sem over patches; "max" is the paper's choice
    )
    semantic_implied: bool = True  # r_sem asks for empty cells too; False is the paper's choice
    truncated: Truncated = "zero"  # an answer cut at max_answer_tokens
    max_failures: Share = 0.0  # share of a step's samples that a reward may fail at
    timeout: Weight = 0.0  # seconds a reward may take for a step's samples; 0 is no limit


@dataclass(frozen=True, config=STRICT)
class LossSection:
    """The objective; text and image terms have their own weight, clip and KL."""

    preset: Annotated[str, OneOf(TEXT_PRESETS)] = "grpo"
    text_weight: Weight = 1.0
    image_weight: Weight = 1.0
    text_clip_low: Weight = 0.0  # 0: 0.05 of "grpo", which two updates reach; others' own
    text_clip_high: Weight = 0.0
    text_kl: Weight = 0.3
    sampler_correction: Annotated[str, OneOf(("", *SAMPLER_CORRECTION_PRESETS))] = ""
    image_variant: Variant = "ppo"
    image_clip: Share = 0.001  # of the size of its ratios, see docs/configuration.md
    image_kl: Weight = 0.003
    image_kl_form: KlForm = "velocity_mse"
    image_log_ratio_scale: Weight = 0.05  # of the true sum; 0 means the element mean
    advantage_clip: Annotated[float, Field(gt=0, le=1e6)] = 5.0


@dataclass(frozen=True, config=STRICT)
class OptimizerSection:
    """AdamW for the policy phase, and the updates of one of its steps."""

    lr: Rate = 2e-4
    final_lr_fraction: Share = 0.0
    warmup_steps: Count = 5
    grad_clip: Rate = 1.0
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    updates_per_rollout: Annotated[int, Field(ge=1, le=10**6)] = 1  # passes over all of it
    minibatches: Size = 2  # of a pass, each of whole groups and an update of its own
    max_rows: Positive = 16384  # token budget of one packed buffer; more rows take several


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """All sections of a run."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    warm_start: WarmStartSection = field(default_factory=WarmStartSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    eval: EvalSection = field(default_factory=EvalSection)
    rewards: RewardSection = field(default_factory=RewardSection)
    loss: LossSection = field(default_factory=LossSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)

    @model_validator(mode="after")
    def _imitates_something(self) -> TrainConfig:
        warm_start, is_supervised = self.warm_start, self.run.objective == "supervised"
        if (warm_start.steps or is_supervised) and not (
            warm_start.understand_batch + warm_start.generate_batch
        ):
            raise ValueError(
                "warm_start.understand_batch and warm_start.generate_batch are 0, expected at "
                "least one example a step, or warm_start.steps = 0 and run.objective = 'grpo'"
            )
        return self

    @model_validator(mode="after")
    def _has_groups_for_its_minibatches(self) -> TrainConfig:
        for key in ("understand_prompts", "generate_prompts"):
            prompts = getattr(self.rollout, key)
            if 0 < prompts < self.optimizer.minibatches:
                raise ValueError(
                    f"optimizer.minibatches is {self.optimizer.minibatches}, expected at most "
                    f"rollout.{key} = {prompts}: a minibatch has whole groups of every skill"
                )
        return self

    @model_validator(mode="after")
    def _rewards_what_it_samples(self) -> TrainConfig:
        for skill in ("understand", "generate"):
            weights = getattr(self.rewards, skill)
            if getattr(self.rollout, f"{skill}_prompts") and not any(weights.values()):
                raise ValueError(
                    f"rewards.{skill} is {weights}, expected a reward whose weight is not 0, as "
                    f"rollout.{skill}_prompts is not 0"
                )
        return self
