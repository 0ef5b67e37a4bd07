"""The tiny model's shape as the oracle takes it."""

from __future__ import annotations

from models.bagel import oracle
from models.bagel.tiny import CONFIG, MARKERS

SHAPE = oracle.Shape(
    heads=CONFIG.heads,
    kv_heads=CONFIG.kv_heads,
    vision_heads=CONFIG.vision_heads,
    patch=CONFIG.image_patch,
    vision_side=CONFIG.vision_grid,
    latent_side=CONFIG.latent_grid,
    markers=MARKERS,
    theta=CONFIG.rope_theta,
    eps=CONFIG.norm_eps,
)
