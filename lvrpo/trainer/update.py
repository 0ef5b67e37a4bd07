"""The gradient of one policy update: replay the rollout on packed buffers, form both losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.models.packs import GuidedPictures, Pack, PictureGroup
from lvrpo.models.protocol import Outputs, Pictures, Policy
from lvrpo.ops.flow_policy_loss import flow_policy_loss
from lvrpo.ops.linear_grpo_loss import linear_grpo_loss
from lvrpo.params.flow import FlowLossMetrics
from lvrpo.params.loss_metrics import LossMetrics
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.minibatches import own_share
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.ranks import ALONE, Ranks, has_parts, sum_gradients
from lvrpo.trainer.sharing import SharedPictures


class ScheduleMismatch(RuntimeError):
    """A trajectory was sampled with another schedule than the update uses."""


def policy_gradient(
    policy: Policy,
    reference: Policy,
    experience: Experience,
    schedule: FlowSchedule,
    objective: Objective,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Add the gradient of the objective to the model's parameters.

    The gradient is that of the whole experience, a rollout or a minibatch of one, however many
    packs it takes, and however many ranks share them: every pack's loss is divided by the
    experience's own counts. The reference is evaluated only where a KL to it weighs. The tensors of
    `experience` are on the policy's device; before the last pack is done nothing is read from it
    but the number of rows that `linear_grpo_loss` asks for.

    Args:
        policy: that learns.
        reference: that it stays close to.
        experience: of all ranks.
        schedule: that the pictures were sampled with.
        objective: what is minimised.
        ranks: that share the experience, whose gradients are added up.

    Returns:
        Metrics of the update, keyed as in the run's records.

    Raises:
        ScheduleMismatch: the pictures were sampled with another schedule.
    """
    pictures = experience.pictures
    if pictures is not None and pictures.fingerprint != schedule.fingerprint():
        raise ScheduleMismatch(
            f"pictures were sampled with schedule {pictures.fingerprint}, the update uses "
            f"{schedule.fingerprint()}"
        )
    own, metrics = own_share(experience, ranks), _Metrics(objective)
    step = _Update(policy, reference, own, schedule, objective, metrics, _Counts.of(experience))

    packs = pack_experience(policy, own, schedule, objective)

    def add_gradients() -> None:
        for pack in packs:
            _pack_loss(step, pack).backward()  # type: ignore[no-untyped-call]

    if ranks.size > 1 and has_parts(policy.module):
        for pass_loss in _equal_passes(step, packs, experience, ranks):
            pass_loss.backward()  # type: ignore[no-untyped-call]
    else:
        ranks.together(add_gradients)
    sum_gradients(policy.module, ranks)
    return metrics.of_all(ranks).result()


def _equal_passes(
    step: _Update, packs: Iterator[Pack], experience: Experience, ranks: Ranks
) -> Iterator[Tensor]:
    """The losses of this rank's packs, and zeros while others have more of them.

    What ranks have parts of is put together for each pass by all of them. So one that raises in a
    pass is not waited for: its process ends, which the others notice.
    """
    while True:
        pack = next(packs, None)
        if not any(ranks.gather(pack is not None)):
            return
        if pack is not None:
            yield _pack_loss(step, pack, with_reference=True)
            continue
        outputs, _ = _forward(step, _idle_pack(step.policy, experience), with_reference=True)
        yield 0.0 * (outputs.hidden.sum() + outputs.velocity.sum())


def _idle_pack(policy: Policy, experience: Experience) -> Pack:
    """The least of a pack."""
    answers, pictures = experience.answers, experience.pictures
    if answers is not None and answers.token_ids:
        example, completions = answers.groups()[0]
        (pack,) = policy.packs([(example, [completions[0][:1]])])
        return pack
    assert isinstance(pictures, SharedPictures)
    latents = pictures.own.latents.new_zeros(1, *pictures.own.latents.shape[2:])
    (pack,) = policy.packs([], [(pictures.examples[0], 1)], latents, torch.zeros(1))
    return pack


def merge_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: extremes stay extremes, all else is a mean.

    An update counts as much as any other; a metric that it lacks, as a minibatch without answers
    does, is the mean of the others. NaN stays NaN.
    """
    values: dict[str, list[float]] = {}
    for metrics in updates:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    merged = {"min": np.min, "max": np.max}
    return {
        name: float(merged.get(name.rpartition("/")[2], np.mean)(found))
        for name, found in values.items()
    }


def pack_experience(
    policy: Policy, experience: Experience, schedule: FlowSchedule, objective: Objective
) -> Iterator[Pack]:
    """The packed buffers of an update: answers, then every trained step of the pictures."""
    answers, pictures = experience.answers, experience.pictures
    groups: list[PictureGroup] = []
    latents = times = guided = None
    if pictures is not None:
        assert isinstance(pictures, Pictures)
        count, steps = pictures.latents.shape[:2]
        groups = [(example, pictures.group_size * steps) for example in pictures.examples]
        latents = pictures.latents.flatten(0, 1)
        at = [float(schedule.times[k]) for k in pictures.steps]
        times = torch.tensor(at).repeat(count)
        if pictures.guidance is not None:
            which = torch.tensor([pictures.guidance.guides(time) for time in at]).repeat(count)
            guided = GuidedPictures(pictures.guidance.params, which)
    return policy.packs(
        [] if answers is None else answers.groups(),
        groups,
        latents,
        times,
        objective.max_rows,
        share_prompts=objective.share_prompts,
        guided=guided,
    )


class _Counts(NamedTuple):
    """What the losses are means over, of all ranks."""

    tokens: int
    answers: int
    pictures: int  # the steps of each that are trained

    @classmethod
    def of(cls, experience: Experience) -> _Counts:
        answers, pictures = experience.answers, experience.pictures
        steps = 0
        if pictures is not None:
            steps = len(pictures.examples) * pictures.group_size * len(pictures.steps)
        if answers is None:
            return cls(0, 0, steps)
        return cls(len(answers.logprobs), len(answers.token_ids), steps)


@dataclass(frozen=True)
class _Update:
    """What the losses of all packs of one update share."""

    policy: Policy
    reference: Policy
    experience: Experience
    schedule: FlowSchedule
    objective: Objective
    metrics: _Metrics
    counts: _Counts


def _forward(step: _Update, pack: Pack, with_reference: bool) -> tuple[Outputs, Outputs | None]:
    """Of the policy, and of the reference where a KL to it weighs, here or, if asked, at all."""
    text, image = step.objective.text.beta > 0, step.objective.image.beta > 0
    outputs, reference = step.policy.forward(pack), None
    has_text, has_pictures = len(pack.token_ids) > 0, len(outputs.velocity) > 0
    if (text and (has_text or with_reference)) or (image and (has_pictures or with_reference)):
        with torch.no_grad():
            reference = step.reference.forward(pack)
    return outputs, reference


def _pack_loss(step: _Update, pack: Pack, with_reference: bool = False) -> Tensor:
    objective = step.objective
    outputs, reference = _forward(step, pack, with_reference)
    has_text, has_pictures = len(pack.token_ids) > 0, len(outputs.velocity) > 0
    terms = []
    if has_text:
        terms.append(objective.text_weight * _text_loss(step, pack, outputs, reference))
    if has_pictures:
        terms.append(objective.image_weight * _image_loss(step, pack, outputs, reference))
    return torch.stack(terms).sum()


def _text_loss(step: _Update, pack: Pack, outputs: Outputs, reference: Outputs | None) -> Tensor:
    policy, objective, experience = step.policy, step.objective, step.experience
    answers, advantages = experience.answers, experience.answer_advantages
    assert answers is not None
    assert advantages is not None
    ref_logprobs = None
    if reference is not None and objective.text.beta:
        with torch.no_grad():
            ref_logprobs = reference.logprobs(
                pack, temperature=objective.temperature, backend=policy.backend
            )
    weights = experience.token_weights
    per_token = objective.text.aggregation == "token_mean"
    result = linear_grpo_loss(
        outputs.hidden,
        token_ids=pack.token_ids,
        old_logprobs=answers.logprobs[pack.tokens],
        advantages=advantages[pack.completions].float(),
        cu_seqlens=pack.cu_seqlens,
        row_index=pack.row_index,
        **outputs.head.arguments(objective.temperature),
        policy_weights=None if weights is None else weights[pack.tokens],
        level="sequence",
        ref_logprobs=ref_logprobs,
        denominator=float(step.counts.tokens if per_token else step.counts.answers),
        params=objective.text,
        backend=policy.backend,
    )
    step.metrics.add("text", result.loss, result.metrics)
    return result.loss


def _image_loss(step: _Update, pack: Pack, outputs: Outputs, reference: Outputs | None) -> Tensor:
    pictures, advantages = step.experience.pictures, step.experience.picture_advantages
    assert isinstance(pictures, Pictures)
    assert advantages is not None
    steps = len(pictures.steps)
    taken = torch.tensor(pictures.steps).repeat(len(pictures.latents))[pack.pictures]
    velocity_ref = None
    if reference is not None and step.objective.image.beta:
        velocity_ref = reference.velocity
    result = flow_policy_loss(
        outputs.velocity,
        pictures.velocities.flatten(0, 1)[pack.pictures],
        pictures.noise.flatten(0, 1)[pack.pictures],
        step.schedule.coefficients(taken, device=step.policy.device),
        advantages.repeat_interleave(steps)[pack.pictures].float(),
        velocity_ref=velocity_ref,
        denominator=float(step.counts.pictures),
        params=step.objective.image,
        backend=step.policy.backend,
    )
    step.metrics.add("image", result.loss, result.metrics)
    return result.loss


class _Metrics:
    """Puts together what the packs of one update report.

    It stays on the device until the last pack, so that no pack waits for the one before it.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.losses: dict[str, Tensor] = {}  # fp64 scalars
        self.texts: list[LossMetrics] = []
        self.images: list[FlowLossMetrics] = []

    def add(self, modality: str, loss: Tensor, metrics: LossMetrics | FlowLossMetrics) -> None:
        """The loss and metrics of one pack; losses have a common denominator, and add up."""
        name = f"loss/{modality}"
        self.losses[name] = self.losses.get(name, 0.0) + loss.detach().double()
        if isinstance(metrics, LossMetrics):
            self.texts.append(metrics)
        else:
            self.images.append(metrics)

    def of_all(self, ranks: Ranks) -> _Metrics:
        """Those of the packs of all ranks."""
        if ranks.size == 1:
            return self
        own = (
            {name: loss.cpu() for name, loss in self.losses.items()},
            [LossMetrics(part.sums.cpu(), part.extremes.cpu()) for part in self.texts],
            [FlowLossMetrics(part.sums.cpu(), part.extremes.cpu()) for part in self.images],
        )
        whole = _Metrics(self.objective)
        for losses, texts, images in ranks.gather(own):
            for name, loss in losses.items():
                whole.losses[name] = whole.losses.get(name, 0.0) + loss
            whole.texts += texts
            whole.images += images
        return whole

    def result(self) -> dict[str, float]:
        """All metrics by name."""
        found = self.on_device()
        values = torch.stack([*found.values()]).tolist() if found else []
        return dict(zip(found, values, strict=True))

    def on_device(self) -> dict[str, Tensor]:
        """The same as fp64 scalars that nobody has waited for.

        The distance to a reference that does not weigh is not measured, and so not said.
        """
        found: dict[str, Tensor] = {}
        if self.texts:
            text = LossMetrics.merge(self.texts)
            if self.objective.text.beta:
                found["kl/text"] = text.kl
            found |= {"kl_old/text": text.kl_old, "entropy/text": text.entropy}
            found |= _bounds("text", text)
        if self.images:
            image = FlowLossMetrics.merge(self.images)
            if self.objective.image.beta:
                found["kl/image"] = image.kl_velocity_mse
                found["kl_gaussian/image"] = image.kl_gaussian
            found |= _bounds("image", image)
        return self.losses | {name: value.double() for name, value in found.items()}


def _bounds(modality: str, metrics: LossMetrics | FlowLossMetrics) -> dict[str, Tensor]:
    return {
        f"clip/{modality}": metrics.clip_fraction_low + metrics.clip_fraction_high,
        f"ratio/{modality}/min": metrics.ratio_min.clamp(max=1.0),
        f"ratio/{modality}/max": metrics.ratio_max.clamp(min=1.0),
    }
