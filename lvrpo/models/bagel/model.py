"""BAGEL-MoT: Qwen2.5 with two parameter sets per layer, a SigLIP tower, and a flow over latents.

One packed buffer holds text tokens, image patches to be read and latent tokens, clean or noisy.
Text, patches and the markers around pictures go through the understanding expert, latents through
the generation expert, whose names end in `_moe_gen`; all attend jointly under one `SpanMask`.
Modules are named as the published tensors are, so that a state dict is a published file.

The architecture is that of Deng et al. 2025 (arXiv 2505.14683) as its published code computes it,
without its casts to bf16. Dimensions: L packed rows, n_text + n_patch + n_latent of them; Hq / Hkv
query and key heads, D head width, c numbers per latent token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvrpo.dtypes import widen
from lvrpo.models.bagel.config import BagelConfig
from lvrpo.models.bagel.embeddings import PositionTable, TimeEmbedding
from lvrpo.models.bagel.vision import GeluMLP, VisionTower
from lvrpo.models.unified.model import (
    Attend,
    KVCache,
    PackedBatch,
    attend_packed,
    picture_mask,
    rope_table,
    rotate,
)

#: What the published names of an expert's modules end in.
UNDERSTANDING, GENERATION = EXPERTS = ("", "_moe_gen")


class Attention(nn.Module):
    """Projections of both experts: biases before attention, none after, queries and keys normed."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        for expert in EXPERTS:
            self.add_module(f"q_proj{expert}", nn.Linear(config.hidden, queries))
            self.add_module(f"k_proj{expert}", nn.Linear(config.hidden, keys))
            self.add_module(f"v_proj{expert}", nn.Linear(config.hidden, keys))
            self.add_module(f"o_proj{expert}", nn.Linear(queries, config.hidden, bias=False))
            for name in ("q_norm", "k_norm"):
                norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
                self.add_module(f"{name}{expert}", norm)

    def project(
        self, x: Tensor, rope: tuple[Tensor, Tensor], expert: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[n, hidden] -> queries [n, Hq, D], keys and values [n, Hkv, D]."""

        def heads(name: str) -> Tensor:
            projected = self.get_submodule(f"{name}_proj{expert}")(x)
            return projected.unflatten(1, (-1, self.head_dim))  # type: ignore[no-any-return]

        query = self.get_submodule(f"q_norm{expert}")(heads("q"))
        key = self.get_submodule(f"k_norm{expert}")(heads("k"))
        return rotate(query, *rope), rotate(key, *rope), heads("v")

    def out(self, attended: Tensor, expert: str) -> Tensor:
        """[n, Hq, D] -> [n, hidden]."""
        return self.get_submodule(f"o_proj{expert}")(attended.flatten(1))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, width]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Routing(NamedTuple):
    """Which expert has which rows of the packed buffer; an expert without rows is left out.

    So it gets no gradient rather than zeros.
    """

    rows: Tensor  # [L] int64, packed row of each row, expert by expert
    packed_order: Tensor  # [L] int64, its inverse
    counts: list[int]  # rows of each expert
    ropes: dict[str, tuple[Tensor, Tensor]]  # cos and sin [n, 1, D / 2] by expert


class Layer(nn.Module):
    """One layer of both experts, which keep their rows apart; only attention sees all of them."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for expert in EXPERTS:
            self.add_module(f"mlp{expert}", SwiGLU(config.hidden, config.mlp))
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
                self.add_module(f"{name}{expert}", norm)

    def forward(
        self, states: dict[str, Tensor], routing: Routing, attend: Attend
    ) -> dict[str, Tensor]:
        """[n, hidden] by expert -> the same."""
        parts = [self._project(x, routing.ropes[expert], expert) for expert, x in states.items()]
        query, key, value = (
            torch.cat(kind).index_select(0, routing.packed_order)
            for kind in zip(*parts, strict=True)
        )
        attended = attend(query, key, value).index_select(0, routing.rows).split(routing.counts)
        return {
            expert: self._finish(x, seen, expert)
            for (expert, x), seen in zip(states.items(), attended, strict=True)
        }

    def _project(
        self, x: Tensor, rope: tuple[Tensor, Tensor], expert: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.get_submodule(f"input_layernorm{expert}")(x)
        return self.self_attn.project(normed, rope, expert)

    def _finish(self, x: Tensor, attended: Tensor, expert: str) -> Tensor:
        """Add what was attended to, [n, Hq, D], and the feed-forward output to the residual."""
        x = x + self.self_attn.out(attended, expert)
        normed = self.get_submodule(f"post_attention_layernorm{expert}")(x)
        return x + self.get_submodule(f"mlp{expert}")(normed)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token embedding, layers, and a final norm per expert."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        for expert in EXPERTS:
            self.add_module(f"norm{expert}", nn.RMSNorm(config.hidden, eps=config.norm_eps))


class Bagel(nn.Module):
    """Hidden states by `forward`, read by `logits` and `velocity`; see the module docstring.

    Attributes:
        config: its shape.
        gradient_checkpointing: whether the language model's layers are computed again in the
            backward pass, so that only what is between them is kept.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.hidden
        self.language_model = nn.ModuleDict(
            {"model": Decoder(config), "lm_head": nn.Linear(width, config.vocab_size, bias=False)}
        )
        self.vit_model = nn.ModuleDict({"vision_model": VisionTower(config)})
        self.connector = GeluMLP(config.vision_hidden, width, width)
        self.vit_pos_embed = PositionTable(config.vision_grid, width)
        self.vae2llm = nn.Linear(config.latent_dim, width)
        self.time_embedder = TimeEmbedding(config.timestep_dim, width)
        self.latent_pos_embed = PositionTable(config.latent_grid, width)
        self.llm2vae = nn.Linear(width, config.latent_dim)
        # A model that has not learned to draw predicts no movement.
        nn.init.zeros_(self.llm2vae.weight)
        nn.init.zeros_(self.llm2vae.bias)

    @property
    def head(self) -> nn.Linear:
        """The projection on the vocabulary."""
        head = self.language_model["lm_head"]
        assert isinstance(head, nn.Linear)
        return head

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache | None = None,
        cache_rows: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the text rows and of the latent rows.

        Args:
            batch: see `PackedBatch`; pixels in [-1, 1], clean latents at time 0.
            cache: keys and values to extend and attend to; the batch's rows are new rows of it.
            cache_rows: [L] int64, the row of the cached layout that each batch row is.
            backend: of `packed_attention`.

        Returns:
            text: [n_text, hidden] after the final norm, in the order of `token_ids`.
            latent: [n_latent, hidden] after the final norm, in the order of `latents`.
        """
        decoder = self.language_model["model"]
        assert isinstance(decoder, Decoder)
        texts = decoder.embed_tokens(batch.token_ids)
        states = {
            UNDERSTANDING: torch.cat([texts, self._read(batch, backend).to(texts)]),
            GENERATION: self._embed_latents(batch).to(texts),
        }
        routing = self._routing(batch, states)
        states = {expert: x for expert, x in states.items() if len(x)}
        again = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for index, layer in enumerate(decoder.layers):
            attend = partial(attend_packed, batch.mask, backend, index, cache, cache_rows)
            if again:
                states = checkpoint(layer, states, routing, attend, use_reentrant=False)
            else:
                states = layer(states, routing, attend)
        none = texts[:0]
        text = states.get(UNDERSTANDING, none)[: len(texts)]
        latent = states.get(GENERATION, none)
        norms = (decoder.get_submodule(f"norm{expert}") for expert in EXPERTS)
        return tuple(norm(x) for norm, x in zip(norms, (text, latent), strict=True))  # type: ignore[return-value]

    def logits(self, text: Tensor) -> Tensor:
        """[n, hidden] hidden states of text rows -> [n, vocab_size]."""
        return self.head(text)  # type: ignore[no-any-return]

    def velocity(self, latent: Tensor) -> Tensor:
        """[n, hidden] of latent rows -> [n, latent_dim] noise minus data, in fp32 or fp64."""
        return widen(self.llm2vae(latent))

    def _routing(self, batch: PackedBatch, states: dict[str, Tensor]) -> Routing:
        rows = torch.cat([batch.text_rows, batch.patch_rows, batch.latent_rows])
        packed_order = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows)).to(rows))
        dtype = widen(states[UNDERSTANDING]).dtype
        config = self.config
        table = rope_table(batch.position_ids[rows], config.head_dim, config.rope_theta, dtype)
        counts = [len(x) for x in states.values()]
        by_expert = zip(*(angles.split(counts) for angles in table), strict=True)
        ropes = dict(zip(states, by_expert, strict=True))
        return Routing(rows, packed_order, [count for count in counts if count], ropes)

    def _read(self, batch: PackedBatch, backend: str | None) -> Tensor:
        """[n_patch, hidden]; pictures do not see each other here."""
        if not len(batch.patches):
            return batch.patches.new_zeros(0, self.config.hidden)
        tower = self.vit_model["vision_model"]
        mask = picture_mask(batch.patch_grid)
        seen = self.connector(tower(batch.patches, batch.patch_grid, mask, backend))
        return seen + self.vit_pos_embed(batch.patch_grid).to(seen)  # type: ignore[no-any-return]

    def _embed_latents(self, batch: PackedBatch) -> Tensor:
        x = self.vae2llm(batch.latents.to(self.vae2llm.weight.dtype))
        x = x + self.time_embedder(batch.timesteps)
        return x + self.latent_pos_embed(batch.latent_grid).to(x)  # type: ignore[no-any-return]
