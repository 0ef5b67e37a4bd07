"""BAGEL as the numbers that a plan takes."""

from __future__ import annotations

from lvrpo.models.bagel.config import BagelConfig
from lvrpo.models.transformer import Stack, Transformer

#: BAGEL on Qwen2.5 of three sizes. Published is 7b alone; the others are what its recipe makes.
PRESETS = {
    "bagel-1.5b": BagelConfig(vocab_size=151936, hidden=1536, heads=12, kv_heads=2, mlp=8960),
    "bagel-7b": BagelConfig(),
    "bagel-72b": BagelConfig(layers=80, hidden=8192, heads=64, kv_heads=8, mlp=29568),
}


def transformer(config: BagelConfig, answers: int | None = None) -> Transformer:
    """What a `Bagel` of this configuration is made of.

    Args:
        config: of the model.
        answers: tokens of the vocabulary that answers are sampled from; None: all.
    """
    heads, width = config.vision_heads, config.vision_hidden
    return Transformer(
        language=Stack(
            config.layers,
            config.hidden,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.mlp,
        ),
        vocab=config.vocab_size,
        answers=config.vocab_size if answers is None else answers,
        patch=config.image_channels * config.image_patch**2,
        vision=Stack(
            config.vision_layers,
            width,
            heads,
            heads,
            width // heads,
            config.vision_mlp,
            gated=False,
            qk_norms=False,
            layer_norms=True,
        ),
        connector=(width, config.hidden, config.hidden),
        latent=config.latent_dim,
        timestep=config.timestep_dim,
        keeps_noise=False,
    )
