"""Tiny models of the families of transformers that lvrpo is held to, with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="pip install 'lvrpo[transformers]'")

VOCABULARY, IMAGE = 64, 60
#: Shorter than the sequences.
WINDOW = 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
#: 2 x 2 places of 16 x 16 pixels.
EFFICIENTNET = {
    "width_coefficient": 0.025,
    "depth_coefficient": 1.0,
    "in_channels": (32, 16),
    "out_channels": (16, 24),
    "kernel_sizes": (3, 5),
    "strides": (2, 2),
    "num_block_repeats": (1, 2),
    "expand_ratios": (1, 6),
    "hidden_dim": 32,
    "hidden_size": 32,
}
QWEN_TOWER = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
#: Rows and columns of patches of an image of the Qwen towers.
GRID = (1, 4, 8)
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family, and how its model is told of an image.

    Attributes:
        config: of a tiny model.
        image_tokens: of one image; 0: the model reads text alone.
        images: keyword arguments for so many images.
        types: keyword arguments for [B, L] tokens, of which some are a completion.
        image_mode: how the tokens of an image see each other.
        prefix: whether all of a prompt sees all of it.
        mrope: whether positions have three directions.
    """

    config: Callable[[], Any]
    image_tokens: int = 0
    images: Callable[[int], dict[str, Tensor]] = lambda count: {}
    types: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda ids, completion: {}
    image_mode: str = "causal"
    prefix: bool = False
    mrope: bool = False

    def model(self) -> Any:
        """With weights that are not as they begin: biases of 0 would show nothing."""
        config = self.config()
        kind = (
            transformers.AutoModelForImageTextToText
            if self.image_tokens
            else transformers.AutoModelForCausalLM
        )
        model = kind.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return model.eval()


def pixels(count: int) -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(7)).repeat(
        count, 1, 1, 1
    )


def patches(count: int) -> dict[str, Tensor]:
    frames, rows, columns = GRID
    flat = torch.randn(
        frames * rows * columns, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(7)
    )
    return {
        "pixel_values": flat.repeat(count, 1),
        "image_grid_thw": torch.tensor([GRID] * count),
    }


def tiles(count: int) -> dict[str, Tensor]:
    """One image each, whose last column of patches is padding."""
    is_pixel = torch.ones(count, 1, 16, 16, dtype=torch.bool)
    is_pixel[..., 12:] = False
    return {"pixel_values": pixels(count)[:, None], "pixel_attention_mask": is_pixel}


def text(**options: Any) -> dict[str, Any]:
    return {**SIZES, **options}


def is_image(ids: Tensor, completion: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def deepseek() -> Any:
    return transformers.DeepseekV3Config(
        **text(num_key_value_heads=4),
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
    )


def gemma2(**options: Any) -> dict[str, Any]:
    return text(head_dim=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=5, **options)


def qwen(kind: str, tower: dict[str, Any], **options: Any) -> Family:
    def config() -> Any:
        return getattr(transformers, f"{kind}Config")(
            text_config=text(rope_parameters=ROPE, **options),
            vision_config={**QWEN_TOWER, **tower},
            image_token_id=IMAGE,
        )

    def types(ids: Tensor, completion: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long()}

    return Family(config, GRID[1] * GRID[2] // 4, patches, types, mrope=True)


def idefics(kind: str) -> Family:
    def config() -> Any:
        return getattr(transformers, f"{kind}Config")(
            text_config={"model_type": "llama", **text()},
            vision_config=SIGLIP,
            image_token_id=IMAGE,
            scale_factor=2,
        )

    return Family(config, 4, tiles)


TEXT = {
    "llama": Family(lambda: transformers.LlamaConfig(**text())),
    "qwen2": Family(lambda: transformers.Qwen2Config(**text())),
    "qwen3": Family(lambda: transformers.Qwen3Config(**text(head_dim=24))),
    "mistral": Family(lambda: transformers.MistralConfig(**text(sliding_window=WINDOW))),
    "smollm3": Family(lambda: transformers.SmolLM3Config(**text())),
    "deepseek_v3": Family(deepseek),
    "gemma2": Family(lambda: transformers.Gemma2Config(**gemma2(sliding_window=WINDOW))),
    "gemma3_text": Family(
        lambda: transformers.Gemma3TextConfig(**text(head_dim=8, sliding_window=WINDOW))
    ),
    "gpt_oss": Family(
        lambda: transformers.GptOssConfig(
            **text(head_dim=8, sliding_window=WINDOW),
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
}
IMAGES = {
    "qwen2_vl": qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": qwen(
        "Qwen2_5_VL",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
    ),
    "qwen3_vl": qwen(
        "Qwen3VL",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        head_dim=8,
    ),
    "llava": Family(
        lambda: transformers.LlavaConfig(
            text_config={"model_type": "llama", **text()},
            vision_config={"model_type": "clip_vision_model", **SIGLIP},
            image_token_index=IMAGE,
        ),
        16,
        lambda count: {"pixel_values": pixels(count)},
    ),
    "fast_vlm": Family(
        lambda: transformers.FastVlmConfig(
            text_config={"model_type": "llama", **text()},
            vision_config={"model_type": "efficientnet", **EFFICIENTNET},
            image_token_index=IMAGE,
        ),
        4,
        lambda count: {"pixel_values": pixels(count)},
    ),
    "idefics3": idefics("Idefics3"),
    "smolvlm": idefics("SmolVLM"),
    "gemma3": Family(
        lambda: transformers.Gemma3Config(
            text_config=text(head_dim=8, sliding_window=WINDOW),
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
        ),
        4,
        lambda count: {"pixel_values": pixels(count)},
        is_image,
        image_mode="full",
    ),
    "paligemma": Family(
        lambda: transformers.PaliGemmaConfig(
            # No shorter than a prompt, which sees itself whole.
            text_config={"model_type": "gemma2", **gemma2(sliding_window=24)},
            vision_config=SIGLIP,
            projection_dim=32,
            image_token_index=IMAGE,
        ),
        16,
        lambda count: {"pixel_values": pixels(count)},
        lambda ids, completion: {"token_type_ids": completion.long()},
        image_mode="full",
        prefix=True,
    ),
}
FAMILIES = {**TEXT, **IMAGES}
