"""The gradient of an update is that of its formula, however the groups are packed."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from trainer.small_policy import (
    GROUP,
    OBJECTIVE,
    SCHEDULE,
    TEMPERATURE,
    experience,
    prompts,
    small_policy,
)

from lvrpo import grpo_loss
from lvrpo.models.flow import Guidance
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.params.flow import GuidanceParams, Variant
from lvrpo.params.policy_loss import LOSS_PRESETS, LossParams
from lvrpo.runs.config_file import load_config
from lvrpo.trainer.config import TEXT_PRESETS
from lvrpo.trainer.correction import correct_sampler
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.loop import SELF_TEST_TOLERANCE, SelfTestError, check_ratio
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.update import ScheduleMismatch, _Metrics, pack_experience, policy_gradient

MIXES = {"text": (3, 0), "image": (0, 3), "mixed": (2, 2)}


@pytest.fixture(params=MIXES.values(), ids=MIXES.keys())
def case(request) -> tuple[UnifiedPolicy, UnifiedPolicy, Experience]:
    """A policy that has moved since it sampled, its reference, and what it sampled."""
    sampler = small_policy()
    found = experience(sampler, *request.param)
    policy, reference = small_policy(), small_policy(seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.01 * noise)
    return policy, reference, found


def gradients(
    case: tuple[UnifiedPolicy, UnifiedPolicy, Experience], objective: Objective = OBJECTIVE
) -> tuple[dict[str, Tensor], dict[str, float]]:
    policy, reference, found = case
    policy.module.zero_grad()
    metrics = policy_gradient(policy, reference, found, SCHEDULE, objective)
    return grads_of(policy), metrics


def grads_of(policy: UnifiedPolicy) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in policy.module.named_parameters()
        if parameter.grad is not None
    }


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in ours.items():
        scale = max(float(theirs[name].abs().max()), 1e-3)
        assert float((gradient - theirs[name]).abs().max()) <= 1e-10 * scale, name


@pytest.mark.parametrize("max_rows", [1, 40, 100])
def test_several_packs_make_the_gradient_of_one(case, max_rows):
    whole, metrics = gradients(case)
    parts, of_parts = gradients(case, dataclasses.replace(OBJECTIVE, max_rows=max_rows))
    assert_equal(parts, whole)
    assert of_parts == pytest.approx(metrics, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("max_rows", [40, 1 << 20])
def test_a_prompt_of_its_own_for_every_completion_makes_the_same_gradient(case, max_rows):
    shared, metrics = gradients(case)
    unshared = dataclasses.replace(OBJECTIVE, max_rows=max_rows, share_prompts=False)
    alone, of_alone = gradients(case, unshared)
    assert_equal(alone, shared)
    # Counted and summed in fp32.
    assert of_alone == pytest.approx(metrics, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_shared_and_unshared_training_stay_together(dtype, apart):
    """Fifty steps: what is wrong by a little in every gradient adds up, and Adam amplifies it."""
    reference = small_policy(dtype, backend=None)
    policies = {shared: small_policy(dtype, backend=None) for shared in (True, False)}
    optimizers = {
        shared: torch.optim.AdamW(policy.module.parameters(), lr=1e-3, betas=(0.9, 0.95))
        for shared, policy in policies.items()
    }
    for step in range(50):
        if step % 10 == 0:
            found = experience(policies[True], 2, 1)
        for shared, policy in policies.items():
            objective = dataclasses.replace(OBJECTIVE, share_prompts=shared)
            policy_gradient(policy, reference, found, SCHEDULE, objective)
            optimizers[shared].step()
            optimizers[shared].zero_grad()
    weights = [dict(policy.module.named_parameters()) for policy in policies.values()]
    for name, start in reference.module.named_parameters():
        moved = float((weights[0][name] - start).detach().abs().max())
        assert moved > 1e-3, name
        assert float((weights[0][name] - weights[1][name]).detach().abs().max()) <= apart * moved


@pytest.mark.parametrize("until", [0.0, 0.7, 1.0])
def test_an_update_replays_the_guidance_of_its_rollout(until):
    """Ratios are one, however it is packed, and the gradient goes through both passes."""
    guidance = Guidance(GuidanceParams(text_scale=2.0, renorm_min=0.5), until)
    policy = small_policy()
    guided = policy.sample_images(
        prompts("generate", 3), GROUP, SCHEDULE, guidance=guidance, seed=7, step=2
    )
    found = dataclasses.replace(experience(policy, 2, 3), pictures=guided)
    case = (policy, small_policy(seed=1), found)
    whole, metrics = gradients(case)
    for side in ("min", "max"):
        assert metrics[f"ratio/image/{side}"] == pytest.approx(1, abs=1e-6)
    for changes in ({"max_rows": 1}, {"max_rows": 40}, {"max_rows": 90}, {"share_prompts": False}):
        parts, told = gradients(case, dataclasses.replace(OBJECTIVE, **changes))
        assert_equal(parts, whole)
        assert told == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    if until == 1:
        unguided = dataclasses.replace(found, pictures=dataclasses.replace(guided, guidance=None))
        assert_equal(gradients((policy, case[1], unguided))[0], whole)
        return

    # A finite difference along the gradient, with the KL: neither pass is missed.
    objective = dataclasses.replace(OBJECTIVE, text_weight=0.0)
    only, _ = gradients(case, objective)
    step = 1e-6
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(policy)
        with torch.no_grad():
            for name, parameter in moved.module.named_parameters():
                if name in only:
                    parameter += sign * step * only[name]
        losses.append(gradients((moved, case[1], found), objective)[1]["loss/image"])
    slope = OBJECTIVE.image_weight * (losses[0] - losses[1]) / (2 * step)
    expected = sum(float(gradient.square().sum()) for gradient in only.values())
    assert slope == pytest.approx(expected, rel=1e-4)


def test_an_update_reads_nothing_from_its_device_but_its_metrics(monkeypatch):
    """On the meta device there are no values to read; on a GPU each read would wait for it."""
    found = experience(small_policy(), 2, 2)
    policy, reference = small_policy(backend=None), small_policy(backend=None)

    def moved(thing):
        tensors = {name: x.to("meta") for name, x in vars(thing).items() if isinstance(x, Tensor)}
        return dataclasses.replace(thing, **tensors)

    found = dataclasses.replace(
        moved(found), answers=moved(found.answers), pictures=moved(found.pictures)
    )
    for model in (policy.module, reference.module):
        model.to("meta")
    metrics: dict[str, Tensor] = {}
    monkeypatch.setattr(_Metrics, "result", lambda self: metrics.update(self.on_device()))
    policy_gradient(
        policy, reference, found, SCHEDULE, dataclasses.replace(OBJECTIVE, max_rows=100)
    )
    assert metrics.keys() >= {"loss/text", "loss/image", "ratio/text/max", "ratio/image/max"}
    assert all(x.is_meta and x.shape == () for x in metrics.values())
    assert all(gradient.is_meta for gradient in grads_of(policy).values())
    assert len(grads_of(policy)) == len(list(policy.module.parameters()))


def test_shared_groups_have_the_gradient_of_their_samples_one_by_one(case):
    """Every sample with a prompt of its own, in plain autograd, by the formulas of the paper."""
    policy, reference, found = case
    packed, metrics = gradients(case)
    policy.module.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    if found.answers is not None:
        text = sum(text_terms(policy, reference, found)) / len(found.answers.token_ids)
        assert float(text.detach()) == pytest.approx(metrics["loss/text"], rel=1e-6)
        loss = loss + OBJECTIVE.text_weight * text
    if found.pictures is not None:
        terms = image_terms(policy, reference, found)
        image = sum(terms) / len(terms)
        assert float(image.detach()) == pytest.approx(metrics["loss/image"], rel=1e-5)
        loss = loss + OBJECTIVE.image_weight * image
    loss.backward()
    assert_equal(packed, grads_of(policy))


@pytest.mark.parametrize("kept", [[0, 2, 3, 8], [4], [0, 1, 2, 3, 4, 5, 6, 7, 8], []], ids=str)
def test_answers_that_are_left_out_are_in_no_sum(kept):
    """Neither in the loss, nor in its KL, nor in what the mean divides by."""
    policy, reference = small_policy(), small_policy(seed=1)
    found = experience(small_policy(seed=2), 3, 0)
    terms = text_terms(policy, reference, found)
    policy.module.zero_grad()
    expected = sum((terms[i] for i in kept), torch.zeros(())) / max(1, len(kept))
    if kept:
        (OBJECTIVE.text_weight * expected).backward()
    plain = grads_of(policy)

    mask = torch.zeros(len(terms), dtype=torch.bool)
    mask[kept] = True
    left = Experience(found.answers.where(mask), found.answer_advantages[mask], None, None)
    packed, metrics = gradients((policy, reference, left))
    assert packed.keys() == plain.keys()
    if kept:
        assert metrics["loss/text"] == pytest.approx(float(expected.detach()), rel=1e-6)
        assert_equal(packed, plain)


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def text_terms(policy: UnifiedPolicy, reference: UnifiedPolicy, found: Experience) -> list[Tensor]:
    """Per answer: mean over its tokens of the clipped term + beta k3."""
    low, high = policy.answer_range

    def logprobs(of: UnifiedPolicy, example, tokens: list[int]) -> Tensor:
        builder = of.builder()
        # One causal span, as a model without groups would see it.
        prompt = of.add_prompt(builder, example)
        builder.text(tokens[:-1], prompt)
        text, _ = of.module(builder.build(), backend="torch")
        logits = of.module.logits(text[-len(tokens) :])[:, low:high] / TEMPERATURE
        picked = torch.tensor(tokens)[:, None] - low
        return logits.log_softmax(-1).gather(1, picked).squeeze(1)

    terms, start = [], 0
    for i, tokens in enumerate(found.answers.token_ids):
        example = found.answers.examples[i // GROUP]
        old = found.answers.logprobs[start : start + len(tokens)].double()
        start += len(tokens)
        new = logprobs(policy, example, tokens)
        with torch.no_grad():
            ref = logprobs(reference, example, tokens)
        advantage = found.answer_advantages[i].double()
        kl = (ref - new).exp() - (ref - new) - 1
        policy_term = clipped((new - old).exp(), advantage)
        if found.token_weights is not None:
            policy_term = policy_term * found.token_weights[start - len(tokens) : start]
        terms.append((policy_term + OBJECTIVE.text.beta * kl).mean())
    return terms


def image_terms(policy: UnifiedPolicy, reference: UnifiedPolicy, found: Experience) -> list[Tensor]:
    """Per picture and step: the clipped term of its log-density's ratio + beta (v - v_ref)^2."""

    def velocity(of: UnifiedPolicy, example, x: Tensor, k: int) -> Tensor:
        builder = of.builder()
        builder.noise(*of.latent_grid, parent=of.add_prompt(builder, example))
        # As the trainer has it, in fp32: a time is a time.
        times = torch.full((len(x),), float(SCHEDULE.times[k]))
        _, latent = of.module(builder.build(x, times), backend="torch")
        return of.module.velocity(latent)

    terms = []
    for i in range(len(found.pictures.latents)):
        example = found.pictures.examples[i // GROUP]
        for at, k in enumerate(found.pictures.steps):
            c = SCHEDULE.coefficients(k)
            c_x, c_v, std = (float(value) for value in (c.c_x, c.c_v, c.std))
            x, z = found.pictures.latents[i, at], found.pictures.noise[i, at].double()
            old_mean = c_x * x + c_v * found.pictures.velocities[i, at]
            taken = old_mean + std * z
            new = velocity(policy, example, x, k)
            with torch.no_grad():
                ref = velocity(reference, example, x, k)

            def log_density(mean: Tensor, taken: Tensor = taken, std: float = std) -> Tensor:
                return (-(((taken - mean) / std) ** 2) / 2).sum()

            log_ratio = log_density(c_x * x + c_v * new) - log_density(old_mean)
            ratio = (OBJECTIVE.image.log_ratio_scale * log_ratio).exp()
            advantage = found.picture_advantages[i].double()
            kl = ((new - ref) ** 2).mean()
            terms.append(clipped(ratio, advantage) + OBJECTIVE.image.beta * kl)
    return terms


@pytest.mark.parametrize("keeps_noise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_ratio_is_one_before_the_first_update(dtype, keeps_noise):
    policy = small_policy(dtype, backend=None, keeps_noise=keeps_noise)
    found = experience(policy, 2, 2)
    metrics = policy_gradient(policy, policy, found, SCHEDULE, OBJECTIVE)
    # fp32 old log-probs, and in fp32 two passes over the same tokens in another order.
    assert all(abs(metrics[f"ratio/text/{end}"] - 1) <= 1e-5 for end in ("min", "max"))
    assert all(abs(metrics[f"ratio/image/{end}"] - 1) <= 1e-5 for end in ("min", "max"))
    check_ratio(metrics)
    assert abs(metrics["kl/text"]) < 1e-9
    assert abs(metrics["kl/image"]) < 1e-9
    assert metrics["clip/text"] == metrics["clip/image"] == 0


def test_a_ratio_away_from_one_stops_the_run(case):
    metrics = gradients(case)[1]
    with pytest.raises(SelfTestError, match=r"self test: ratio/\w+/(min|max) is .* expected 1"):
        check_ratio(metrics)
    with pytest.raises(SelfTestError, match="is nan before"):
        check_ratio({"ratio/text/max": float("nan")})
    check_ratio({"ratio/text/max": 1 + SELF_TEST_TOLERANCE / 2, "loss/text": 7.0})
    check_ratio({"ratio/text/max": 1.05}, torch.bfloat16)
    with pytest.raises(SelfTestError, match=r"1.05 before .* within 0.001"):
        check_ratio({"ratio/text/max": 1.05}, torch.float32)


def test_another_schedule_is_refused(case):
    policy, reference, found = case
    other = dataclasses.replace(SCHEDULE, noise_level=0.5)
    if found.pictures is None:
        policy_gradient(policy, reference, found, other, OBJECTIVE)
        return
    with pytest.raises(ScheduleMismatch, match=f"{SCHEDULE.fingerprint()}.*{other.fingerprint()}"):
        policy_gradient(policy, reference, found, other, OBJECTIVE)
    assert grads_of(policy) == {}


def test_weights_scale_their_modality_alone():
    policy, reference = small_policy(), small_policy(seed=1)
    case = policy, reference, experience(policy, 2, 2)

    def weighted(text: float, image: float) -> dict[str, Tensor]:
        return gradients(
            case, dataclasses.replace(OBJECTIVE, text_weight=text, image_weight=image)
        )[0]

    text, image, both = weighted(1, 0), weighted(0, 1), weighted(3, 5)
    assert_equal({k: 3 * text[k] + 5 * image[k] for k in both}, both)
    # Text does not reach what only drawings use; drawings reach how their prompt is read.
    assert not text["latent_out.weight"].any()
    assert not text["layers.0.generate.qkv.weight"].any()
    assert not image["head.weight"].any()
    assert image["latent_out.weight"].any()
    assert image["layers.0.understand.qkv.weight"].any()


@pytest.mark.parametrize("text", [0.0, 0.1])
@pytest.mark.parametrize("image", [0.0, 0.3])
def test_the_reference_is_asked_only_where_its_kl_weighs(monkeypatch, text, image):
    """One pack holds both modalities, the others one; nothing is said of what nobody measured."""
    policy, reference = small_policy(), small_policy(seed=1)
    found = experience(policy, 2, 2)
    objective = dataclasses.replace(
        OBJECTIVE,
        text=LossParams(beta=text),
        image=dataclasses.replace(OBJECTIVE.image, beta=image),
        max_rows=100,
    )
    packs = list(pack_experience(policy, found, SCHEDULE, objective))
    needed = sum(
        bool((text and len(pack.token_ids)) or (image and pack.pictures.stop > pack.pictures.start))
        for pack in packs
    )
    assert needed == 0 or text + image
    asked = []
    reference.module.register_forward_hook(lambda *_: asked.append(1))
    metrics = policy_gradient(policy, reference, found, SCHEDULE, objective)
    assert len(asked) == needed
    assert ("kl/text" in metrics) == bool(text)
    assert ("kl/image" in metrics) == ("kl_gaussian/image" in metrics) == bool(image)
    assert {"loss/text", "loss/image", "entropy/text", "kl_old/text"} <= metrics.keys()
    alone = policy_gradient(policy, policy, found, SCHEDULE, objective)
    if not text + image:
        assert metrics == alone


def test_tokens_weigh_what_the_correction_of_their_sampler_says():
    """Ratios start at one again, and a token that was dropped has no gradient but its KL's."""
    policy, reference = small_policy(), small_policy(seed=1)
    sampler = small_policy(seed=3)
    with torch.no_grad():
        sampler.module.head.weight.mul_(8)
    found = experience(sampler, 3, 0)
    config = load_config(
        overrides=["loss.sampler_correction=icepop", f"rollout.temperature={TEMPERATURE}"]
    )
    answers, weights, metrics = correct_sampler(policy, found.answers, config)
    assert 0 < metrics["sampler/dropped"] < 1
    assert metrics["sampler/dropped"] == pytest.approx(float((weights == 0).float().mean()))
    ratio = (answers.logprobs - found.answers.logprobs).exp()
    inside = (ratio >= 0.5) & (ratio <= 5)
    torch.testing.assert_close(weights, torch.where(inside, ratio, 0.0))

    corrected = dataclasses.replace(found, answers=answers, token_weights=weights)
    packed, told = gradients((policy, reference, corrected))
    assert told["ratio/text/min"] == pytest.approx(1, abs=1e-6)
    assert told["ratio/text/max"] == pytest.approx(1, abs=1e-6)
    several, _ = gradients(
        (policy, reference, corrected), dataclasses.replace(OBJECTIVE, max_rows=40)
    )
    assert_equal(several, packed)
    policy.module.zero_grad()
    terms = text_terms(policy, reference, corrected)
    (OBJECTIVE.text_weight * sum(terms) / len(terms)).backward()
    assert_equal(packed, grads_of(policy))


def test_without_a_correction_nothing_changes():
    policy = small_policy()
    answers = experience(policy, 2, 0).answers
    assert correct_sampler(policy, answers, load_config()) == (answers, None, {})


def test_a_better_answer_becomes_more_likely():
    """Along the negative gradient the samples with positive advantages gain probability."""
    policy = small_policy()
    found = experience(policy, 3, 3)
    objective = dataclasses.replace(
        OBJECTIVE,
        text=LossParams(beta=0.0),
        image=dataclasses.replace(OBJECTIVE.image, beta=0.0),
    )
    before = policy_gradient(policy, policy, found, SCHEDULE, objective)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.sub_(1e-3 * parameter.grad)
    after = policy_gradient(policy, policy, found, SCHEDULE, objective)
    assert after["loss/text"] < before["loss/text"]
    assert after["loss/image"] < before["loss/image"]


@pytest.mark.parametrize(
    "key",
    [
        *(f"preset={name}" for name in TEXT_PRESETS),
        *(f"image_variant={v}" for v in get_args(Variant)),
    ],
)
def test_every_loss_of_the_configuration_is_the_same_in_several_packs(key):
    config = load_config(overrides=[f"loss.{key}", f"rollout.temperature={TEMPERATURE}"])
    objective = Objective.from_config(config)
    policy = small_policy()
    case = policy, small_policy(seed=1), experience(policy, 3, 1)
    whole, metrics = gradients(case, objective)
    parts, of_parts = gradients(case, dataclasses.replace(objective, max_rows=30))
    assert_equal(parts, whole)
    assert whole["head.weight"].any()
    assert whole["latent_out.weight"].any()
    assert of_parts == pytest.approx(metrics, rel=1e-6, abs=1e-9)


def test_the_objective_is_that_of_the_configuration():
    config = load_config(
        overrides=[
            "loss.preset=dr_grpo",
            "loss.text_clip_low=0.1",
            "loss.text_clip_high=0.15",
            "loss.text_kl=0.2",
            "loss.image_clip=0.3",
            "loss.image_kl=0.4",
            "loss.image_kl_form=gaussian",
            "loss.image_log_ratio_scale=0",
            "rollout.temperature=0.5",
            "rollout.max_answer_tokens=6",
        ]
    )
    found = Objective.from_config(config)
    text, image = found.text, found.image
    assert (text.clip_low, text.clip_high, text.beta, text.max_length) == (0.1, 0.15, 0.2, 6)
    assert (image.clip_low, image.clip_high, image.beta, image.kl) == (0.3, 0.3, 0.4, "gaussian")
    assert image.log_ratio_scale == "mean"
    assert found.temperature == 0.5


def test_the_text_clip_is_one_that_two_updates_reach_or_the_preset_s_own():
    assert _text_clip() == (0.05, 0.05)
    assert _text_clip("loss.text_clip_high=0.28") == (0.05, 0.28)
    assert _text_clip("loss.text_clip_low=0.2", "loss.text_clip_high=0.2") == (0.2, 0.2)


@pytest.mark.parametrize("preset", sorted(set(TEXT_PRESETS) - {"grpo"}))
def test_other_presets_have_their_own_clip(preset):
    own = LOSS_PRESETS[preset]
    default = LossParams()
    clip = own.get("clip_low", default.clip_low), own.get("clip_high", default.clip_high)
    assert _text_clip(f"loss.preset={preset}") == clip


def _text_clip(*overrides):
    text = Objective.from_config(load_config(overrides=overrides)).text
    return text.clip_low, text.clip_high


def test_a_ratio_that_is_not_a_number_fails_the_self_test():
    metrics = _Metrics(OBJECTIVE)
    for log_ratio in (0.0, math.nan, 0.0):
        result = grpo_loss(torch.zeros(2), torch.zeros(2), [1.0], [0, 2])
        result.metrics.extremes[:2] += log_ratio
        metrics.add("text", result.loss, result.metrics)
    with pytest.raises(SelfTestError, match=r"ratio/text/m.. is nan"):
        check_ratio(metrics.result())
