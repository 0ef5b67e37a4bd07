"""A BAGEL of a few thousand parameters, with random weights that hide nothing."""

from __future__ import annotations

import dataclasses

import torch

from lvrpo.models.bagel import Bagel, BagelBuilder, BagelConfig

MARKERS = (5, 6)
CONFIG = BagelConfig(
    vocab_size=48,
    hidden=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=24,
    rope_theta=1e4,
    vision_hidden=12,
    vision_layers=2,
    vision_heads=2,
    vision_mlp=20,
    image_patch=4,
    vision_grid=7,
    latent_channels=2,
    latent_grid=5,
    timestep_dim=6,
)


def tiny_bagel(
    dtype: torch.dtype = torch.float64, seed: int = 0, vocab_size: int = CONFIG.vocab_size
) -> Bagel:
    torch.manual_seed(seed)
    model = Bagel(dataclasses.replace(CONFIG, vocab_size=vocab_size)).to(dtype)
    for name, parameter in model.named_parameters():
        shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean=shift, std=0.3)
    return model


def builder() -> BagelBuilder:
    return BagelBuilder(CONFIG, markers=MARKERS)
