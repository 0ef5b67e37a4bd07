"""Names and shapes of the tensors in BAGEL-7B-MoT's `ema.safetensors`.

The names are those that converters of the published file list (MindSpeed MM's `BagelConverter`: 28
layers, 26 of the tower); the sizes are those of the published `llm_config.json` (Qwen2.5-7B) and
`vit_config.json` (SigLIP so400m/14 at 980 pixels), of grids of 64 and 70, and of 16 channels in 2x2
patches.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, inner: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inner)} | ({f"{name}.bias": (out,)} if bias else {})


def language_layer(prefix: str, expert: str) -> Shapes:
    shapes: Shapes = {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{prefix}{name}{expert}.weight"] = (3584,)
    for name, out in (("q", 3584), ("k", 512), ("v", 512)):
        shapes |= linear(f"{prefix}self_attn.{name}_proj{expert}", out, 3584)
    shapes |= linear(f"{prefix}self_attn.o_proj{expert}", 3584, 3584, bias=False)
    for name in ("q", "k"):
        shapes[f"{prefix}self_attn.{name}_norm{expert}.weight"] = (128,)
    for name, out, inner in (("gate", 18944, 3584), ("up", 18944, 3584), ("down", 3584, 18944)):
        shapes |= linear(f"{prefix}mlp{expert}.{name}_proj", out, inner, bias=False)
    return shapes


def tower_layer(prefix: str) -> Shapes:
    shapes: Shapes = {}
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{prefix}{name}.{kind}": (1152,) for kind in ("weight", "bias")}
    for name in ("q", "k", "v", "out"):
        shapes |= linear(f"{prefix}self_attn.{name}_proj", 1152, 1152)
    return shapes | linear(f"{prefix}mlp.fc1", 4304, 1152) | linear(f"{prefix}mlp.fc2", 1152, 4304)


def bagel_7b() -> Shapes:
    tower = "vit_model.vision_model."
    shapes: Shapes = {
        "language_model.model.embed_tokens.weight": (152064, 3584),
        "language_model.lm_head.weight": (152064, 3584),
        "language_model.model.norm.weight": (3584,),
        "language_model.model.norm_moe_gen.weight": (3584,),
        "latent_pos_embed.pos_embed": (64 * 64, 3584),
        "vit_pos_embed.pos_embed": (70 * 70, 3584),
        f"{tower}embeddings.position_embedding.weight": (70 * 70, 1152),
        f"{tower}post_layernorm.weight": (1152,),
        f"{tower}post_layernorm.bias": (1152,),
    }
    shapes |= linear("time_embedder.mlp.0", 3584, 256) | linear("time_embedder.mlp.2", 3584, 3584)
    shapes |= linear("vae2llm", 3584, 64) | linear("llm2vae", 64, 3584)
    shapes |= linear("connector.fc1", 3584, 1152) | linear("connector.fc2", 3584, 3584)
    shapes |= linear(f"{tower}embeddings.patch_embedding", 1152, 14 * 14 * 3)
    for i in range(28):
        for expert in ("", "_moe_gen"):
            shapes |= language_layer(f"language_model.model.layers.{i}.", expert)
    for i in range(26):
        shapes |= tower_layer(f"{tower}encoder.layers.{i}.")
    return shapes
