from __future__ import annotations

import einops
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from lvrpo.digits.judge import digit_judge
from lvrpo.digits.pictures import digit_pools
from lvrpo.digits.scenes import SceneConfig, scene_examples
from lvrpo.models.unified.latents import LinearAutoencoder


@pytest.fixture(scope="module")
def pictures():
    examples = scene_examples(SceneConfig(), "train", "generate", 1500, 0)
    return torch.from_numpy(np.stack([example.target for example in examples]))


@pytest.fixture(scope="module")
def autoencoder(pictures):
    return LinearAutoencoder.fit(pictures)


def test_reconstructed_test_digits_are_still_read_right(autoencoder):
    pool = digit_pools()["test"]
    pictures = torch.zeros(len(pool.images), 1, 16, 16)
    pictures[:, 0, 8:, :8] = torch.from_numpy(pool.images)
    drawn = autoencoder.decode(autoencoder.encode(pictures))[:, 0, 8:, :8]
    right = digit_judge().classify(drawn) == torch.from_numpy(pool.labels)
    assert right.float().mean() >= 0.95


def test_shapes_scale_and_token_order(autoencoder, pictures):
    latents = autoencoder.encode(pictures)
    assert latents.shape == (len(pictures), 4, 12)
    assert latents.shape[1] == autoencoder.tokens
    assert abs(float(latents.square().mean()) - 1) < 0.01
    corner = pictures[:1] * 0
    corner[:, :, :8, 8:] = 0.5  # top-right is token 1
    changed = (autoencoder.encode(corner) != autoencoder.encode(corner * 0)).any(dim=2)
    assert changed.tolist() == [[False, True, False, False]]


def test_all_components_lose_nothing():
    images = torch.rand(300, 3, 4, 6)
    full = LinearAutoencoder.fit(images, patch=2, dim=12, whiten=1.0)
    torch.testing.assert_close(full.decode(full.encode(images)), images)
    spread = full.encode(images).flatten(0, 1).std(dim=0)
    assert (spread - 1).abs().max() < 1e-3


def test_whitening_moves_the_spread_from_natural_to_equal(pictures):
    ratios = []
    for whiten in (0.0, 0.5, 1.0):
        module = LinearAutoencoder.fit(pictures, dim=8, whiten=whiten)
        spread = module.encode(pictures).flatten(0, 1).std(dim=0)
        ratios.append(float(spread[0] / spread[-1]))
    assert ratios[0] > ratios[1] > ratios[2]
    assert abs(ratios[2] - 1) < 1e-3


def assert_close(ours: torch.Tensor, oracle: np.ndarray) -> None:
    """To fp32, which the buffers of an autoencoder are in."""
    expected = torch.from_numpy(oracle).float()
    torch.testing.assert_close(ours.float().reshape(expected.shape), expected)


@pytest.mark.parametrize(("patch", "dim", "tokens"), [(8, 5, 1), (8, 4, 3), (16, 8, 4)])
def test_the_numbers_are_those_of_scikit_learns_pca_in_its_order(pictures, patch, dim, tokens):
    module = LinearAutoencoder.fit(
        pictures, patch, dim, tokens_per_patch=tokens, whiten=0.0
    ).double()
    side = 16 // patch
    patches = einops.rearrange(
        pictures.double().numpy(), "n 1 (h p) (w q) -> (n h w) (p q)", p=patch, q=patch
    )
    oracle = PCA(dim * tokens, svd_solver="full").fit(patches)
    # With their natural spread all numbers have one weight, which makes their mean square 1.
    scale = np.sqrt(oracle.explained_variance_.mean())
    latents = module.encode(pictures.double())
    assert latents.shape == (len(pictures), side * side * tokens, dim)
    assert module.grid == (side, side * tokens)
    expected = oracle.transform(patches) / scale
    assert_close(latents, expected)
    restored = oracle.inverse_transform(expected * scale).clip(0, 1)
    decoded = einops.rearrange(
        module.decode(latents), "n 1 (h p) (w q) -> (n h w) (p q)", p=patch, q=patch
    )
    assert_close(decoded, restored)


@pytest.mark.parametrize(("patch", "tokens", "has_seams"), [(8, 1, True), (16, 4, False)])
def test_one_patch_of_the_whole_picture_has_no_seams(patch, tokens, has_seams):
    """Of waves that no edge of a patch lies in, what is drawn is as smooth at the edges or not."""
    draw = np.random.default_rng(0)
    x = np.arange(16) / 16
    frequency, phase = draw.uniform(0.2, 1, (2, 800, 1, 1)), draw.uniform(0, 6.3, (2, 800, 1, 1))
    waves = 0.5 + 0.2 * np.sin(6.3 * frequency[0] * x + phase[0])
    waves = waves + 0.2 * np.sin(6.3 * frequency[1] * x[:, None] + phase[1])
    pictures = torch.from_numpy(waves).float()[:, None]
    module = LinearAutoencoder.fit(pictures[:400], patch, 2, tokens_per_patch=tokens)
    assert module.tokens * module.dim == 8
    drawn = module.decode(module.encode(pictures[400:]))
    steps = (drawn - pictures[400:]).diff(dim=3).abs().mean(dim=(0, 1, 2))  # between columns
    assert (steps[7] > 2 * steps.median()) == has_seams


def test_state_dict_restores_it_and_nothing_is_trained(autoencoder, pictures):
    again = LinearAutoencoder(1, 16, 16, patch=8, dim=12)
    again.load_state_dict(autoencoder.state_dict())
    assert torch.equal(again.encode(pictures), autoencoder.encode(pictures))
    assert not list(autoencoder.parameters())
    assert set(autoencoder.state_dict()) == {"mean", "components", "weight"}


def test_decoded_pixels_are_in_range(autoencoder):
    drawn = autoencoder.decode(torch.randn(50, 4, 12) * 3)
    assert drawn.min() == 0
    assert drawn.max() == 1
    assert autoencoder.decode(torch.zeros(0, 4, 12)).shape == (0, 1, 16, 16)


def test_bad_shapes_are_refused(autoencoder):
    with pytest.raises(ValueError, match="does not tile"):
        LinearAutoencoder(1, 16, 12, patch=8, dim=4)
    with pytest.raises(ValueError, match="tokens_per_patch is 1 and dim is 65"):
        LinearAutoencoder(1, 16, 16, patch=8, dim=65)
    for tokens in (0, 4):
        with pytest.raises(ValueError, match=f"tokens_per_patch is {tokens} and dim is 17"):
            LinearAutoencoder(1, 16, 16, patch=8, dim=17, tokens_per_patch=tokens)
    with pytest.raises(ValueError, match="3 patches for 5 numbers of each"):
        LinearAutoencoder.fit(torch.rand(3, 1, 8, 8), dim=5)
    with pytest.raises(ValueError, match=r"expected \[N, 1, 16, 16\]"):
        autoencoder.encode(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"expected \[N, 4, 12\]"):
        autoencoder.decode(torch.zeros(2, 4, 16))
