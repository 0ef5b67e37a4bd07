"""A tiny BAGEL in the layout that the large one is published in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models.bagel.tiny import CONFIG, tiny_bagel
from safetensors.torch import save_file

from lvrpo.models.bagel import AutoencoderConfig, FluxAutoencoder

AUTOENCODER = AutoencoderConfig(width=32, multipliers=(1, 2), blocks=1, latent_channels=2)
LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": CONFIG.hidden,
    "intermediate_size": CONFIG.mlp,
    "num_attention_heads": CONFIG.heads,
    "num_hidden_layers": CONFIG.layers,
    "num_key_value_heads": CONFIG.kv_heads,
    "rms_norm_eps": CONFIG.norm_eps,
    "rope_theta": CONFIG.rope_theta,
    "tie_word_embeddings": True,  # as Qwen's smaller ones have it; BAGEL's are not tied
    "use_sliding_window": False,
    "vocab_size": CONFIG.vocab_size,
}
VIT = {
    "hidden_size": CONFIG.vision_hidden,
    "image_size": CONFIG.vision_grid * CONFIG.image_patch,
    "intermediate_size": CONFIG.vision_mlp,
    "model_type": "siglip_vision_model",
    "num_attention_heads": CONFIG.vision_heads,
    "num_hidden_layers": CONFIG.vision_layers + 1,
    "patch_size": CONFIG.image_patch,
}


def tiny_autoencoder(dtype: torch.dtype = torch.float32) -> FluxAutoencoder:
    torch.manual_seed(1)
    autoencoder = FluxAutoencoder(AUTOENCODER).to(dtype)
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return autoencoder


def write_folder(folder: Path, shards: int = 1, vocab_size: int = CONFIG.vocab_size) -> None:
    """Weights in bf16, a table and the autoencoder in fp32; `shards` files and an index if > 1."""
    folder.mkdir(parents=True)
    made = tiny_bagel(vocab_size=vocab_size).state_dict()
    state = {name: x.bfloat16() for name, x in made.items()}
    table = "latent_pos_embed.pos_embed"
    state[table] = made[table].float()
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / "ema.safetensors", {"format": "pt"})
    else:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        for file in files:
            part = {name: state[name] for name in names if weight_map[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    save_file(tiny_autoencoder().state_dict(), folder / "ae.safetensors")
    write_json(folder / "llm_config.json", LLM | {"vocab_size": vocab_size})
    write_json(folder / "vit_config.json", VIT)
    # Published with a comma that JSON does not have.
    (folder / "config.json").write_text('{\n  "name": [\n    "BAGEL-7B-MoT"\n  ],\n}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n")
