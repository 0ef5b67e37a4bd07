from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvrpo.data.example import Example
from lvrpo.digits.attacks import noticed
from lvrpo.digits.encoder import (
    DualEncoder,
    key_phrases,
    train_dual_encoder,
)
from lvrpo.digits.scenes import SceneConfig, generator, scene_examples, with_label_noise
from lvrpo.rewards.reward import Samples
from lvrpo.rewards.semantic import SemanticReward, pool_similarity


@pytest.fixture(scope="module")
def encoder():
    return train_dual_encoder()


@pytest.fixture(scope="module")
def scenes():
    return scene_examples(SceneConfig(), "test", "generate", 500, 0)


def drawings(examples):
    return torch.from_numpy(np.stack([example.target for example in examples]))


def test_key_phrases():
    assert key_phrases("draw 3 at top-left and 7 at row 1 column 2") == [
        "3 at top-left",
        "7 at row 1 column 2",
    ]
    assert key_phrases("a cat, a dog") == ["a cat", "a dog"]
    assert key_phrases("") == []


def test_a_prompt_implies_that_every_other_cell_is_empty(encoder):
    asked = ["3 at top-left", "7 at bottom-right"]
    assert encoder.implied_by(asked) == ["nothing at top-right", "nothing at bottom-left"]
    assert all(map(encoder.knows, encoder.implied_by(asked)))
    for elsewhere in (["a 3 above a 7"], ["3 at top-left", "a boat"], ["3 at row 5 column 1"], []):
        assert encoder.implied_by(elsewhere) == []


def test_right_drawings_score_above_drawings_that_are_wrong_in_one_way(encoder, scenes):
    shares = noticed(SemanticReward(encoder), scenes, generator(0))
    assert len(shares) == 8
    assert {name: share for name, share in shares.items() if share < 0.99} == {}


def test_without_what_is_implied_a_digit_too_many_goes_unnoticed(encoder, scenes):
    shares = noticed(SemanticReward(encoder, implied=False), scenes, generator(0))
    assert shares["a digit too many"] < 0.9
    assert shares["extra digits everywhere"] < 0.9


def test_a_gradient_follows_the_score_back_to_the_pixels(encoder, scenes):
    reward = SemanticReward(encoder)
    pictures = torch.rand(5, 1, 16, 16).double()
    pictures.requires_grad_()
    given = reward.similarity(scenes[:5], pictures)
    (gradient,) = torch.autograd.grad(given.sum(), pictures)
    along = torch.randn_like(pictures)
    moved = [
        reward.similarity(scenes[:5], pictures + h * along).sum().item() for h in (1e-2, -1e-2)
    ]
    slope = float((gradient * along).sum())
    assert (moved[0] - moved[1]) / 2e-2 == pytest.approx(slope, rel=0.02, abs=1e-3)
    assert given.tolist() == pytest.approx(
        reward(Samples.of_images(scenes[:5], pictures.detach())).tolist(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("form", "pool"), [("dense", "softmax"), ("dense", "topk"), ("dense", "max"), ("global", "max")]
)
def test_right_drawings_of_unseen_digits_score_above_wrong_ones(encoder, scenes, form, pool):
    reward = SemanticReward(encoder, form, pool)
    rng = generator(0)
    wrong = [with_label_noise(example, 1.0, rng, split="test") for example in scenes]
    right = reward(Samples.of_images(scenes, drawings(scenes)))
    worse = reward(Samples.of_images(scenes, drawings(wrong)))
    assert right.abs().max() <= 1.0001
    assert (right > worse).float().mean() > (0.8 if form == "global" else 0.9)


def test_the_score_of_a_drawing_does_not_depend_on_its_batch(encoder, scenes):
    reward = SemanticReward(encoder)
    pictures = drawings(scenes)
    alone = torch.cat([reward(Samples.of_images([scenes[i]], pictures[i : i + 1])) for i in (0, 7)])
    together = reward(Samples.of_images(scenes, pictures))[[0, 7]]
    torch.testing.assert_close(alone, together)


def test_not_applicable_where_it_would_be_constant_or_meaningless(encoder, scenes):
    question = scene_examples(SceneConfig(), "test", "understand", 1, 0)[0]
    assert SemanticReward(encoder)(Samples.of_texts([question], ["3"])).isnan().all()
    boat = Example("generate", "b", "draw a boat")
    mixed = Samples.concat(
        [
            Samples.of_texts([question], ["3"]),
            Samples.of_images([boat, scenes[0]], drawings(scenes[:2])),
        ]
    )
    assert SemanticReward(encoder)(mixed).isnan().tolist() == [True, True, False]


def test_pools():
    similarity = torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5]])
    assert pool_similarity(similarity, "max").tolist() == pytest.approx([0.9, 0.5])
    assert pool_similarity(similarity, "topk").tolist() == pytest.approx([0.5, 0.5])
    soft = pool_similarity(similarity, "softmax")
    assert 0.5 < soft[0] < 0.9
    with pytest.raises(ValueError, match="'mean'"):
        pool_similarity(similarity, "mean")


def test_save_and_load(encoder, scenes, tmp_path):
    encoder.save(tmp_path / "encoder.safetensors")
    again = DualEncoder.load(tmp_path / "encoder.safetensors")
    samples = Samples.of_images(scenes[:20], drawings(scenes[:20]))
    assert torch.equal(SemanticReward(encoder)(samples), SemanticReward(again)(samples))
    assert not any(p.requires_grad for p in again.parameters())
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not written by DualEncoder\.save"):
        DualEncoder.load(tmp_path / "other.safetensors")


def test_training_is_reproducible_and_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second = (train_dual_encoder(steps=2, seed=3) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments_are_refused(encoder):
    with pytest.raises(ValueError, match="form is 'patch'"):
        SemanticReward(encoder, "patch")
    with pytest.raises(ValueError, match="pool is 'mean'"):
        SemanticReward(encoder, "dense", "mean")
    with pytest.raises(ValueError, match="10 x 16 pixels"):
        DualEncoder(["a"], 1, 10, 16)
