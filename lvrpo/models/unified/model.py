"""A unified model that reads and draws: BAGEL's shape, from a million to seven billion parameters.

Its parts are its own; `lvrpo.models.bagel` is BAGEL itself, on the same packed buffers and caches.

One packed buffer holds text tokens, image patches to be read and noisy latents to be denoised. Each
layer has two full parameter sets (a mixture of transformers): text and patches go through the
understanding expert, latents through the generation expert, and all attend jointly under one
`SpanMask`. Text is predicted by a head over the vocabulary, latents by the velocity of a rectified
flow.

Dimensions: L packed rows, n_text + n_patch + n_latent of them; Hq / Hkv query and key heads, D head
width, c numbers per latent token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvrpo.dtypes import widen
from lvrpo.masks import SpanMask
from lvrpo.ops.packed_attention import packed_attention


@dataclass(frozen=True)
class UnifiedConfig:
    """Shape of a `UnifiedModel`; `preset` has the sizes of the BAGEL family."""

    vocab_size: int
    hidden: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 256
    vision_layers: int = 0  # 0: patches go straight to the connector
    vision_hidden: int = 192
    vision_heads: int = 4
    vision_mlp: int = 256
    image_channels: int = 1
    image_patch: int = 8
    latent_dim: int = 16
    timestep_dim: int = 64
    max_grid: int = 8  # longest side of a picture, in patches or latent tokens
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, expected at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads is {self.heads}, expected a multiple of kv_heads = {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}, RoPE needs an even number")
        if self.vision_hidden % self.vision_heads:
            raise ValueError(
                f"model.vision_hidden is {self.vision_hidden}, expected a multiple of "
                f"vision_heads = {self.vision_heads}"
            )

    @property
    def vision_grid(self) -> int:
        """Longest side of a picture to be read, in patches."""
        return self.max_grid

    @property
    def latent_grid(self) -> int:
        """Longest side of a drawing, in latent tokens."""
        return self.max_grid

    @classmethod
    def preset(cls, name: str) -> UnifiedConfig:
        """`bagel-1.5b` or `bagel-7b`: Qwen2.5 sizes, two expert sets, 2x2 patches of a VAE."""
        shared = {
            "layers": 28,
            "head_dim": 128,
            "vision_layers": 26,
            "vision_hidden": 1152,
            "vision_heads": 16,
            "vision_mlp": 4304,
            "image_channels": 3,
            "image_patch": 14,
            "latent_dim": 64,
            "timestep_dim": 256,
            "max_grid": 70,
            "rope_theta": 1e6,
        }
        presets = {
            "bagel-1.5b": dict(
                shared, vocab_size=151936, hidden=1536, heads=12, kv_heads=2, mlp=8960
            ),
            "bagel-7b": dict(
                shared, vocab_size=152064, hidden=3584, heads=28, kv_heads=4, mlp=18944
            ),
        }
        if name not in presets:
            raise ValueError(f"unknown model preset {name!r}, expected one of {', '.join(presets)}")
        return cls(**presets[name])  # type: ignore[arg-type]


@dataclass(frozen=True)
class PackedBatch:
    """Input of one forward pass: three kinds of rows and where each sits in the packed buffer.

    Rows count within this batch: a batch that extends a `KVCache` holds the new rows only, and
    `mask` then has those rows as its queries and the whole cached layout as its keys.
    """

    token_ids: Tensor  # [n_text] int64
    text_rows: Tensor  # [n_text] int64, row of each token
    patches: Tensor  # [n_patch, image_channels * image_patch ** 2], pixels on the model's scale
    patch_rows: Tensor  # [n_patch] int64
    patch_grid: Tensor  # [n_patch, 2] int64, (row, column) of the patch in its image
    latents: Tensor  # [n_latent, latent_dim], x_t, or clean ones that are read
    latent_rows: Tensor  # [n_latent] int64
    latent_grid: Tensor  # [n_latent, 2] int64
    timesteps: Tensor  # [n_latent] in [0, 1]; 1 is pure noise
    noisy: Tensor  # [n_noisy] int64, ascending: which of the latents are drawn
    position_ids: Tensor  # [L] int64 for RoPE
    mask: SpanMask

    @property
    def rows(self) -> int:
        """L."""
        return self.position_ids.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        return dataclasses.replace(self, **moved)


class PackedSizes(Protocol):
    """What a layout and a cache ask of a model's configuration."""

    @property
    def layers(self) -> int:
        """Of the language model."""

    @property
    def kv_heads(self) -> int:
        """Of each of them."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def image_channels(self) -> int:
        """Of a picture to be read."""

    @property
    def image_patch(self) -> int:
        """Pixels along a side of its patches."""

    @property
    def vision_grid(self) -> int:
        """Most patches along a side of it."""

    @property
    def latent_grid(self) -> int:
        """Most latent tokens along a side of a drawing."""

    @property
    def latent_dim(self) -> int:
        """Numbers of a latent token."""


class PackedModel(Protocol):
    """A model of packed buffers: hidden states of a `PackedBatch`, and what is read from them."""

    @property
    def config(self) -> PackedSizes:
        """Its shape."""

    @property
    def head(self) -> nn.Linear:
        """The projection on the vocabulary."""

    def __call__(
        self,
        batch: PackedBatch,
        cache: KVCache | None = None,
        cache_rows: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `UnifiedModel.forward`."""

    def logits(self, text: Tensor) -> Tensor:
        """See `UnifiedModel.logits`."""

    def velocity(self, latent: Tensor) -> Tensor:
        """See `UnifiedModel.velocity`."""


class KVCache:
    """Keys and values of every layer for one packed layout, filled as its rows are computed.

    A group's prompt is written once and then read by all G completions and by every denoising step;
    the rows of a noisy image are overwritten at each step.
    """

    def __init__(self, config: PackedSizes, rows: int, like: Tensor) -> None:
        shape = (config.layers, rows, config.kv_heads, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def write(
        self, layer: int, rows: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store [n, Hkv, D] keys and values at `rows` and return those of the whole layout."""
        self.keys[layer].index_copy_(0, rows, keys)
        self.values[layer].index_copy_(0, rows, values)
        return self.keys[layer], self.values[layer]

    def move(self, there: Tensor, here: Tensor, rows: int) -> None:
        """Another layout, of so many rows: here[i] of it is what was there[i], the rest is 0."""
        self.keys, self.values = (
            kept.new_zeros(kept.shape[0], rows, *kept.shape[2:]).index_copy_(
                1, here, kept.index_select(1, there)
            )
            for kept in (self.keys, self.values)
        )


class Expert(nn.Module):
    """One parameter set of a layer: attention projections with q/k norms, and a SwiGLU."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int, eps: float
    ) -> None:
        super().__init__()
        self.heads = [heads, kv_heads, kv_heads]
        self.head_dim = head_dim
        self.attention_norm = nn.RMSNorm(width, eps=eps)
        self.qkv = nn.Linear(width, sum(self.heads) * head_dim)
        self.query_norm = nn.RMSNorm(head_dim, eps=eps)
        self.key_norm = nn.RMSNorm(head_dim, eps=eps)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.gate_up = nn.Linear(width, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """[n, hidden] -> queries, keys and values [n, Hq + 2 Hkv, D], normed and rotated."""
        qkv = rearrange(self.qkv(self.attention_norm(x)), "n (h d) -> n h d", d=self.head_dim)
        query, key, value = qkv.split(self.heads, dim=1)
        rotated = torch.cat([self.query_norm(query), self.key_norm(key)], dim=1)
        if rope is not None:
            rotated = rotate(rotated, *rope)
        return torch.cat([rotated, value], dim=1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention output [n, Hq * D] and the feed-forward output to the residual."""
        x = x + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class Routing(NamedTuple):
    """Which expert has which rows of the packed buffer; those of understanding come first."""

    rows: Tensor  # [L] int64, packed row of each row, expert by expert
    packed_order: Tensor  # [L] int64, its inverse
    rope_und: tuple[Tensor, Tensor]  # cos and sin [n, 1, D / 2]
    rope_gen: tuple[Tensor, Tensor]


#: Queries [L, Hq, D], keys and values [L, Hkv, D] in packed order -> [L, Hq, D].
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One layer of both experts, which keep their rows apart; only attention sees all of them."""

    def __init__(self, understand: Expert, generate: Expert) -> None:
        super().__init__()
        self.understand, self.generate = understand, generate

    def forward(
        self, x_und: Tensor, x_gen: Tensor, routing: Routing, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """[n_text + n_patch, hidden] and [n_latent, hidden] -> the same."""
        und, gen = self.understand, self.generate
        # An expert without rows is left out, so that it gets no gradient rather than zeros.
        parts = [
            expert.project(x, rope)
            for expert, x, rope in ((und, x_und, routing.rope_und), (gen, x_gen, routing.rope_gen))
            if len(x)
        ]
        qkv = torch.cat(parts).index_select(0, routing.packed_order)
        attended = attend(*qkv.split(und.heads, dim=1)).flatten(1).index_select(0, routing.rows)
        attended_und, attended_gen = attended.split([len(x_und), len(x_gen)])
        if len(x_und):
            x_und = und.finish(x_und, attended_und)
        if len(x_gen):
            x_gen = gen.finish(x_gen, attended_gen)
        return x_und, x_gen


class UnifiedModel(nn.Module):
    """Hidden states by `forward`, read by `logits` and `velocity`; see the module docstring.

    Attributes:
        config: its shape.
        gradient_checkpointing: whether layers are computed again in the backward pass, so that only
            what is between them is kept.
    """

    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.hidden
        self.embedding = nn.Embedding(config.vocab_size, width)
        vision_width, vision_heads = config.vision_hidden, config.vision_heads
        self.patch_in = nn.Linear(config.image_channels * config.image_patch**2, vision_width)
        self.vision = nn.ModuleList(
            Expert(
                vision_width,
                vision_heads,
                vision_heads,
                vision_width // vision_heads,
                config.vision_mlp,
                config.norm_eps,
            )
            for _ in range(config.vision_layers)
        )
        if config.vision_layers:
            self.vision_position = nn.Embedding(config.max_grid**2, vision_width)
        between = max(vision_width, width)
        self.connector = nn.Sequential(
            nn.Linear(vision_width, between),
            nn.GELU(approximate="tanh"),
            nn.Linear(between, width),
        )
        self.patch_position = nn.Embedding(config.max_grid**2, width)
        self.latent_in = nn.Linear(config.latent_dim, width)
        self.latent_position = nn.Embedding(config.max_grid**2, width)
        self.timestep_in = nn.Sequential(
            nn.Linear(config.timestep_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        heads = config.heads, config.kv_heads, config.head_dim
        experts = [
            [Expert(width, *heads, config.mlp, config.norm_eps) for _ in range(config.layers)]
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(map(Layer, *experts))
        self.text_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.latent_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.latent_out = nn.Linear(width, config.latent_dim)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        in_order = [*experts[0], *experts[1]]  # that weights are drawn in: expert by expert
        for part in self.children():
            for module in in_order if part is self.layers else [part]:
                module.apply(self._initialise)
        # Residual branches start at half scale, the text head near uniform, the velocity at zero.
        for expert in (*in_order, *self.vision):
            assert isinstance(expert, Expert)
            for branch in (expert.out, expert.down):
                nn.init.normal_(branch.weight, std=0.5 / math.sqrt(branch.in_features))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.latent_out.weight)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache | None = None,
        cache_rows: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the text rows' and the latent rows' experts.

        Args:
            batch: see `PackedBatch`.
            cache: keys and values to extend and attend to; the batch's rows are new rows of it.
            cache_rows: [L] int64, the row of the cached layout that each batch row is.
            backend: of `packed_attention`.

        Returns:
            text: [n_text, hidden] after the final norm, in the order of `token_ids`.
            latent: [n_latent, hidden] after the final norm, in the order of `latents`.
        """
        config = self.config
        x_und = torch.cat([self.embedding(batch.token_ids), self._encode_patches(batch, backend)])
        x_gen = self._embed_latents(batch)
        rows_und = torch.cat([batch.text_rows, batch.patch_rows])
        rows = torch.cat([rows_und, batch.latent_rows])
        # The experts keep their rows apart; only attention sees them in packed order.
        packed_order = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows)).to(rows))
        cos, sin = rope_table(batch.position_ids[rows], config.head_dim, config.rope_theta)
        split = [len(x_und), len(x_gen)]
        ropes = zip(cos.split(split), sin.split(split), strict=True)
        routing = Routing(rows, packed_order, *ropes)
        again = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            attend = partial(attend_packed, batch.mask, backend, index, cache, cache_rows)
            if again:
                x_und, x_gen = checkpoint(layer, x_und, x_gen, routing, attend, use_reentrant=False)
            else:
                x_und, x_gen = layer(x_und, x_gen, routing, attend)
        return self.text_norm(x_und[: len(batch.token_ids)]), self.latent_norm(x_gen)

    def logits(self, text: Tensor) -> Tensor:
        """[n, hidden] hidden states of text rows -> [n, vocab_size]."""
        return self.head(text)  # type: ignore[no-any-return]

    def velocity(self, latent: Tensor) -> Tensor:
        """[n, hidden] of latent rows -> [n, latent_dim] noise minus data, in fp32 or fp64."""
        return widen(self.latent_out(latent))

    def _encode_patches(self, batch: PackedBatch, backend: str | None) -> Tensor:
        x = self.patch_in(batch.patches.to(self.patch_in.weight.dtype))
        position = self._grid_index(batch.patch_grid)
        if self.vision and len(x):
            x = x + self.vision_position(position)
            mask = picture_mask(batch.patch_grid)
            for expert in self.vision:
                assert isinstance(expert, Expert)
                query, key, value = expert.project(x, None).split(expert.heads, dim=1)
                attended = packed_attention(query, key, value, mask, backend=backend)
                x = expert.finish(x, attended.flatten(1))
        # Where a patch is stays apart from what it shows, so that a question can find it.
        return self.connector(x) + self.patch_position(position)  # type: ignore[no-any-return]

    def _embed_latents(self, batch: PackedBatch) -> Tensor:
        x = self.latent_in(batch.latents.to(self.latent_in.weight.dtype))
        time = sinusoid(batch.timesteps * 100.0, self.config.timestep_dim)
        position = self.latent_position(self._grid_index(batch.latent_grid))
        return x + self.timestep_in(time.to(x)) + position  # type: ignore[no-any-return]

    def _grid_index(self, grid: Tensor) -> Tensor:
        """[n, 2] (row, column) -> [n], BAGEL's numbering of grid positions."""
        return grid[:, 0] * self.config.max_grid + grid[:, 1]


def attend_packed(
    mask: SpanMask,
    backend: str | None,
    layer: int,
    cache: KVCache | None,
    cache_rows: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Attention of one layer's rows to each other, or to all that a cache has with them."""
    if cache is not None:
        assert cache_rows is not None
        key, value = cache.write(layer, cache_rows, key, value)
    return packed_attention(query, key, value, mask, backend=backend)


def picture_mask(patch_grid: Tensor) -> SpanMask:
    """Patches of one picture see each other; one with grid position (0, 0) starts a picture.

    Args:
        patch_grid: [n_patch, 2] int64, (row, column) of each patch in its picture.
    """
    starts = (patch_grid == 0).all(dim=1).nonzero().flatten().tolist()
    mask = SpanMask.from_cu_seqlens([*starts, len(patch_grid)], causal=False)
    return mask.to(patch_grid.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [n, heads, D] by tables [n, 1, D / 2]; the halves of D are the pairs."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def rope_table(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin [n, 1, head_dim / 2] of the rotation angles, which are formed in `dtype`."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype) / head_dim
    angle = position_ids[:, None].to(dtype) * theta**-exponent
    return angle.cos()[:, None], angle.sin()[:, None]


def sinusoid(position: Tensor, width: int) -> Tensor:
    """[n] positions -> [n, width] sines and cosines of wavelengths from 2 pi to 1,000 * 2 pi."""
    half = width // 2
    exponent = torch.arange(half, device=position.device) * (-math.log(1_000.0) / max(1, half - 1))
    frequency = exponent.exp()
    angle = position[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
