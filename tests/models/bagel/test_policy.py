"""What the policy samples and what it trains on is what the oracle computes of BAGEL's chat."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from models.bagel import oracle
from models.bagel.folder import AUTOENCODER, write_folder
from models.bagel.shapes import SHAPE
from models.bagel.tiny_policy import GRID, SIDES, Letters, questions, requests, tiny_policy

from lvrpo.data.example import Video
from lvrpo.models.bagel import BagelConfig, BagelPolicy, PictureSides, load_bagel
from lvrpo.models.bagel.pictures import resize
from lvrpo.models.flow import FlowSchedule, Guidance
from lvrpo.models.sampling import Sampling
from lvrpo.params.flow import FlowLossParams, GuidanceParams
from lvrpo.params.policy_loss import LossParams
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.loop import check_ratio
from lvrpo.trainer.objective import Objective
from lvrpo.trainer.update import policy_gradient

SAMPLING = Sampling(max_tokens=5, temperature=1.3)
SCHEDULE = FlowSchedule(num_steps=4, window=(0, 3))
GROUP = 3
OBJECTIVE = Objective(
    text=LossParams(beta=0.1),
    image=FlowLossParams(clip_low=0.2, clip_high=0.2, log_ratio_scale=0.5, beta=0.3),
    text_weight=0.7,
    image_weight=1.9,
    temperature=1.3,
    max_rows=1 << 20,
)
#: The oracle of the tiny model, with the markers of the tiny chat.
CHAT = dataclasses.replace(SHAPE, markers=Letters.markers)


def answered(policy, examples, sampling=SAMPLING):
    return policy.sample_texts(examples, GROUP, sampling=sampling, seed=7, step=2)


def drawn(policy, examples):
    return policy.sample_images(examples, GROUP, SCHEDULE, seed=7, step=2)


def question_splits(example):
    """As BAGEL's own inference: the picture, the words, and the answer's start."""
    pixels = torch.from_numpy(resize(example.image, SIDES))
    words = [Letters.start, *Letters().encode(example.prompt), Letters.end]
    return [("read", pixels), ("text", words)]


@pytest.mark.parametrize("temperature", [1.3, 0.0])
def test_answers_have_the_oracles_log_probs(temperature):
    policy = tiny_policy()
    examples = questions(3)
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    found = answered(policy, examples, sampling)
    logprobs = found.logprobs.split([len(ids) for ids in found.token_ids])
    assert {"end", "length"} == set(found.finish_reasons) or not temperature
    for at, (ids, ours) in enumerate(zip(found.token_ids, logprobs, strict=True)):
        answer = ("text", [Letters.start, *ids[:-1]])
        splits = [*question_splits(examples[at // GROUP]), answer]
        logits, _ = oracle.run(policy.module.state_dict(), CHAT, splits)
        allowed = logits[-len(ids) :, : Letters.end + 1]
        if not temperature:
            assert ids == allowed.argmax(1).tolist()
        expected = (allowed / (temperature or 1)).log_softmax(1)[range(len(ids)), ids]
        # Pixels between two of fp32's are laid out as one of them.
        assert (ours - expected).abs().max() < 1e-6
        assert found.texts[at] == Letters().decode(ids)


def test_pictures_among_words_have_the_oracles_log_probs():
    """As BAGEL's interleaved inference: every run of words is a text of its own."""
    policy, seen = tiny_policy(), [example.image for example in questions(3)]
    example = dataclasses.replace(
        questions(1)[0],
        prompt="ab <image>c<image>",
        image=seen[0],
        further_images=tuple(seen[1:]),
    )
    found = answered(policy, [example])
    assert policy.prompt_ids(example) == [
        *(Letters.start, *Letters().encode("ab "), Letters.end),
        *(Letters.start, *Letters().encode("c"), Letters.end, Letters.start),
    ]
    first, second, third = (("read", torch.from_numpy(resize(image, SIDES))) for image in seen)
    words = [
        ("text", [Letters.start, *Letters().encode(text), Letters.end]) for text in ("ab ", "c")
    ]
    splits = [first, words[0], second, words[1], third]
    logprobs = found.logprobs.split([len(ids) for ids in found.token_ids])
    for ids, ours in zip(found.token_ids, logprobs, strict=True):
        answer = ("text", [Letters.start, *ids[:-1]])
        logits, _ = oracle.run(policy.module.state_dict(), CHAT, [*splits, answer])
        allowed = logits[-len(ids) :, : Letters.end + 1]
        expected = (allowed / SAMPLING.temperature).log_softmax(1)[range(len(ids)), ids]
        assert (ours - expected).abs().max() < 1e-6


def test_a_video_is_refused():
    film = Video(np.zeros((2, 3, 8, 8), np.float32), 2.0)
    example = dataclasses.replace(questions(1)[0], videos=(film,))
    with pytest.raises(ValueError, match="question 0: the prompt has a video, which BAGEL does no"):
        tiny_policy().prompt(example)


def test_drawings_have_the_oracles_velocities():
    policy = tiny_policy()
    examples = requests(2)
    found = drawn(policy, examples)
    for at in range(len(examples) * GROUP):
        words = [Letters.start, *Letters().encode(examples[at // GROUP].prompt), Letters.end]
        for k, step in enumerate(found.steps):
            x = found.latents[at, k].view(*GRID, -1)
            splits = [("text", words), ("noise", x, float(SCHEDULE.times[step]))]
            _, expected = oracle.run(policy.module.state_dict(), CHAT, splits)
            error = (found.velocities[at, k] - expected).abs().max()
            assert error < 1e-10 * expected.abs().max()
    assert found.images.shape == (6, 3, 8, 12)
    assert 0 <= found.images.min() <= found.images.max() <= 1


def test_guided_drawings_have_the_oracles_velocities():
    """Without its words a drawing has no context at all, as in BAGEL's own sampler."""
    policy, examples = tiny_policy(), requests(2)
    guidance = Guidance(GuidanceParams(text_scale=3.0, renorm="global"), until=0.8)
    found = policy.sample_images(examples, GROUP, SCHEDULE, guidance=guidance, seed=7, step=2)
    times = [float(SCHEDULE.times[step]) for step in found.steps]
    assert min(times) < 0.8 < max(times)
    for at in range(len(examples) * GROUP):
        words = policy.prompt_ids(examples[at // GROUP])
        for k, time in enumerate(times):
            noise = ("noise", found.latents[at, k].view(*GRID, -1), time)
            splits = [("text", words), noise]
            _, expected = oracle.run(policy.module.state_dict(), CHAT, splits)
            if time > 0.8:
                _, without = oracle.run(policy.module.state_dict(), CHAT, [noise])
                pushed = without + 3 * (expected - without)
                expected = pushed * (expected.norm() / (pushed.norm() + 1e-8)).clamp(max=1)
            error = (found.velocities[at, k] - expected).abs().max()
            assert error < 1e-10 * expected.abs().max()


def experience(policy):
    generator = torch.Generator().manual_seed(1)
    advantages = [torch.randn(2 * GROUP, generator=generator) for _ in range(2)]
    answers, pictures = answered(policy, questions(2)), drawn(policy, requests(2))
    return Experience(answers, advantages[0], pictures, advantages[1])


def gradients(policy, reference, found, **changes):
    policy.module.zero_grad()
    objective = dataclasses.replace(OBJECTIVE, **changes)
    metrics = policy_gradient(policy, reference, found, SCHEDULE, objective)
    named = policy.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, metrics


def test_before_an_update_every_ratio_is_one():
    policy = tiny_policy()
    _, metrics = gradients(policy, tiny_policy(), experience(policy))
    check_ratio(metrics)
    assert all(abs(metrics[f"ratio/{kind}/max"] - 1) < 1e-5 for kind in ("text", "image"))
    assert abs(metrics["kl/text"]) < 1e-9
    assert abs(metrics["kl/image"]) < 1e-9


@pytest.mark.parametrize("changes", [{"max_rows": 1}, {"max_rows": 60}, {"share_prompts": False}])
def test_however_groups_are_packed_the_gradient_is_one(changes):
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    found = experience(policy)
    whole, _ = gradients(policy, reference, found)
    parts, _ = gradients(policy, reference, found, **changes)
    assert whole.keys() == parts.keys()
    assert {"_moe_gen" in name for name in whole} == {True, False}
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max() <= 1e-10 * largest, name


def test_no_pack_is_longer_than_its_budget():
    policy = tiny_policy()
    groups = [(example, 4) for example in requests(3)]
    latents = torch.zeros(12, *policy.latent_shape, dtype=torch.float64)
    # A request has at most 8 tokens, a drawing 6 latents and 2 markers.
    packs = list(policy.packs([], groups, latents, torch.zeros(12), max_rows=24))
    assert all(pack.batch.rows <= 24 for pack in packs)
    assert sum(pack.pictures.stop - pack.pictures.start for pack in packs) == 12


def test_samples_do_not_depend_on_the_batch():
    policy = tiny_policy()
    asked, wanted = questions(3), requests(3)
    answers, pictures = answered(policy, asked), drawn(policy, wanted)
    for at in range(3):
        rows = slice(at * GROUP, (at + 1) * GROUP)
        assert answered(policy, [asked[at]]).token_ids == answers.token_ids[rows]
        alone = drawn(policy, [wanted[at]])
        assert (alone.latents - pictures.latents[rows]).abs().max() < 1e-10


def test_a_target_becomes_latents_of_a_drawing():
    policy = tiny_policy()
    images = torch.rand(2, 3, 8, 12)
    assert policy.encode(images).shape == (2, *policy.latent_shape)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\), expected \(8, 12\)"):
        policy.encode(images[..., :8])


def test_a_folder_is_a_policy(tmp_path):
    write_folder(tmp_path / "bagel")
    checkpoint = load_bagel(tmp_path / "bagel", dtype=torch.float32)
    policy = BagelPolicy.from_checkpoint(checkpoint, (8, 12), tokenizer=Letters(), sides=SIDES)
    assert policy.latent_grid == (8 // AUTOENCODER.token, 12 // AUTOENCODER.token)
    assert policy.skills == {"understand", "generate"}
    found = answered(policy, questions(1))
    assert all(token <= Letters.end for ids in found.token_ids for token in ids)
    for drawing, message in (
        ((8, 10), "expected multiples of 4"),
        ((0, 8), "expected multiples of 4"),
        ((8, 24), "expected at most 20 along a side"),
    ):
        with pytest.raises(ValueError, match=message):
            BagelPolicy.from_checkpoint(checkpoint, drawing, tokenizer=Letters())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((980, 980), (980, 980)),
        ((224, 448), (224, 448)),
        ((28, 28), (224, 224)),  # enlarged until its shorter side is 224
        ((1960, 980), (980, 490)),
        ((100, 333), (224, 742)),  # 745.92 is rounded to a multiple of 14
        ((50, 500), (98, 980)),  # both bounds cannot hold: the longest side does
    ],
)
def test_sides_are_bagels(size, expected):
    assert PictureSides.of(BagelConfig()) == PictureSides()
    assert PictureSides().fit(*size) == expected


def test_pictures_of_any_size_fit():
    generator = np.random.default_rng(0)
    for _ in range(300):
        height, width = generator.integers(1, 3000, 2)
        sides = PictureSides().fit(int(height), int(width))
        assert all(side % 14 == 0 and 14 <= side <= 980 for side in sides)
        assert PictureSides().fit(*sides) == sides or min(sides) < 224
    picture = generator.random((3, 9, 13), dtype=np.float32)
    resized = resize(picture, SIDES)
    assert resized.shape == (3, 8, 12)
    assert 0 <= resized.min() <= resized.max() <= 1
    assert resize(resized, SIDES) is resized
