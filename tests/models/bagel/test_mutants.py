"""Mistakes that a port of BAGEL makes: the oracle notices each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models.bagel.test_bagel import CONFIG, assert_near, pairs
from models.bagel.tiny import tiny_bagel

from lvrpo.masks import SpanMask
from lvrpo.masks.positions import position_ids
from lvrpo.models.bagel import BagelBuilder, embeddings, model, vision
from lvrpo.models.unified import layout


def everything():
    """One group with all that a buffer may hold."""
    generator = np.random.default_rng(0)

    def latents(rows, columns):
        return torch.from_numpy(generator.standard_normal((rows, columns, CONFIG.latent_dim)))

    pictures = [
        torch.from_numpy(generator.integers(0, 257, (3, 4 * rows, 4 * columns)) / 256)
        for rows, columns in ((2, 3), (3, 2))
    ]
    prompt = [
        ("text", [9, 10, 11]),
        ("read", pictures[0]),
        ("clean", latents(2, 3)),
        ("read", pictures[1]),
        ("text", [12, 13]),
    ]
    return [(prompt, [("text", [14, 15, 16]), ("noise", latents(3, 2), 0.3)])]


def agrees() -> bool:
    bagel = tiny_bagel()
    try:
        for ours, theirs, name in pairs(bagel, everything(), bagel.state_dict()):
            assert_near(ours, theirs, name)
    except AssertionError:
        return False
    return True


def time_with(change):
    def forward(self, timesteps):
        half = self.dim // 2
        frequency = 1e4 ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = change["scale"] * timesteps[:, None] * frequency
        waves = [angle.cos(), angle.sin()]
        return self.mlp(torch.cat(waves[:: change["order"]], dim=1))

    return embeddings.TimeEmbedding, "forward", forward


def through_generation(self, name):
    """`get_submodule` that takes the generation expert's module wherever there is one."""
    module = self
    for part in name.split("."):
        module = module._modules.get(f"{part}_moe_gen", module._modules[part])
    return module


MUTANTS = {
    "the time's sines come first": time_with({"scale": 1, "order": -1}),
    "the time counts a thousand steps": time_with({"scale": 1000, "order": 1}),
    "tables have the row first": (
        embeddings.PositionTable,
        "forward",
        lambda self, grid: self.pos_embed[embeddings.grid_index(grid.flip(1), self.side)],
    ),
    "positions are numbered by another side": (
        embeddings.PositionTable,
        "forward",
        lambda self, grid: self.pos_embed[embeddings.grid_index(grid, 5)],
    ),
    "the tower's gelu is exact": (
        vision.GeluMLP,
        "forward",
        lambda self, x: self.fc2(F.gelu(self.fc1(x))),
    ),
    "pixels are in [0, 1]": (
        BagelBuilder,
        "read",
        lambda self, pixels, parent=-1: self.picture(pixels, *self.markers, parent),
    ),
    "pictures see each other in the tower": (
        model,
        "picture_mask",
        lambda grid: SpanMask.from_cu_seqlens([0, len(grid)], causal=False),
    ),
    "every token of a picture has a position id": (layout, "bagel_position_ids", position_ids),
    "all rows go through the generation expert": (
        model.Layer,
        "get_submodule",
        through_generation,
    ),
    "values are rotated": (
        model.Attention,
        "project",
        lambda self, x, rope, expert, project=model.Attention.project: tuple(
            model.rotate(part, *rope) if i == 2 else part
            for i, part in enumerate(project(self, x, rope, expert))
        ),
    ),
}


def test_without_a_mistake_it_agrees(monkeypatch):
    assert agrees()
    monkeypatch.setattr(*time_with({"scale": 1, "order": 1}))
    assert agrees()


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_noticed(monkeypatch, mistake):
    monkeypatch.setattr(*MUTANTS[mistake])
    assert not agrees()
