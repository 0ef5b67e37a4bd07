"""Small models of every part, and a packed buffer of every kind of row."""

from __future__ import annotations

import numpy as np
import torch

from lvrpo.models.bagel.config import BagelConfig
from lvrpo.models.bagel.model import Bagel
from lvrpo.models.bagel.shape import transformer as bagel_transformer
from lvrpo.models.transformer import Transformer
from lvrpo.models.unified.layout import PackBuilder
from lvrpo.models.unified.model import PackedBatch, UnifiedConfig, UnifiedModel
from lvrpo.models.unified.shape import transformer
from lvrpo.planning.rows import Rows, visible_pairs

WIDE = UnifiedConfig(
    vocab_size=61, hidden=48, layers=3, heads=6, kv_heads=2, head_dim=16, mlp=80, latent_dim=5
)
TOWER = UnifiedConfig(
    vocab_size=37,
    hidden=40,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=72,
    vision_layers=3,
    vision_hidden=24,
    vision_heads=2,
    vision_mlp=56,
    image_channels=3,
)
BAGEL = BagelConfig(
    vocab_size=53,
    hidden=48,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=16,
    mlp=88,
    vision_hidden=32,
    vision_layers=2,
    vision_heads=4,
    vision_mlp=72,
    image_patch=4,
    vision_grid=8,
    latent_channels=3,
    latent_grid=8,
    timestep_dim=24,
)
Config = UnifiedConfig | BagelConfig
UNIFIED = {"wide": WIDE, "tower": TOWER}
CONFIGS: dict[str, Config] = UNIFIED | {"bagel": BAGEL}


def model_of(config: Config, dtype: torch.dtype = torch.float32) -> UnifiedModel | Bagel:
    torch.manual_seed(0)
    return (Bagel(config) if isinstance(config, BagelConfig) else UnifiedModel(config)).to(dtype)


def shape_of(config: Config) -> Transformer:
    if isinstance(config, BagelConfig):
        return bagel_transformer(config)
    return transformer(config)


def buffer_of(config: Config, scale: int = 1) -> tuple[PackedBatch, Rows]:
    """Questions about pictures with answers, and drawings; and what was laid out."""
    builder = PackBuilder(config)
    size = config.image_patch * 4
    for _ in range(scale):
        picture = builder.picture(np.zeros((config.image_channels, size, size)), 1, 2)
        question = builder.text(range(9), picture)
        for length in (7, 3, 5):
            builder.text(range(length), question)
        prompt = builder.text(range(6))
        for _ in range(4):
            builder.noise(2, 5, prompt)
    count = 40 * scale
    batch = builder.build(torch.zeros(count, config.latent_dim), torch.zeros(count))
    return batch, Rows(
        text=scale * (2 + 9 + 15 + 6),
        patches=scale * 16,
        latents=count,
        pairs=visible_pairs(batch.mask),
        patch_pairs=scale * 16**2,
    )
