"""Pictures to be edited: what BAGEL reads of them, and what the update replays, by the oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from models.bagel import autoencoder_oracle, oracle
from models.bagel.test_policy import CHAT, GROUP, SCHEDULE, drawn, gradients
from models.bagel.tiny import CONFIG
from models.bagel.tiny_policy import GRID, SIDES, Letters, questions, requests, tiny_policy

from lvrpo.data.example import Example
from lvrpo.data.marks import words_of_parts
from lvrpo.models.bagel import BagelConfig, BagelPolicy, PictureSides
from lvrpo.models.bagel.pictures import resize
from lvrpo.models.flow import Guidance
from lvrpo.models.packs import GuidedPictures
from lvrpo.params.flow import RENORMS, GuidanceParams
from lvrpo.runs.plan import sampling_of
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.experience import Experience
from lvrpo.trainer.loop import check_ratio
from lvrpo.trainer.warm_start import supervised_gradient

TOKEN = 4  # pixels along a side of a latent token of the tiny autoencoder


def edits(count: int) -> list[Example]:
    """Requests with a picture of their own size."""
    pairs = zip(requests(count), questions(count), strict=True)
    return [dataclasses.replace(request, image=asked.image) for request, asked in pairs]


def source_splits(policy, image: np.ndarray) -> list[tuple]:
    """As BAGEL's own editing: the latents' mean of the resized picture, then that picture read."""
    resized = resize(image, PictureSides(TOKEN, 2 * TOKEN, 5 * TOKEN))
    pixels = torch.from_numpy(resized).double()
    state = policy.autoencoder.state_dict()
    mean, _ = autoencoder_oracle.encode(state, pixels)
    latents = autoencoder_oracle.SCALE * (mean - autoencoder_oracle.SHIFT)
    height, width = (side // TOKEN for side in resized.shape[1:])
    tokens = autoencoder_oracle.tokens(latents).view(height, width, -1)
    return [("clean", tokens), ("read", torch.from_numpy(resize(resized, SIDES)))]


def words(text: str) -> tuple:
    return ("text", [Letters.start, *Letters().encode(text), Letters.end])


def velocities(policy, splits: list[tuple], x: torch.Tensor, time: float) -> torch.Tensor:
    """Of the noise alone; the oracle tells those of clean latents, too."""
    noise = ("noise", x.view(*GRID, -1), time)
    _, found = oracle.run(policy.module.state_dict(), CHAT, [*splits, noise])
    return found[-GRID[0] * GRID[1] :]


def assert_near(ours, theirs):
    # The picture passes through fp32 on its way.
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_an_edit_has_the_oracles_velocities():
    policy, examples = tiny_policy(), edits(2)
    found = drawn(policy, examples)
    for at in range(len(examples) * GROUP):
        example = examples[at // GROUP]
        splits = [*source_splits(policy, example.image), words(example.prompt)]
        for k, step in enumerate(found.steps):
            x, time = found.latents[at, k], float(SCHEDULE.times[step])
            assert_near(found.velocities[at, k], velocities(policy, splits, x, time))
    assert found.images.shape == (6, 3, 8, 12)


def test_pictures_to_be_edited_stand_where_they_are_marked():
    policy, (a, b) = tiny_policy(), [example.image for example in questions(2)]
    example = dataclasses.replace(
        requests(1)[0], prompt="ab <image> c", image=a, further_images=(b,)
    )
    found = drawn(policy, [example])
    splits = [*source_splits(policy, a), words("ab "), *source_splits(policy, b), words(" c")]
    x, time = found.latents[0, 1], float(SCHEDULE.times[found.steps[1]])
    assert_near(found.velocities[0, 1], velocities(policy, splits, x, time))


def test_a_guided_edit_keeps_its_picture_where_it_has_no_words():
    policy = tiny_policy()
    examples = [*requests(1), *edits(4)[1:], *requests(5)[4:]]  # with and without pictures
    guidance = Guidance(GuidanceParams(text_scale=3.0, image_scale=1.0, renorm="none"))
    found = policy.sample_images(examples, GROUP, SCHEDULE, guidance=guidance, seed=7, step=2)
    for at in range(len(examples) * GROUP):
        example = examples[at // GROUP]
        before = [] if example.image is None else source_splits(policy, example.image)
        x, time = found.latents[at, 2], float(SCHEDULE.times[found.steps[2]])
        with_words = velocities(policy, [*before, words(example.prompt)], x, time)
        without = velocities(policy, before, x, time)
        assert_near(found.velocities[at, 2], without + 3 * (with_words - without))


def published(v, without_text, without_image, params: GuidanceParams) -> torch.Tensor:
    """The velocity [n, c] of one edit, as BAGEL's sampler guides it."""

    def factor(pushed, dims):
        norms = (x.pow(2).sum(dims, keepdim=True).sqrt() for x in (v, pushed))
        return (next(norms) / (next(norms) + 1e-8)).clamp(params.renorm_min, 1)

    text = without_text + params.text_scale * (v - without_text)
    if params.renorm == "text_channel":
        text = text * factor(text, 1)
    if without_image is not None:
        text = without_image + params.image_scale * (text - without_image)
    over = {"global": (0, 1), "channel": 1}.get(params.renorm)
    return text if over is None else text * factor(text, over)


def check_image_guidance(renorm: str, image_scale: float = 1.5) -> None:
    """Edits among other requests, some of them with several pictures among their words."""
    policy = tiny_policy()
    a, b = (example.image for example in questions(2, seed=3))
    marked = Example("generate", "marked", "ab <image> c", image=a, further_images=(b,))
    examples = [*requests(1), *edits(3)[1:], *requests(4)[3:], marked]
    params = GuidanceParams(3.0, image_scale, renorm, renorm_min=0.6)
    guidance = Guidance(params, until=0.7)
    found = policy.sample_images(examples, GROUP, SCHEDULE, guidance=guidance, seed=7, step=2)
    times = [float(SCHEDULE.times[step]) for step in found.steps]
    assert min(times) < 0.7 < max(times)
    for at in range(len(examples) * GROUP):
        example = examples[at // GROUP]
        seen = [source_splits(policy, image) for image in example.images]
        shown = [split for source in seen for split in source]
        if example is marked:
            text = [words("ab "), words(" c")]
            whole = [*seen[0], text[0], *seen[1], text[1]]
        else:
            text = [words(example.prompt)]
            whole = [*shown, *text]
        for k, time in enumerate(times):
            x = found.latents[at, k]
            expected = velocities(policy, whole, x, time)
            if time > 0.7:
                without_text = velocities(policy, shown, x, time)
                without_image = velocities(policy, text, x, time) if seen else None
                expected = published(expected, without_text, without_image, params)
            assert_near(found.velocities[at, k], expected)


@pytest.mark.parametrize("renorm", RENORMS)
def test_edits_are_guided_by_their_pictures_as_bagels(renorm):
    check_image_guidance(renorm)


def test_requests_without_pictures_know_no_image_scale():
    policy = tiny_policy()
    found = [
        policy.sample_images(
            requests(3), GROUP, SCHEDULE, guidance=Guidance(params), seed=7, step=2
        )
        for params in (GuidanceParams(3.0, 1.0), GuidanceParams(3.0, 2.0))
    ]
    assert torch.equal(found[0].velocities, found[1].velocities)
    assert torch.equal(found[0].images, found[1].images)


@pytest.mark.parametrize("renorm", RENORMS)
def test_the_gradient_goes_through_every_pass(renorm):
    """That of the oracle, to all weights; without images, guided and not, too."""
    policy, examples = tiny_policy(), [*edits(2), *requests(3)[2:]]
    params = GuidanceParams(3.0, 1.5, renorm, renorm_min=0.6)
    which = torch.tensor([True, True, False, True, True, False])
    generator = torch.Generator().manual_seed(1)
    x, weights = (
        torch.randn(6, *policy.latent_shape, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    times = torch.tensor([0.9, 0.7, 0.8, 0.9, 0.6, 0.3])
    (pack,) = policy.packs(
        [], [(each, 2) for each in examples], x, times, guided=GuidedPictures(params, which)
    )
    (policy.forward(pack).velocity * weights).sum().backward()

    named = {name: p for name, p in policy.module.named_parameters() if p.requires_grad}
    state = policy.module.state_dict() | {
        name: parameter.detach().clone().requires_grad_() for name, parameter in named.items()
    }

    def velocity(splits, i):
        noise = ("noise", x[i].view(*GRID, -1), float(times[i]))
        return oracle.run(state, CHAT, [*splits, noise])[1][-GRID[0] * GRID[1] :]

    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        example = examples[i // 2]
        seen = [] if example.image is None else source_splits(policy, example.image)
        text = [words(example.prompt)]
        expected = velocity([*seen, *text], i)
        if which[i]:
            without_image = velocity(text, i) if seen else None
            expected = published(expected, velocity(seen, i), without_image, params)
        total = total + (expected * weights[i]).sum()
    total.backward()
    gradients = {
        name: [torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, state[name])]
        for name, ours in named.items()
    }
    largest = max(float(theirs.abs().max()) for _, theirs in gradients.values())
    for name, (ours, theirs) in gradients.items():
        assert (ours - theirs).abs().max() < 1e-6 * largest, name


def experience(policy, guidance: Guidance | None = None) -> Experience:
    generator = torch.Generator().manual_seed(1)
    examples = [*edits(2), *requests(3)[2:]]
    found = policy.sample_images(examples, GROUP, SCHEDULE, guidance=guidance, seed=7, step=2)
    return Experience(None, None, found, torch.randn(3 * GROUP, generator=generator))


@pytest.mark.parametrize(
    "guidance",
    [
        None,
        Guidance(GuidanceParams(text_scale=3.0, image_scale=1.0)),
        *(Guidance(GuidanceParams(3.0, 2.0, renorm), until=0.5) for renorm in RENORMS),
    ],
)
def test_the_update_replays_edits(guidance):
    policy = tiny_policy()
    _, metrics = gradients(policy, tiny_policy(), experience(policy, guidance))
    check_ratio(metrics)
    assert abs(metrics["ratio/image/max"] - 1) < 1e-5
    assert abs(metrics["kl/image"]) < 1e-9


@pytest.mark.parametrize("changes", [{"max_rows": 1}, {"max_rows": 150}, {"share_prompts": False}])
@pytest.mark.parametrize("image_scale", [1.0, 2.0])
def test_however_edits_are_packed_the_gradient_is_one(changes, image_scale):
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    found = experience(policy, Guidance(GuidanceParams(3.0, image_scale), until=0.8))
    whole, _ = gradients(policy, reference, found)
    parts, _ = gradients(policy, reference, found, **changes)
    assert whole.keys() == parts.keys()
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max() <= 1e-10 * largest, name


@pytest.mark.parametrize(("scales", "branches"), [((1, 1), 1), ((3, 1), 2), ((3, 1.5), 3)])
def test_a_plan_counts_an_edit_in_every_branch(scales, branches):
    """Two prompts of four are edits."""
    policy, clean = tiny_policy(), 0
    for example in edits(2):
        height, width = resize(example.image, PictureSides(TOKEN, 2 * TOKEN, 5 * TOKEN)).shape[1:]
        clean += height * width // TOKEN**2
    rollout = dataclasses.replace(
        TrainConfig().rollout,
        guidance=scales[0],
        guidance_image=scales[1],
        denoise_steps=3,
        stochastic_steps=1,
    )
    work = sampling_of(policy, rollout, [], [*edits(2), *requests(4)[2:]], group=GROUP)
    noisy = 2 * GROUP * (branches + min(branches, 2)) * GRID[0] * GRID[1]
    assert work.pictures.layout.latents == noisy + clean


def test_a_supervised_step_learns_the_targets_alone():
    """The clean latents of a source are read: no error is counted of them."""
    policy = tiny_policy(torch.float32)
    target = np.random.default_rng(0).random((3, 8, 12), dtype=np.float32)
    (example,) = (dataclasses.replace(edit, target=target) for edit in edits(1))
    metrics = supervised_gradient(policy, [], [[example, example]], seed=0, step=1)
    assert np.isfinite(metrics["loss/image"])
    (pack,) = policy.packs([], [(example, 2)], torch.zeros(2, *policy.latent_shape), torch.ones(2))
    assert len(pack.batch.latents) > len(pack.batch.noisy) == 2 * GRID[0] * GRID[1]
    assert policy.forward(pack).velocity.shape == (2, *policy.latent_shape)


def test_sides_of_pictures_to_be_edited_are_bagels():
    """512 to 1024, multiples of 16."""
    assert PictureSides.of_latents(BagelConfig(), 16) == PictureSides(16, 512, 1024)
    assert PictureSides.of_latents(CONFIG, TOKEN) == PictureSides(4, 8, 20)


def agrees() -> bool:
    """A guided edit has the oracle's velocity."""
    try:
        check_image_guidance("global")
    except AssertionError:
        return False
    return True


def latents_of(policy, picture: np.ndarray) -> tuple[torch.Tensor, int, int]:
    token = policy.autoencoder.config.token
    sides = PictureSides.of_latents(policy.module.config, token)
    resized = torch.from_numpy(resize(picture, sides))[None]
    return policy.autoencoder.encode(resized)[0], *(side // token for side in resized.shape[2:])


def patches_first(self, builder, picture, span, task):
    """Understanding before generation, as no BAGEL was trained."""
    return builder.clean(*latents_of(self, picture), builder.read(resize(picture, SIDES), span))


def latents_alone(self, builder, picture, span, task):
    return builder.clean(*latents_of(self, picture), span)


def patches_alone(self, builder, picture, span, task):
    return builder.read(resize(picture, SIDES), span)


def patches_of_the_file(self, builder, picture, span, task):
    """What is read is not what has latents, but the picture in its own size."""
    return builder.read(resize(picture, SIDES), builder.clean(*latents_of(self, picture), span))


def one_text(self, builder, example):
    return builder.text(self._text_ids("".join(words_of_parts(example))), -1)


MUTANTS = {
    "patches come first": ("_add_picture", patches_first),
    "nothing is read": ("_add_picture", latents_alone),
    "there are no latents": ("_add_picture", patches_alone),
    "patches are of the file": ("_add_picture", patches_of_the_file),
    "guidance forgets the picture": ("add_without_words", lambda self, builder, example: -1),
    "guidance by the picture keeps it": ("add_without_pictures", BagelPolicy.add_prompt),
    "guidance by the picture forgets the words": (
        "add_without_pictures",
        lambda self, builder, example: -1,
    ),
    "words are one text where no picture parts them": ("add_without_pictures", one_text),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_noticed(monkeypatch, mistake):
    assert agrees()
    monkeypatch.setattr(BagelPolicy, *MUTANTS[mistake])
    assert not agrees()
