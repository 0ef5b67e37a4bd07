from __future__ import annotations

import numpy as np
import pytest
import torch

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
    with pytest.raises(ValueError, match="dim is 65"):
        LinearAutoencoder(1, 16, 16, patch=8, dim=65)
    with pytest.raises(ValueError, match="3 patches for dim 5"):
        LinearAutoencoder.fit(torch.rand(3, 1, 8, 8), dim=5)
    with pytest.raises(ValueError, match=r"expected \[N, 1, 16, 16\]"):
        autoencoder.encode(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"expected \[N, 4, 12\]"):
        autoencoder.decode(torch.zeros(2, 4, 16))
