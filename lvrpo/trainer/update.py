"""One policy update: replay the rollout on packed buffers, form both losses, step the optimizer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.models.groups import Pack, pack_groups
from lvrpo.models.policy import Policy
from lvrpo.models.unified import UnifiedModel
from lvrpo.ops._policy_loss import LossMetrics, LossParams, PolicyLoss
from lvrpo.ops.flow_policy_loss import (
    FlowLossMetrics,
    FlowLossParams,
    FlowPolicyLoss,
    flow_policy_loss,
)
from lvrpo.ops.gather_logprobs import gather_logprobs
from lvrpo.ops.grpo_loss import grpo_loss
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.rollout import Answers, Pictures


class ScheduleMismatch(RuntimeError):
    """A trajectory was sampled with another schedule than the update uses."""


@dataclass(frozen=True)
class Experience:
    """One rollout with its advantages: what an update learns from."""

    answers: Answers | None
    answer_advantages: Tensor | None  # [P_text * G]
    pictures: Pictures | None
    picture_advantages: Tensor | None  # [P_image * G]


@dataclass(frozen=True)
class Objective:
    """The two losses and how they are weighed."""

    text: LossParams
    image: FlowLossParams
    text_weight: float
    image_weight: float
    temperature: float
    max_rows: int

    @classmethod
    def from_config(cls, config: TrainConfig) -> Objective:
        """The objective that a configuration describes."""
        loss = config.loss
        changes: dict[str, Any] = {"beta": loss.text_kl}
        if loss.text_clip:
            changes |= {"clip_low": loss.text_clip, "clip_high": loss.text_clip}
        if loss.preset == "dr_grpo":
            changes["max_length"] = config.rollout.max_answer_tokens
        text = LossParams.preset(loss.preset, **changes)
        image = FlowLossParams(
            clip_low=loss.image_clip,
            clip_high=loss.image_clip,
            adv_clip=loss.advantage_clip,
            log_ratio_scale=loss.image_log_ratio_scale or "mean",
            kl=loss.image_kl_form,  # type: ignore[arg-type]
            beta=loss.image_kl,
        )
        return cls(
            text,
            image,
            loss.text_weight,
            loss.image_weight,
            config.rollout.temperature,
            config.optimizer.max_rows,
        )


def policy_gradient(
    policy: Policy,
    reference: Policy,
    experience: Experience,
    schedule: FlowSchedule,
    objective: Objective,
) -> dict[str, float]:
    """Add the gradient of the objective to the model's parameters.

    The gradient is that of the whole rollout, however many packs it takes: every pack's loss is
    divided by the rollout's own counts.

    Returns:
        Metrics of the step, keyed as in the run's records.

    Raises:
        ScheduleMismatch: the pictures were sampled with another schedule.
    """
    pictures = experience.pictures
    if pictures is not None and pictures.fingerprint != schedule.fingerprint():
        raise ScheduleMismatch(
            f"pictures were sampled with schedule {pictures.fingerprint}, the update uses "
            f"{schedule.fingerprint()}"
        )
    texts, groups = [], []
    latents = times = None
    if experience.answers is not None:
        texts = experience.answers.groups()
    if pictures is not None:
        count, steps = pictures.latents.shape[:2]
        groups = [(example, pictures.group_size * steps) for example in pictures.examples]
        latents = pictures.latents.flatten(0, 1)
        times = torch.tensor([float(schedule.times[k]) for k in pictures.steps]).repeat(count)
    step = _Update(policy, reference, experience, schedule, objective, _Metrics())
    for pack in pack_groups(policy, texts, groups, latents, times, objective.max_rows):
        _pack_loss(step, pack).backward()  # type: ignore[no-untyped-call]
    return step.metrics.result()


@dataclass(frozen=True)
class _Update:
    """What the losses of all packs of one update share."""

    policy: Policy
    reference: Policy
    experience: Experience
    schedule: FlowSchedule
    objective: Objective
    metrics: _Metrics


def _pack_loss(step: _Update, pack: Pack) -> Tensor:
    policy, reference = step.policy, step.reference
    text, latent = policy.model(pack.batch, backend=policy.backend)
    with torch.no_grad():
        reference_text, reference_latent = reference.model(pack.batch, backend=policy.backend)
    terms = []
    if len(pack.token_ids):
        terms.append(step.objective.text_weight * _text_loss(step, pack, text, reference_text))
    if len(pack.batch.latents):
        velocity = policy.model.velocity(latent)
        velocity_ref = reference.model.velocity(reference_latent).detach()
        loss = _image_loss(step, pack, velocity, velocity_ref)
        terms.append(step.objective.image_weight * loss)
    return torch.stack(terms).sum()


def _text_loss(step: _Update, pack: Pack, text: Tensor, reference_text: Tensor) -> Tensor:
    policy, objective = step.policy, step.objective
    answers, advantages = step.experience.answers, step.experience.answer_advantages
    assert answers is not None
    assert advantages is not None
    # A row that predicts several samples' tokens is projected on the vocabulary once.
    rows, row_index = pack.predictor.unique(return_inverse=True)

    def logprobs_and_entropy(model: UnifiedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return gather_logprobs(
            model.logits(hidden[rows]),
            pack.token_ids,
            row_index,
            temperature=objective.temperature,
            vocab_range=policy.answer_range,
            return_entropy=True,
            backend=policy.backend,
        )

    logprobs, entropy = logprobs_and_entropy(policy.model, text)
    with torch.no_grad():
        ref_logprobs, _ = logprobs_and_entropy(step.reference.model, reference_text)
    per_token = objective.text.aggregation == "token_mean"
    result = grpo_loss(
        logprobs,
        answers.logprobs[pack.tokens],
        advantages[pack.completions].float(),
        pack.cu_seqlens,
        ref_logprobs=ref_logprobs,
        denominator=float(len(answers.logprobs if per_token else answers.token_ids)),
        params=objective.text,
        backend=policy.backend,
    )
    # [R] of rows; the mean is over tokens, however many of them a row predicts.
    per_token_entropy = entropy.detach()[row_index]
    share = len(pack.token_ids) / len(answers.logprobs)
    step.metrics.add_text(result, per_token_entropy, share)
    return result.loss


def _image_loss(step: _Update, pack: Pack, velocity: Tensor, velocity_ref: Tensor) -> Tensor:
    pictures, advantages = step.experience.pictures, step.experience.picture_advantages
    assert pictures is not None
    assert advantages is not None
    steps = len(pictures.steps)
    total = len(pictures.latents) * steps
    at = torch.arange(total)[pack.pictures]
    shape = len(at), *step.policy.latent_shape
    result = flow_policy_loss(
        velocity.view(shape),
        pictures.velocities.flatten(0, 1)[at],
        pictures.noise.flatten(0, 1)[at],
        step.schedule.coefficients(torch.tensor(pictures.steps)[at % steps]),
        advantages[at // steps].float(),
        velocity_ref=velocity_ref.view(shape),
        denominator=float(total),
        params=step.objective.image,
        backend=step.policy.backend,
    )
    step.metrics.add_image(result)
    return result.loss


class _Metrics:
    """Puts together what the packs of one update report: sums, weighted means and extremes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.lowest: dict[str, float] = {}
        self.highest: dict[str, float] = {}

    def add_text(self, result: PolicyLoss, entropy: Tensor, share: float) -> None:
        """`share` is this pack's part of the tokens: its metrics are means over its own."""
        found = result.metrics
        self.sums["loss/text"] += float(result.loss.detach())
        self.sums["kl/text"] += share * float(found.kl)
        self.sums["entropy/text"] += share * float(entropy.mean())
        self.sums["clip/text"] += share * float(found.clip_fraction_low + found.clip_fraction_high)
        self._extremes("text", found)

    def add_image(self, result: FlowPolicyLoss) -> None:
        """Metrics of pictures are sums over the shared denominator already."""
        found = result.metrics
        self.sums["loss/image"] += float(result.loss.detach())
        self.sums["kl/image"] += float(found.kl_velocity_mse)
        self.sums["kl_gaussian/image"] += float(found.kl_gaussian)
        self.sums["clip/image"] += float(found.clip_fraction_low + found.clip_fraction_high)
        self._extremes("image", found)

    def _extremes(self, modality: str, found: LossMetrics | FlowLossMetrics) -> None:
        low, high = f"ratio/{modality}/min", f"ratio/{modality}/max"
        # Python's min(1.0, nan) is 1.0, and the self test of the ratios must see the NaN.
        self.lowest[low] = float(np.minimum(self.lowest.get(low, 1.0), float(found.ratio_min)))
        self.highest[high] = float(np.maximum(self.highest.get(high, 1.0), float(found.ratio_max)))

    def result(self) -> dict[str, float]:
        """All metrics by name."""
        return {**self.sums, **self.lowest, **self.highest}
