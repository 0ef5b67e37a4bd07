"""The gradient of one policy update: replay the rollout on packed buffers, form both losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvrpo.models.flow import FlowSchedule
from lvrpo.models.packs import Pack, PictureGroup
from lvrpo.models.protocol import Outputs, Policy
from lvrpo.ops.flow_policy_loss import flow_policy_loss
from lvrpo.ops.gather_logprobs import gather_logprobs
from lvrpo.ops.grpo_loss import grpo_loss
from lvrpo.params.flow import FlowLossMetrics, FlowPolicyLoss
from lvrpo.params.loss_metrics import LossMetrics
from lvrpo.params.policy_loss import PolicyLoss
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.objective import Objective


class ScheduleMismatch(RuntimeError):
    """A trajectory was sampled with another schedule than the update uses."""


def policy_gradient(
    policy: Policy,
    reference: Policy,
    experience: Experience,
    schedule: FlowSchedule,
    objective: Objective,
) -> dict[str, float]:
    """Add the gradient of the objective to the model's parameters.

    The gradient is that of the whole rollout, however many packs it takes: every pack's loss is
    divided by the rollout's own counts. The tensors of `experience` are on the policy's device, and
    nothing is read from it before the last pack is done.

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
    step = _Update(policy, reference, experience, schedule, objective, _Metrics())
    for pack in pack_experience(policy, experience, schedule, objective):
        _pack_loss(step, pack).backward()  # type: ignore[no-untyped-call]
    return step.metrics.result()


def pack_experience(
    policy: Policy, experience: Experience, schedule: FlowSchedule, objective: Objective
) -> Iterator[Pack]:
    """The packed buffers of an update: answers, then every trained step of the pictures."""
    answers, pictures = experience.answers, experience.pictures
    groups: list[PictureGroup] = []
    latents = times = None
    if pictures is not None:
        count, steps = pictures.latents.shape[:2]
        groups = [(example, pictures.group_size * steps) for example in pictures.examples]
        latents = pictures.latents.flatten(0, 1)
        times = torch.tensor([float(schedule.times[k]) for k in pictures.steps]).repeat(count)
    return policy.packs(
        [] if answers is None else answers.groups(),
        groups,
        latents,
        times,
        objective.max_rows,
        share_prompts=objective.share_prompts,
    )


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
    outputs = step.policy.forward(pack)
    with torch.no_grad():
        reference = step.reference.forward(pack)
    terms = []
    if len(pack.token_ids):
        terms.append(step.objective.text_weight * _text_loss(step, pack, outputs, reference))
    if len(outputs.velocity):
        terms.append(step.objective.image_weight * _image_loss(step, pack, outputs, reference))
    return torch.stack(terms).sum()


def _text_loss(step: _Update, pack: Pack, outputs: Outputs, reference: Outputs) -> Tensor:
    policy, objective = step.policy, step.objective
    answers, advantages = step.experience.answers, step.experience.answer_advantages
    assert answers is not None
    assert advantages is not None

    def logprobs_and_entropy(of: Outputs) -> tuple[Tensor, Tensor]:
        return gather_logprobs(
            of.logits,
            pack.token_ids,
            pack.row_index,
            temperature=objective.temperature,
            vocab_range=of.head.vocab_range,
            return_entropy=True,
            backend=policy.backend,
        )

    logprobs, entropy = logprobs_and_entropy(outputs)
    with torch.no_grad():
        ref_logprobs, _ = logprobs_and_entropy(reference)
    per_token = objective.text.aggregation == "token_mean"
    result = grpo_loss(
        logprobs,
        answers.logprobs[pack.tokens],
        advantages[pack.completions].float(),
        pack.cu_seqlens,
        level="sequence",
        ref_logprobs=ref_logprobs,
        entropy=entropy.detach()[pack.row_index],  # for the metrics
        denominator=float(len(answers.logprobs if per_token else answers.token_ids)),
        params=objective.text,
        backend=policy.backend,
    )
    step.metrics.add("text", result)
    return result.loss


def _image_loss(step: _Update, pack: Pack, outputs: Outputs, reference: Outputs) -> Tensor:
    pictures, advantages = step.experience.pictures, step.experience.picture_advantages
    assert pictures is not None
    assert advantages is not None
    steps = len(pictures.steps)
    total = len(pictures.latents) * steps
    taken = torch.tensor(pictures.steps).repeat(len(pictures.latents))[pack.pictures]
    result = flow_policy_loss(
        outputs.velocity,
        pictures.velocities.flatten(0, 1)[pack.pictures],
        pictures.noise.flatten(0, 1)[pack.pictures],
        step.schedule.coefficients(taken, device=step.policy.device),
        advantages.repeat_interleave(steps)[pack.pictures].float(),
        velocity_ref=reference.velocity,
        denominator=float(total),
        params=step.objective.image,
        backend=step.policy.backend,
    )
    step.metrics.add("image", result)
    return result.loss


class _Metrics:
    """Puts together what the packs of one update report.

    It stays on the device until the last pack, so that no pack waits for the one before it.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}  # fp64 scalars
        self.texts: list[LossMetrics] = []
        self.images: list[FlowLossMetrics] = []

    def add(self, modality: str, result: PolicyLoss | FlowPolicyLoss) -> None:
        """The loss and metrics of one pack; losses have a common denominator, and add up."""
        name = f"loss/{modality}"
        self.losses[name] = self.losses.get(name, 0.0) + result.loss.detach().double()
        if isinstance(result.metrics, LossMetrics):
            self.texts.append(result.metrics)
        else:
            self.images.append(result.metrics)

    def result(self) -> dict[str, float]:
        """All metrics by name."""
        found = self.on_device()
        values = torch.stack([*found.values()]).tolist() if found else []
        return dict(zip(found, values, strict=True))

    def on_device(self) -> dict[str, Tensor]:
        """The same as fp64 scalars that nobody has waited for."""
        found: dict[str, Tensor] = {}
        if self.texts:
            text = LossMetrics.merge(self.texts)
            found |= {
                "kl/text": text.kl,
                "kl_old/text": text.kl_old,
                "entropy/text": text.entropy,
            } | _bounds("text", text)
        if self.images:
            image = FlowLossMetrics.merge(self.images)
            found |= {
                "kl/image": image.kl_velocity_mse,
                "kl_gaussian/image": image.kl_gaussian,
            } | _bounds("image", image)
        return self.losses | {name: value.double() for name, value in found.items()}


def _bounds(modality: str, metrics: LossMetrics | FlowLossMetrics) -> dict[str, Tensor]:
    return {
        f"clip/{modality}": metrics.clip_fraction_low + metrics.clip_fraction_high,
        f"ratio/{modality}/min": metrics.ratio_min.clamp(max=1.0),
        f"ratio/{modality}/max": metrics.ratio_max.clamp(min=1.0),
    }
