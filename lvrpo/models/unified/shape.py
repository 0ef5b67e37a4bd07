"""The unified model as the numbers that a plan takes."""

from __future__ import annotations

from lvrpo.models.transformer import Stack, Transformer
from lvrpo.models.unified.model import UnifiedConfig


def transformer(config: UnifiedConfig, answers: int | None = None) -> Transformer:
    """What a `UnifiedModel` of this configuration is made of.

    Args:
        config: of the model.
        answers: tokens of the vocabulary that answers are sampled from; None: all.
    """
    width, vision_width = config.hidden, config.vision_hidden
    heads = config.vision_heads
    sizes = heads, heads, vision_width // heads, config.vision_mlp
    return Transformer(
        language=Stack(
            config.layers,
            width,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.mlp,
            joint=True,
        ),
        vocab=config.vocab_size,
        answers=config.vocab_size if answers is None else answers,
        patch=config.image_channels * config.image_patch**2,
        vision=Stack(config.vision_layers, vision_width, *sizes, joint=True),
        connector=(vision_width, max(vision_width, width), width),
        latent=config.latent_dim,
        timestep=config.timestep_dim,
    )
