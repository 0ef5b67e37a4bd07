"""FLUX's autoencoder from its formulas, one picture at a time, by the names of its tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

State = dict[str, Tensor]
SCALE, SHIFT = 0.3611, 0.1159


def conv(state: State, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return conv2d(x[None], weight, bias, stride=stride, padding=padding)[0]


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def group_norm(state: State, name: str, x: Tensor) -> Tensor:
    groups = x.view(32, -1)
    centred = groups - groups.mean(1, keepdim=True)
    normed = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    weight, bias = (state[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
    return normed.view_as(x) * weight + bias


def residual(state: State, name: str, x: Tensor) -> Tensor:
    inner = conv(state, f"{name}.conv1", swish(group_norm(state, f"{name}.norm1", x)), padding=1)
    inner = conv(
        state, f"{name}.conv2", swish(group_norm(state, f"{name}.norm2", inner)), padding=1
    )
    if f"{name}.nin_shortcut.weight" in state:
        x = conv(state, f"{name}.nin_shortcut", x)
    return x + inner


def middle(state: State, name: str, x: Tensor) -> Tensor:
    x = residual(state, f"{name}.block_1", x)
    normed = group_norm(state, f"{name}.attn_1.norm", x)
    q, k, v = (conv(state, f"{name}.attn_1.{part}", normed).flatten(1).T for part in "qkv")
    attended = (q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v
    x = x + conv(state, f"{name}.attn_1.proj_out", attended.T.reshape(x.shape))
    return residual(state, f"{name}.block_2", x)


def count(state: State, pattern: str) -> int:
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def head(state: State, name: str, x: Tensor) -> Tensor:
    return conv(
        state, f"{name}.conv_out", swish(group_norm(state, f"{name}.norm_out", x)), padding=1
    )


def encode(state: State, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """[C, H, W] in [0, 1] -> mean and deviation of [c, h, w] latents, before scale and shift."""
    x = conv(state, "encoder.conv_in", pixels * 2 - 1, padding=1)
    for level in range(count(state, "encoder.down.{}.block.0.conv1.weight")):
        name = f"encoder.down.{level}"
        for block in range(count(state, name + ".block.{}.conv1.weight")):
            x = residual(state, f"{name}.block.{block}", x)
        if f"{name}.downsample.conv.weight" in state:
            channels, height, width = x.shape
            padded = x.new_zeros(channels, height + 1, width + 1)
            padded[:, :height, :width] = x
            x = conv(state, f"{name}.downsample.conv", padded, stride=2)
    x = head(state, "encoder", middle(state, "encoder.mid", x))
    mean, log_variance = x[: len(x) // 2], x[len(x) // 2 :]
    return mean, torch.exp(log_variance / 2)


def decode(state: State, latents: Tensor) -> Tensor:
    """[c, h, w] -> [C, H, W] in [0, 1]."""
    x = conv(state, "decoder.conv_in", latents / SCALE + SHIFT, padding=1)
    x = middle(state, "decoder.mid", x)
    for level in reversed(range(count(state, "decoder.up.{}.block.0.conv1.weight"))):
        name = f"decoder.up.{level}"
        for block in range(count(state, name + ".block.{}.conv1.weight")):
            x = residual(state, f"{name}.block.{block}", x)
        if f"{name}.upsample.conv.weight" in state:
            larger = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            x = conv(state, f"{name}.upsample.conv", larger, padding=1)
    return ((head(state, "decoder", x) + 1) / 2).clamp(0, 1)


def tokens(latents: Tensor, patch: int = 2) -> Tensor:
    """[c, h, w] -> [h * w / patch ** 2, numbers], row by row; channels are innermost."""
    _, height, width = latents.shape
    return torch.stack(
        [
            latents[:, i : i + patch, j : j + patch].permute(1, 2, 0).flatten()
            for i in range(0, height, patch)
            for j in range(0, width, patch)
        ]
    )
