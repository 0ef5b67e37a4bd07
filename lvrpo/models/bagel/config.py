"""The sizes of a BAGEL model, and how the published configuration files say them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


@dataclass(frozen=True)
class BagelConfig:
    """Shape of a `Bagel`; the defaults are those of BAGEL-7B-MoT."""

    # The language model, Qwen2.5.
    vocab_size: int = 152064
    hidden: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    mlp: int = 18944
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    # The vision tower, SigLIP so400m.
    vision_hidden: int = 1152
    vision_layers: int = 26
    vision_heads: int = 16
    vision_mlp: int = 4304
    vision_norm_eps: float = 1e-6
    image_channels: int = 3
    image_patch: int = 14  # pixels along a side of a patch
    vision_grid: int = 70  # most patches along a side of a picture
    # What is drawn: latents of an autoencoder, in square patches.
    latent_channels: int = 16
    latent_patch: int = 2
    latent_grid: int = 64  # most latent patches along a side of a picture
    timestep_dim: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(
                    f"BagelConfig: {field.name} is {getattr(self, field.name)}, expected above 0"
                )
        for name, divisor, why in (
            ("heads", self.kv_heads, "key heads serve equally many query heads"),
            ("vision_hidden", self.vision_heads, "the tower's heads share its width"),
            ("head_dim", 2, "RoPE turns pairs"),
            ("hidden", 4, "a position table has a sine and a cosine of row and column"),
            ("timestep_dim", 2, "a time has sines and cosines"),
        ):
            if getattr(self, name) % divisor:
                raise ValueError(
                    f"BagelConfig: {name} is {getattr(self, name)}, expected a multiple of "
                    f"{divisor}: {why}"
                )

    @property
    def latent_dim(self) -> int:
        """Numbers of a latent token."""
        return self.latent_channels * self.latent_patch**2

    @classmethod
    def from_published(
        cls,
        llm: Mapping[str, Any],
        vit: Mapping[str, Any],
        shapes: Shapes,
    ) -> BagelConfig:
        """The configuration of a published folder.

        Neither file says how large the position tables and the time embedding are; their tensors
        do. The tower is published without the last of the layers that `vit_config.json` counts.

        Args:
            llm: `llm_config.json`.
            vit: `vit_config.json`.
            shapes: of the published tensors, by name.

        Raises:
            ValueError: a file lacks a size, or asks for what this model does not compute; a tensor
                that says a size is missing.
        """
        for file, values, expected in (
            ("llm_config.json", llm, _COMPUTED_LLM),
            ("vit_config.json", vit, _COMPUTED_VIT),
        ):
            for key, value in expected.items():
                if values.get(key, value) != value:
                    raise ValueError(
                        f"{file} has {key} = {values[key]!r}, expected {value!r}, as every BAGEL"
                    )
        latent_patch = cls.latent_patch
        try:
            heads = llm["num_attention_heads"]
            return cls(
                vocab_size=llm["vocab_size"],
                hidden=llm["hidden_size"],
                layers=llm["num_hidden_layers"],
                heads=heads,
                kv_heads=llm["num_key_value_heads"],
                head_dim=llm.get("head_dim") or llm["hidden_size"] // heads,
                mlp=llm["intermediate_size"],
                rope_theta=llm["rope_theta"],
                norm_eps=llm["rms_norm_eps"],
                vision_hidden=vit["hidden_size"],
                vision_layers=vit["num_hidden_layers"] - 1,
                vision_heads=vit["num_attention_heads"],
                vision_mlp=vit["intermediate_size"],
                vision_norm_eps=vit.get("layer_norm_eps", cls.vision_norm_eps),
                image_channels=vit.get("num_channels", cls.image_channels),
                image_patch=vit["patch_size"],
                vision_grid=_side(shapes["vit_pos_embed.pos_embed"][0]),
                latent_channels=shapes["llm2vae.bias"][0] // latent_patch**2,
                latent_grid=_side(shapes["latent_pos_embed.pos_embed"][0]),
                timestep_dim=shapes["time_embedder.mlp.0.weight"][1],
            )
        except KeyError as missing:
            raise ValueError(
                f"{missing.args[0]} is missing: expected a key of llm_config.json or "
                "vit_config.json, or a tensor, of a published BAGEL folder"
            ) from None


#: Values that the files may leave out, or have, and that no BAGEL differs in. The published code
#: sets `tie_word_embeddings` to false whatever the file, a copy of Qwen2.5's, says.
_COMPUTED_LLM = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "use_sliding_window": False,
    "qk_norm": True,
    "layer_module": "Qwen2MoTDecoderLayer",
}
_COMPUTED_VIT = {"hidden_act": "gelu_pytorch_tanh", "rope": False}


def _side(positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"a position table has {positions} rows, expected those of a square grid")
    return side
