"""A small contrastive pair of encoders, pictures and phrases: the offline stand-in for SigLIP 2.

Trained on scenes of the training split in seconds. It has a global embedding of picture and
caption, and one embedding per patch and per key phrase for dense grounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lvrpo.data.example import Example
from lvrpo.digits.phrases import cell_names, digit_at, empty_at
from lvrpo.digits.pictures import SIDE, assemble, digit_pools, jitter
from lvrpo.digits.questions import EMPTY
from lvrpo.digits.rules import LayoutRule, digit_rule
from lvrpo.digits.scenes import SceneConfig, generator, scene_examples
from lvrpo.rewards.semantic import pool_similarity

# Overlapping windows: every cell is one of them, and a digit across a border is in none alone.
_WINDOW, _STRIDE = 8, 4
_BATCH = 48  # four hundred small steps read digits better than two hundred twice as large


def key_phrases(prompt: str) -> list[str]:
    """What a prompt asks for, piece by piece: "draw 3 at top-left and 7 at ..." gives two."""
    listed = prompt.removeprefix("draw ").replace(", ", " and ").split(" and ")
    return [phrase.strip() for phrase in listed if phrase.strip()]


class DualEncoder(nn.Module):
    """Unit vectors for pictures, patches, captions and phrases; similarity is a dot product.

    Args:
        words: the vocabulary; a phrase is the set of its words.
        channels: C of the pictures.
        height: of the pictures, a multiple of 4, at least 8.
        width: likewise.
        dim: width of the embeddings.
    """

    def __init__(
        self, words: Sequence[str], channels: int, height: int, width: int, dim: int = 48
    ) -> None:
        super().__init__()
        if (height - _WINDOW) % _STRIDE or (width - _WINDOW) % _STRIDE:
            raise ValueError(
                f"DualEncoder: {height} x {width} pixels, expected multiples of {_STRIDE} from "
                f"{_WINDOW} on"
            )
        self.words = tuple(words)
        self.shape = channels, height, width
        self.dim = dim
        self._ids = {word: i for i, word in enumerate(self.words)}
        features = 4 * dim
        patches = ((height - _WINDOW) // _STRIDE + 1) * ((width - _WINDOW) // _STRIDE + 1)
        self.look = nn.Linear(channels * _WINDOW**2, features)
        self.position = nn.Parameter(torch.randn(patches, features) * 0.5)
        # Normed, or whether 400 steps are enough depends on the seed.
        self.patch_head = nn.Sequential(
            nn.LayerNorm(features),
            nn.GELU(),
            nn.Linear(features, features),
            nn.LayerNorm(features),
            nn.GELU(),
            nn.Linear(features, dim),
        )
        self.picture_head = nn.Linear(dim, dim)
        self.word = nn.Embedding(len(self.words), features)
        self.phrase_head = nn.Sequential(
            nn.LayerNorm(features),
            nn.Linear(features, features),
            nn.GELU(),
            nn.Linear(features, dim),
        )
        self.caption_head = nn.Linear(dim, dim)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def phrases_of(self, prompt: str) -> list[str]:
        """See `key_phrases`."""
        return key_phrases(prompt)

    def implied_by(self, phrases: Sequence[str]) -> list[str]:
        """ "nothing at ..." of every other cell, where each phrase speaks of one cell."""
        _, height, width = self.shape
        cells = cell_names(height // SIDE, width // SIDE)
        named = {phrase.partition(" at ")[2] for phrase in phrases}
        if not named or not named <= set(cells):
            return []
        return [empty_at(cell) for cell in cells if cell not in named]

    def knows(self, phrase: str) -> bool:
        """Whether every word of the phrase is in the vocabulary."""
        return all(word in self._ids for word in phrase.split())

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] to ([N, dim] of pictures, [N, P, dim] of patches)."""
        windows = F.unfold(images - 0.3, _WINDOW, stride=_STRIDE).transpose(1, 2)
        patches = self.patch_head(self.look(windows) + self.position)
        picture = self.picture_head(patches.mean(dim=1))
        return F.normalize(picture, dim=-1), F.normalize(patches, dim=-1)

    def encode_phrases(self, phrases: Sequence[str]) -> Tensor:
        """[Q, dim] of phrases."""
        return F.normalize(self._phrases(phrases), dim=-1)

    def encode_captions(self, captions: Sequence[Sequence[str]]) -> Tensor:
        """[Q, dim] of captions, each given as its key phrases."""
        unique = sorted({phrase for caption in captions for phrase in caption})
        at = {phrase: i for i, phrase in enumerate(unique)}
        member = torch.zeros(len(captions), len(unique))
        for row, caption in enumerate(captions):
            for phrase in caption:
                member[row, at[phrase]] = 1 / len(caption)
        return F.normalize(self.caption_head(member @ self._phrases(unique)), dim=-1)

    def _phrases(self, phrases: Sequence[str]) -> Tensor:
        ids = [[self._ids[word] for word in phrase.split()] for phrase in phrases]
        offsets = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0)[:-1]
        flat = torch.tensor([i for row in ids for i in row])
        bags = F.embedding_bag(flat, self.word.weight, offsets, mode="sum")
        return cast(Tensor, self.phrase_head(bags))

    def save(self, path: Path) -> None:
        """Write weights and vocabulary to one safetensors file."""
        from safetensors.torch import save_file

        about = {"words": self.words, "shape": self.shape, "dim": self.dim}
        save_file(self.state_dict(), path, metadata={"dual_encoder": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> DualEncoder:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("dual_encoder")
            if about is None:
                raise ValueError(f"DualEncoder.load: {path} was not written by DualEncoder.save")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        data = json.loads(about)
        channels, height, width = data["shape"]
        encoder = cls(data["words"], channels, height, width, data["dim"])
        encoder.load_state_dict(state)
        return encoder.eval().requires_grad_(False)


def new_dual_encoder(config: SceneConfig) -> DualEncoder:
    """Freshly initialised, with the words of every phrase about a canvas."""
    cells = cell_names(config.rows, config.cols)
    phrases = [digit_at(digit, cell) for digit in range(10) for cell in cells]
    phrases += [empty_at(cell) for cell in cells]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    return DualEncoder(words, *config.picture_shape)


def train_dual_encoder(
    config: SceneConfig | None = None, *, steps: int = 400, seed: int = 0
) -> DualEncoder:
    """Fit on slightly shifted and dimmed scenes of the training split, with their prompts.

    Args:
        config: of the canvas; what is asked for is always a layout, of any number of digits.
        steps: of 48 scenes each.
        seed: of weights and scenes; it fixes the result for one machine and thread count.
    """
    base = config or SceneConfig()
    # Up to full canvases: many layouts, and a digit is known beside whatever others.
    scenes = SceneConfig(base.rows, base.cols, request_digits=(0.25,) * min(4, base.cells))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = new_dual_encoder(scenes)
    examples = scene_examples(scenes, "train", "generate", 128 * _BATCH, seed)
    layouts = np.array([_layout(example) for example in examples])
    asked = [key_phrases(example.prompt) for example in examples]
    captions = [phrases + encoder.implied_by(phrases) for phrases in asked]

    rng = generator("dual encoder", seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=max(2, steps), pct_start=0.1
    )
    for _ in range(steps):
        rows = rng.integers(0, len(examples), _BATCH)
        # Other images of the same digits each time: what stands beside a digit must not matter.
        cells = jitter(_drawn(layouts[rows], rng), rng)
        images = torch.from_numpy(assemble(cells, scenes.rows, scenes.cols))
        loss = _contrastive_loss(encoder, images, [captions[row] for row in rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return encoder.eval().requires_grad_(False)


def _layout(example: Example) -> list[int]:
    rule = digit_rule(example)
    assert isinstance(rule, LayoutRule)
    return [EMPTY if digit is None else digit for digit in rule.digits]


def _drawn(layouts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """[N, cells] digits to [N, cells, 8, 8] pictures of the training split."""
    pool = digit_pools()["train"]
    cells = np.zeros((*layouts.shape, SIDE, SIDE), np.float32)
    full = layouts != EMPTY
    cells[full] = pool.images[pool.pick(layouts[full], rng.random(int(full.sum())))]
    return cells


def _contrastive_loss(
    encoder: DualEncoder, images: Tensor, captions: Sequence[Sequence[str]]
) -> Tensor:
    pictures, patches = encoder.encode_images(images)
    scale = encoder.log_scale.exp()
    asked = [frozenset(caption) for caption in captions]
    same = torch.tensor([[a == b for b in asked] for a in asked])
    whole = _info_nce(scale * encoder.encode_captions(captions) @ pictures.T, same)

    phrases = sorted(set().union(*asked))
    similarity = torch.einsum("qd,npd->qnp", encoder.encode_phrases(phrases), patches)
    true = torch.tensor([[phrase in caption for caption in asked] for phrase in phrases])
    return whole + _info_nce(scale * pool_similarity(similarity, "softmax"), true)


def _info_nce(logits: Tensor, true: Tensor) -> Tensor:
    """InfoNCE in both directions; a pair that is also true is no negative."""
    wrong = logits.masked_fill(true, -torch.inf)
    against = (wrong.logsumexp(dim=1, keepdim=True), wrong.logsumexp(dim=0, keepdim=True))
    return sum((F.softplus(lse - logits)[true].mean() for lse in against), logits.new_zeros(()))
