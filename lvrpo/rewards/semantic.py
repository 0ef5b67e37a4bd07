"""Semantic grounding, r_sem: how well a drawing matches its prompt in a shared embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.rewards.parts import PhraseEncoder, RewardParts
from lvrpo.rewards.reward import RewardError, Samples


@dataclass(frozen=True)
class SemanticReward:
    """Cosine of drawing and prompt, as a whole or phrase by phrase.

    NaN for texts: the picture and the question are the same for every answer of a group, so their
    similarity would be constant and only dilute the other rewards. NaN too for a prompt that has
    words the encoder never saw.

    Args:
        encoder: trained on the training split.
        form: "dense" is the mean over the prompt's key phrases of the pooled similarity to the
            drawing's patches; "global" is the cosine of the whole drawing and the whole prompt.
        pool: of the dense form, see `pool_similarity`.
        top_k: of pool "topk".
        implied: count the phrases that a prompt implies among its key phrases: what must stay
            empty. Without them, as in the paper, nothing that is drawn too much lowers the score.
    """

    encoder: PhraseEncoder
    form: Literal["dense", "global"] = "dense"
    pool: Literal["softmax", "topk", "max"] = "softmax"
    top_k: int = 2
    implied: bool = True
    name: str = field(default="r_sem", init=False)
    may_be_nan: bool = field(default=True, init=False)
    needs: ClassVar[tuple[str, ...]] = ("encoder",)

    def __post_init__(self) -> None:
        if self.form not in ("dense", "global"):
            raise ValueError(f"SemanticReward: form is {self.form!r}, expected 'dense' or 'global'")
        pool_similarity(torch.zeros(1, 1), self.pool, top_k=self.top_k)

    @classmethod
    def from_parts(cls, parts: RewardParts) -> SemanticReward:
        """The reward of a run.

        Raises:
            RewardError: the data has no encoder.
        """
        if parts.encoder is None:
            raise RewardError("r_sem needs an encoder of pictures and phrases, and there is none")
        options = parts.options
        return cls(
            parts.encoder, pool=options["semantic_pool"], implied=options["semantic_implied"]
        )

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [-1, 1], NaN for texts."""
        scores = torch.full((len(samples),), math.nan)
        if samples.images is not None:
            drawn = list(samples.image_index)
            asked = [samples.examples[at] for at in drawn]
            scores[drawn] = self.similarity(asked, samples.images)
        return scores

    def similarity(self, examples: Sequence[Example], drawings: Tensor) -> Tensor:
        """The score of one drawing per prompt, which a gradient can follow back to its pixels.

        Args:
            examples: [N].
            drawings: [N, C, H, W] in [0, 1].

        Returns:
            [N] fp32 in [-1, 1] on the CPU, NaN for a prompt with words that are unknown.
        """
        captions = [self._phrases(example.prompt) for example in examples]
        known = [
            i
            for i, phrases in enumerate(captions)
            if phrases and all(self.encoder.knows(phrase) for phrase in phrases)
        ]
        scores = torch.full((len(examples),), math.nan)
        if not known:
            return scores
        captions = [captions[i] for i in known]
        pictures, patches = self.encoder.encode_images(drawings[known].float().cpu())
        if self.form == "global":
            values = (self.encoder.encode_captions(captions) * pictures).sum(dim=1)
        else:
            values = self._dense(captions, patches)
        return scores.index_put((torch.tensor(known),), values)

    def _phrases(self, prompt: str) -> list[str]:
        asked = self.encoder.phrases_of(prompt)
        return asked + self.encoder.implied_by(asked) if self.implied else asked

    def _dense(self, captions: list[list[str]], patches: Tensor) -> Tensor:
        phrases = self.encoder.encode_phrases([p for caption in captions for p in caption])
        drawing = torch.tensor([i for i, caption in enumerate(captions) for _ in caption])
        similarity = torch.einsum("qd,qpd->qp", phrases, patches[drawing])
        pooled = pool_similarity(similarity, self.pool, top_k=self.top_k)
        total = torch.zeros(len(captions)).index_add(0, drawing, pooled)
        return total / drawing.bincount(minlength=len(captions))


def pool_similarity(similarity: Tensor, pool: str, *, top_k: int = 2) -> Tensor:
    """Pool [..., P] similarities over the patches.

    Args:
        similarity: [..., P].
        pool: "max" (the paper's) is satisfied by one patch, however wrong the rest; "topk" is the
            mean of the `top_k` best; "softmax" weights every patch by exp(10 * similarity).
        top_k: for "topk".
    """
    if pool == "max":
        return similarity.amax(dim=-1)
    if pool == "topk":
        return similarity.topk(min(top_k, similarity.shape[-1]), dim=-1).values.mean(dim=-1)
    if pool == "softmax":
        return (similarity * (10 * similarity).softmax(dim=-1)).sum(dim=-1)
    raise ValueError(f"pool is {pool!r}, expected 'max', 'topk' or 'softmax'")
