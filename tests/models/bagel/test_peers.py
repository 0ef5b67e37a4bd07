"""The parts of BAGEL that transformers has, against transformers, and its table of tensors."""

from __future__ import annotations

import math

import pytest
import torch
from models.bagel.published import bagel_7b
from models.bagel.tiny import CONFIG, builder, tiny_bagel

from lvrpo.models.bagel import Bagel, BagelConfig
from lvrpo.models.unified.model import picture_mask


def test_names_shapes_and_count_are_those_of_the_published_7b():
    with torch.device("meta"):
        model = Bagel(BagelConfig())
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == bagel_7b()
    # 29.2 GB in bf16; 14.69 billion together with the autoencoder.
    assert sum(math.prod(shape) for shape in ours.values()) == 14_607_260_128


def test_the_tower_is_siglip():
    transformers = pytest.importorskip("transformers")
    side = CONFIG.vision_grid
    config = transformers.SiglipVisionConfig(
        hidden_size=CONFIG.vision_hidden,
        intermediate_size=CONFIG.vision_mlp,
        num_hidden_layers=CONFIG.vision_layers,
        num_attention_heads=CONFIG.vision_heads,
        image_size=side * CONFIG.image_patch,
        patch_size=CONFIG.image_patch,
        vision_use_head=False,
        attn_implementation="sdpa",  # its eager attention has an fp32 softmax
    )
    peer = transformers.SiglipVisionModel(config).double().eval()
    tower = tiny_bagel().vit_model["vision_model"]
    state = tower.state_dict()
    patch = CONFIG.image_patch
    flat = state["embeddings.patch_embedding.weight"]
    state["embeddings.patch_embedding.weight"] = flat.view(-1, patch, patch, 3).permute(0, 3, 1, 2)
    names = set(peer.state_dict())
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    peer.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=False)
    assert names - {prefix + name for name in state} <= {f"{prefix}embeddings.position_ids"}

    pixels = torch.randint(0, 257, (2, 3, side * patch, side * patch)) / 256
    into = builder()
    for picture in pixels:
        into.read(picture.numpy())
    batch = into.build()
    seen = tower(batch.patches, batch.patch_grid, picture_mask(batch.patch_grid), "torch")
    expected = peer(pixel_values=2 * pixels.double() - 1).last_hidden_state
    expected = expected.flatten(0, 1)
    assert (seen - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("expert", ["", "_moe_gen"])
def test_an_expert_is_qwen(expert):
    """Qwen3 with biases is Qwen2.5 with the norms of queries and keys that BAGEL adds."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden,
        intermediate_size=CONFIG.mlp,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        num_key_value_heads=CONFIG.kv_heads,
        head_dim=CONFIG.head_dim,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        attention_bias=True,
        attn_implementation="sdpa",  # its eager attention has an fp32 softmax
    )
    peer = transformers.Qwen3ForCausalLM(config).double().eval()
    model = tiny_bagel()
    state = model.language_model.state_dict()
    own = {
        name: state[swapped(name, expert)]
        for name in peer.state_dict()
        if "o_proj.bias" not in name
    }
    missing, extra = peer.load_state_dict(own, strict=False)
    assert all("o_proj.bias" in name for name in missing)
    assert not extra
    with torch.no_grad():
        for name in missing:
            peer.get_parameter(name).zero_()

    # Both experts have one expert's weights: whatever a row is, it goes through these.
    same = {name: state[swapped(name.replace("_moe_gen", ""), expert)] for name in state}
    model.language_model.load_state_dict(same)
    tokens = torch.randint(7, CONFIG.vocab_size, (9,))
    into = builder()
    into.text(tokens.tolist())
    logits = model.logits(model(into.build(), backend="torch")[0])
    expected = peer(input_ids=tokens[None]).logits[0]
    # transformers forms the angles of RoPE in fp32.
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max()


def swapped(name: str, expert: str) -> str:
    """The published name of a tensor of Qwen's in one expert; both share embedding and head."""
    if "embed_tokens" in name or "lm_head" in name:
        return name
    for module in ("_proj", "_norm", "layernorm", "mlp", "model.norm"):
        if module == "_proj" and ".mlp." in name:
            continue
        at = name.find(f"{module}.")
        if at >= 0:
            end = at + len(module)
            return name[:end] + expert + name[end:]
    raise AssertionError(name)
