"""BAGEL from its published formulas: one sample at a time, dense masks, plain torch.

Written from what the architecture computes, by the names of the published tensors; it shares no
code with `lvrpo.models.bagel`. A sample is a list of splits:

    ("text", token_ids)             causal
    ("read", pixels [C, H, W])      pixels in [0, 1], through the tower
    ("clean", latents [h, w, c])    time 0
    ("noise", latents [h, w, c], t)

Splits of the last three kinds attend fully within themselves and have a marker before and after.
Every split sees all earlier ones but noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

Split = tuple[Any, ...]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What tensors do not say of themselves."""

    heads: int
    kv_heads: int
    vision_heads: int
    patch: int
    vision_side: int
    latent_side: int
    markers: tuple[int, int]
    theta: float
    eps: float


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """[n, heads, d] each, equal head counts -> [n, heads * d]."""
    out = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head].T / math.sqrt(q.shape[2])
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        out.append(weights @ v[:, head])
    return torch.cat(out, dim=1)


def position_row(row: int, column: int, width: int, dtype: torch.dtype) -> Tensor:
    """Column first, then row; for each the sines of n frequencies, then the cosines."""
    n = width // 4
    numbers = []
    for place in (column, row):
        angles = [place / 10000 ** (i / n) for i in range(n)]
        numbers += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(numbers, dtype=torch.float32).to(dtype)  # the tables are kept in fp32


def time_row(t: float, dim: int, dtype: torch.dtype) -> Tensor:
    angles = [t * 10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
    return torch.tensor([f(a) for f in (math.cos, math.sin) for a in angles], dtype=dtype)


def tower(state: State, shape: Shape, pixels: Tensor) -> Tensor:
    """One picture -> [h * w, hidden of the language model], before positions are added."""
    prefix, p = "vit_model.vision_model.", shape.patch
    _, height, width = pixels.shape
    dtype = state["connector.fc1.weight"].dtype
    patches, places = [], []
    for row in range(height // p):
        for column in range(width // p):
            patch = pixels[:, row * p : row * p + p, column * p : column * p + p].to(dtype) * 2 - 1
            patches.append(patch.permute(1, 2, 0).flatten())
            places.append(row * shape.vision_side + column)

    def affine(x: Tensor, name: str) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, 1e-6)

    x = affine(torch.stack(patches), f"{prefix}embeddings.patch_embedding")
    x = x + state[f"{prefix}embeddings.position_embedding.weight"][places]
    index = 0
    while f"{prefix}encoder.layers.{index}.layer_norm1.weight" in state:
        layer = f"{prefix}encoder.layers.{index}."
        normed = norm(x, f"{layer}layer_norm1")
        q, k, v = (
            affine(normed, f"{layer}self_attn.{name}_proj").view(len(x), shape.vision_heads, -1)
            for name in "qkv"
        )
        everything = torch.ones(len(x), len(x), dtype=torch.bool)
        x = x + affine(attend(q, k, v, everything), f"{layer}self_attn.out_proj")
        inner = gelu_tanh(affine(norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1"))
        x = x + affine(inner, f"{layer}mlp.fc2")
        index += 1
    x = norm(x, f"{prefix}post_layernorm")
    return affine(gelu_tanh(affine(x, "connector.fc1")), "connector.fc2")


def embed(state: State, shape: Shape, split: Split) -> tuple[Tensor, list[str]]:
    """[rows, hidden] of one split, and what each row is."""
    table = state["language_model.model.embed_tokens.weight"]
    if split[0] == "text":
        return table[list(split[1])], ["text"] * len(split[1])
    width, dtype = table.shape[1], table.dtype
    if split[0] == "read":
        x = tower(state, shape, split[1])
        columns, kind = split[1].shape[2] // shape.patch, "patch"
    else:
        latents = split[1]
        columns, kind = latents.shape[1], "latent"
        t = split[2] if split[0] == "noise" else 0.0
        time = time_row(t, state["time_embedder.mlp.0.weight"].shape[1], dtype)
        for step in (0, 2):
            weight, bias = (state[f"time_embedder.mlp.{step}.{n}"] for n in ("weight", "bias"))
            time = linear(time if step == 0 else silu(time), weight, bias)
        flat = latents.flatten(0, 1).to(dtype)
        x = linear(flat, state["vae2llm.weight"], state["vae2llm.bias"]) + time
    place = [position_row(i // columns, i % columns, width, dtype) for i in range(len(x))]
    x = x + torch.stack(place)
    opening, closing = (table[[marker]] for marker in shape.markers)
    return torch.cat([opening, x, closing]), ["text", *[kind] * len(x), "text"]


def visible_rows(splits: list[Split], lengths: list[int]) -> Tensor:
    total = sum(lengths)
    visible = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for split, length in zip(splits, lengths, strict=True):
        own = torch.ones(length, length, dtype=torch.bool)
        visible[start : start + length, start : start + length] = (
            own.tril() if split[0] == "text" else own
        )
        before = 0
        for other, other_length in zip(splits, lengths, strict=True):
            if before >= start:
                break
            visible[start : start + length, before : before + other_length] = other[0] != "noise"
            before += other_length
        start += length
    return visible


def position_ids(splits: list[Split], lengths: list[int]) -> Tensor:
    ids: list[int] = []
    position = 0
    for split, length in zip(splits, lengths, strict=True):
        if split[0] == "text":
            ids += range(position, position + length)
            position += length
        else:
            ids += [position] * length
            position += split[0] != "noise"
    return torch.tensor(ids)


def rope(x: Tensor, ids: Tensor, theta: float) -> Tensor:
    """x [n, heads, d]: number i of the first half turns with number i of the second."""
    half = x.shape[2] // 2
    angle = ids[:, None].to(x.dtype) / theta ** (torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def run(state: State, shape: Shape, splits: list[Split]) -> tuple[Tensor, Tensor]:
    """Logits [n_text, vocabulary] of all text rows, and velocities [n_latent, c]."""
    embedded = [embed(state, shape, split) for split in splits]
    lengths = [len(x) for x, _ in embedded]
    x = torch.cat([x for x, _ in embedded])
    kinds = [kind for _, found in embedded for kind in found]
    is_latent = torch.tensor([kind == "latent" for kind in kinds])[:, None]
    is_text = torch.tensor([kind == "text" for kind in kinds])
    visible, ids = visible_rows(splits, lengths), position_ids(splits, lengths)

    def routed(of_expert: Any) -> Tensor:
        """Both experts on all rows; each row keeps that of its own."""
        return torch.where(
            is_latent.view(-1, *[1] * (of_expert("").dim() - 1)),
            of_expert("_moe_gen"),
            of_expert(""),
        )

    index = 0
    while f"language_model.model.layers.{index}.input_layernorm.weight" in state:
        layer = f"language_model.model.layers.{index}."
        before = x

        def heads(expert: str, name: str, layer: str = layer, x: Tensor = before) -> Tensor:
            normed = rms(x, state[f"{layer}input_layernorm{expert}.weight"], shape.eps)
            module = f"{layer}self_attn.{name}_proj{expert}"
            count = shape.heads if name == "q" else shape.kv_heads
            out = linear(normed, state[f"{module}.weight"], state[f"{module}.bias"])
            out = out.view(len(x), count, -1)
            if name == "v":
                return out
            weight = state[f"{layer}self_attn.{name}_norm{expert}.weight"]
            return rope(rms(out, weight, shape.eps), ids, shape.theta)

        q, k, v = (routed(lambda expert, n=name: heads(expert, n)) for name in "qkv")
        k, v = (y.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for y in (k, v))
        attended = attend(q, k, v, visible)

        def out(expert: str, layer: str = layer, attended: Tensor = attended) -> Tensor:
            return linear(attended, state[f"{layer}self_attn.o_proj{expert}.weight"])

        x = x + routed(out)
        middle = x

        def mlp(expert: str, layer: str = layer, x: Tensor = middle) -> Tensor:
            weight = state[f"{layer}post_attention_layernorm{expert}.weight"]
            normed = rms(x, weight, shape.eps)
            gate, up, down = (
                state[f"{layer}mlp{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            return linear(silu(linear(normed, gate)) * linear(normed, up), down)

        x = x + routed(mlp)
        index += 1
    x = routed(lambda e: rms(x, state[f"language_model.model.norm{e}.weight"], shape.eps))
    logits = linear(x[is_text], state["language_model.lm_head.weight"])
    velocity = linear(x[is_latent[:, 0]], state["llm2vae.weight"], state["llm2vae.bias"])
    return logits, velocity
