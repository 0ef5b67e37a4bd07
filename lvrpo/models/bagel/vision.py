"""BAGEL's vision tower: SigLIP over the patches of many pictures, each of its own size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lvrpo.masks import SpanMask
from lvrpo.models.bagel.config import BagelConfig
from lvrpo.models.bagel.embeddings import grid_index
from lvrpo.ops.packed_attention import packed_attention


class SelfAttention(nn.Module):
    """Attention among the patches that a mask lets see each other; every projection has a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor, mask: SpanMask, backend: str | None) -> Tensor:
        """[n, width] -> [n, width]."""
        query, key, value = (
            projection(x).unflatten(1, (self.heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = packed_attention(query, key, value, mask, backend=backend)
        return self.out_proj(attended.flatten(1))  # type: ignore[no-any-return]


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))), gelu by its tanh approximation."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, out]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class TowerLayer(nn.Module):
    """Attention and MLP, each behind a layer norm."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width, eps = config.vision_hidden, config.vision_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = SelfAttention(width, config.vision_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = GeluMLP(width, config.vision_mlp, width)

    def forward(self, x: Tensor, mask: SpanMask, backend: str | None) -> Tensor:
        """[n, width] -> [n, width]."""
        x = x + self.self_attn(self.layer_norm1(x), mask, backend)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class VisionTower(nn.Module):
    """Features of patches; modules are named as in the published tensors."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.side = config.vision_grid
        pixels = config.image_channels * config.image_patch**2
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(pixels, config.vision_hidden),
                "position_embedding": nn.Embedding(self.side**2, config.vision_hidden),
            }
        )
        layers = nn.ModuleList(TowerLayer(config) for _ in range(config.vision_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.vision_hidden, eps=config.vision_norm_eps)

    def forward(
        self, patches: Tensor, grid: Tensor, mask: SpanMask, backend: str | None = None
    ) -> Tensor:
        """Features of all patches.

        Args:
            patches: [n, patch * patch * channels] pixels in [-1, 1], channels last.
            grid: [n, 2] int64, (row, column) of each in its picture.
            mask: patches of one picture see each other.
            backend: of `packed_attention`.

        Returns:
            [n, vision_hidden].
        """
        embed, position = self.embeddings["patch_embedding"], self.embeddings["position_embedding"]
        assert isinstance(embed, nn.Linear)
        x = embed(patches.to(embed.weight.dtype)) + position(grid_index(grid, self.side))
        for layer in self.encoder["layers"].children():
            x = layer(x, mask, backend)
        return self.post_layernorm(x)  # type: ignore[no-any-return]
