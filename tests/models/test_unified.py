from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from lvrpo.digits.scenes import SceneConfig, scene_examples
from lvrpo.models.unified.cache import CachedPass
from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.tokenizer import Tokenizer

# The torch backend in fp64: these tests are about layouts, and then equality is to rounding.
TINY = UnifiedConfig(
    vocab_size=400, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24, latent_dim=3
)


@pytest.fixture
def policy() -> UnifiedPolicy:
    from lvrpo.digits.phrases import scene_words

    torch.manual_seed(0)
    model = UnifiedModel(TINY).double()
    for parameter in model.parameters():  # a zero-initialised output would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    autoencoder = LinearAutoencoder(1, 16, 16, patch=8, dim=3)
    tokenizer = Tokenizer(scene_words())
    return UnifiedPolicy(model, tokenizer, autoencoder, (2, 2), tokenizer.word_token_range, "torch")


@pytest.fixture
def question():
    return scene_examples(SceneConfig(), "train", "understand", 1, 0)[0]


@pytest.fixture
def drawing():
    return scene_examples(SceneConfig(), "train", "generate", 1, 0)[0]


def noise(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count * 4, 3).double(), torch.rand(count).double().repeat_interleave(4)


def test_a_group_equals_its_samples_one_by_one(policy, question, drawing):
    latents, times = noise(2)
    shared = policy.builder()
    prompt = policy.add_prompt(shared, question)
    for tokens in ([270, 271], [], [272]):
        shared.text(tokens, prompt)
    prompt = policy.add_prompt(shared, drawing)
    for _ in range(2):
        shared.noise(2, 2, parent=prompt)
    text, latent = policy.module(shared.build(latents, times), backend="torch")

    alone_text, alone_latent = [], []
    for tokens in ([270, 271], [], [272]):
        builder = policy.builder()
        builder.text(tokens, policy.add_prompt(builder, question))
        alone_text.append(policy.module(builder.build(), backend="torch")[0])
    for i in range(2):
        builder = policy.builder()
        builder.noise(2, 2, parent=policy.add_prompt(builder, drawing))
        rows = slice(4 * i, 4 * i + 4)
        batch = builder.build(latents[rows], times[rows])
        alone_latent.append(policy.module(batch, backend="torch")[1])
    prompt_tokens = len(alone_text[1])
    torch.testing.assert_close(text[:prompt_tokens], alone_text[1])
    torch.testing.assert_close(text[prompt_tokens : prompt_tokens + 2], alone_text[0][-2:])
    torch.testing.assert_close(text[prompt_tokens + 2 : prompt_tokens + 3], alone_text[2][-1:])
    torch.testing.assert_close(latent, torch.cat(alone_latent))


def test_cached_pieces_equal_the_whole(policy, question, drawing):
    latents, times = noise(2)
    builder = policy.builder()
    prompts, children, leaves = [], [], []
    span = policy.add_prompt(builder, question)
    prompts += range(builder.rows)
    for _ in range(3):
        child = builder.text([270, 271, 272], span)
        children.append(builder.start(child))
    first = builder.rows
    span = policy.add_prompt(builder, drawing)
    prompts += range(first, builder.rows)
    for _ in range(2):
        leaf = builder.noise(2, 2, parent=span)
        leaves += range(builder.start(leaf), builder.end(leaf))
    layout = builder.build(latents, times)
    text, latent = policy.module(layout, backend="torch")

    run = CachedPass(policy.module, layout, torch.tensor(prompts), "torch")
    row_of = {int(row): i for i, row in enumerate(layout.text_rows)}
    of_prompts = [i for row, i in sorted(row_of.items()) if row in set(prompts)]
    torch.testing.assert_close(run.prompt_text, text[of_prompts])
    for position in range(3):
        rows = torch.tensor(children) + position
        hidden, _ = run.run(*run.part(rows))
        torch.testing.assert_close(hidden, text[[row_of[int(row)] for row in rows]])
    rows = torch.tensor(leaves)
    for _ in range(2):  # a second denoising step overwrites the first
        _, hidden = run.run(*run.part(rows))
        torch.testing.assert_close(hidden, latent)


def test_nobody_sees_a_noisy_picture_of_another_sample(policy, drawing):
    latents, times = noise(3)
    builder = policy.builder()
    prompt = policy.add_prompt(builder, drawing)
    for _ in range(3):
        builder.noise(2, 2, parent=prompt)
    batch = builder.build(latents, times)
    text, latent = policy.module(batch, backend="torch")
    changed = latents.clone()
    changed[4:8] += 1.0
    other_text, other = policy.module(dataclasses.replace(batch, latents=changed), backend="torch")
    assert torch.equal(text, other_text)
    assert torch.equal(latent[:4], other[:4])
    assert torch.equal(latent[8:], other[8:])
    assert not torch.equal(latent[4:8], other[4:8])


def test_gradients_reach_the_experts_that_were_used(policy, question, drawing):
    model = policy.module
    builder = policy.builder()
    policy.add_prompt(builder, question)
    model(builder.build(), backend="torch")[0].sum().backward()
    understand = [p for layer in model.layers for p in layer.understand.parameters()]
    generate = [p for layer in model.layers for p in layer.generate.parameters()]
    assert all(p.grad is None for p in generate)
    assert any(p.grad is not None and p.grad.any() for p in understand)
    model.zero_grad()
    builder = policy.builder()
    builder.noise(2, 2, parent=policy.add_prompt(builder, drawing))
    hidden = model(builder.build(*noise(1)), backend="torch")[1]
    model.velocity(hidden).square().sum().backward()
    assert all(p.grad is not None for p in generate)
    # A drawing learns to read its prompt: keys and values come from the understanding expert.
    assert model.layers[0].understand.qkv.weight.grad.any()


def test_layers_that_are_computed_again_give_the_same_gradients(policy, question, drawing):
    builder, model = policy.builder(), copy.deepcopy(policy.module)
    policy.add_prompt(builder, question)
    builder.noise(2, 2, parent=policy.add_prompt(builder, drawing))
    batch, found = builder.build(*noise(1)), []
    for again in (False, True):
        model.zero_grad()
        model.gradient_checkpointing = again
        text, latent = model(batch, backend="torch")
        (text.sum() + model.velocity(latent).square().sum()).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_position_ids_follow_bagel(policy, question, drawing):
    builder = policy.builder()
    picture = builder.picture(question.image, 2, 3)
    text = builder.text([5, 6, 7], picture)
    leaf = builder.noise(2, 2, parent=text)
    assert builder.build(*noise(1)).position_ids.tolist() == [0] * 6 + [1, 2, 3] + [4] * 4
    # A noise leaf does not advance: text under the same parent starts at the same position.
    after = builder.text([8], text)
    assert builder.build(*noise(1)).position_ids[builder.start(after)] == 4
    assert builder.end(leaf) == builder.start(after)


def test_vision_layers_do_not_mix_images(question):
    config = dataclasses.replace(TINY, vision_layers=1, image_patch=4)
    torch.manual_seed(0)
    model = UnifiedModel(config).double()
    other = scene_examples(SceneConfig(), "train", "understand", 2, 1)[1]

    def read(pictures: list[np.ndarray]) -> torch.Tensor:
        from lvrpo.models.unified.layout import PackBuilder

        builder = PackBuilder(config)
        for pixels in pictures:
            builder.picture(pixels, 2, 3)
        return model(builder.build(), backend="torch")[0]

    alone, both = read([question.image]), read([question.image, other.image])
    torch.testing.assert_close(alone, both[:2])


@pytest.mark.parametrize(("name", "billions"), [("bagel-1.5b", (3.0, 4.5)), ("bagel-7b", (13, 16))])
def test_presets_have_the_size_they_are_named_after(name, billions):
    # Two expert sets and untied embeddings: about twice the language model's own count.
    with torch.device("meta"):
        model = UnifiedModel(UnifiedConfig.preset(name))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions[0] < count < billions[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "heads is 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vision_heads": 5}, "vision_hidden is 192"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_bad_shape(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
