"""Semantic grounding, r_sem: how well a drawing matches its prompt in a shared embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lvrpo.digits.encoder import DualEncoder, key_phrases, pool_similarity
from lvrpo.rewards.samples import Samples


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
    """

    encoder: DualEncoder
    form: Literal["dense", "global"] = "dense"
    pool: Literal["softmax", "topk", "max"] = "softmax"
    top_k: int = 2
    name: str = field(default="r_sem", init=False)
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.form not in ("dense", "global"):
            raise ValueError(f"SemanticReward: form is {self.form!r}, expected 'dense' or 'global'")
        pool_similarity(torch.zeros(1, 1), self.pool, top_k=self.top_k)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [-1, 1], NaN for texts."""
        scores = torch.full((len(samples),), math.nan)
        if samples.images is None:
            return scores
        asked = [key_phrases(samples.examples[at].prompt) for at in samples.image_index]
        known = [
            i
            for i, phrases in enumerate(asked)
            if phrases and all(self.encoder.knows(phrase) for phrase in phrases)
        ]
        if not known:
            return scores
        pictures, patches = self.encoder.encode_images(samples.images[known].float().cpu())
        captions = [asked[i] for i in known]
        if self.form == "global":
            values = (self.encoder.encode_captions(captions) * pictures).sum(dim=1)
        else:
            values = self._dense(captions, patches)
        scores[torch.tensor([samples.image_index[i] for i in known])] = values
        return scores

    def _dense(self, captions: list[list[str]], patches: Tensor) -> Tensor:
        phrases = self.encoder.encode_phrases([p for caption in captions for p in caption])
        drawing = torch.tensor([i for i, caption in enumerate(captions) for _ in caption])
        similarity = torch.einsum("qd,qpd->qp", phrases, patches[drawing])
        pooled = pool_similarity(similarity, self.pool, top_k=self.top_k)
        total = torch.zeros(len(captions)).index_add_(0, drawing, pooled)
        return total / drawing.bincount(minlength=len(captions))
