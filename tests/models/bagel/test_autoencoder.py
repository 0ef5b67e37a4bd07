"""FLUX's autoencoder against its formulas, picture by picture."""

from __future__ import annotations

import math

import pytest
import torch
from models.bagel import autoencoder_oracle as oracle
from models.bagel.folder import AUTOENCODER, tiny_autoencoder

from lvrpo.models.bagel import AutoencoderConfig, FluxAutoencoder

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


def assert_near(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < BOUNDS[ours.dtype] * theirs.abs().max()


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def autoencoder(request):
    return tiny_autoencoder(request.param)


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (12, 4)])
def test_pictures_become_the_oracles_latents(autoencoder, size):
    dtype = autoencoder.encoder.conv_in.weight.dtype
    images = torch.rand(2, 3, *size, dtype=dtype)
    noise = torch.randn(2, 2, size[0] // 2, size[1] // 2, dtype=dtype)
    mean_tokens, sampled = autoencoder.encode(images), autoencoder.encode(images, noise)
    for i, pixels in enumerate(images):
        mean, deviation = oracle.encode(autoencoder.state_dict(), pixels)
        for ours, z in ((mean_tokens, mean), (sampled, mean + deviation * noise[i])):
            assert_near(ours[i], oracle.tokens(oracle.SCALE * (z - oracle.SHIFT)))


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 1)])
def test_latents_become_the_oracles_pictures(autoencoder, grid):
    dtype = autoencoder.encoder.conv_in.weight.dtype
    latents = torch.randn(2, 2, 2 * grid[0], 2 * grid[1], dtype=dtype)
    pictures = autoencoder.decode(torch.stack([oracle.tokens(z) for z in latents]), grid)
    for ours, z in zip(pictures, latents, strict=True):
        assert_near(ours, oracle.decode(autoencoder.state_dict(), z))


def test_the_default_is_the_published_one():
    """FLUX.1's `ae.safetensors` has 83,819,683 values in 244 tensors."""
    with torch.device("meta"):
        state = FluxAutoencoder(AutoencoderConfig()).state_dict()
    assert sum(math.prod(x.shape) for x in state.values()) == 83_819_683
    assert len(state) == 244
    assert AutoencoderConfig().token == 16
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert AutoencoderConfig.from_published(shapes) == AutoencoderConfig()
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.0.block.2.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["encoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.encode(torch.rand(1, 3, 6, 4)), r"\(1, 3, 6, 4\), expected \[N, 3, H, W\]"),
        (lambda a: a.encode(torch.rand(1, 1, 4, 4)), "expected \\[N, 3, H, W\\]"),
        (lambda a: a.decode(torch.rand(1, 4, 8), (1, 3)), r"expected \[N, 3, 8\]"),
        (lambda a: AUTOENCODER.from_published({}), "has no tensor like"),
    ],
)
def test_bad_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_autoencoder())
