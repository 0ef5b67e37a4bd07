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

    The column "phrases" of an example has its key phrases, where they are not to be taken from the
    prompt; "negative_phrases" has what must not be seen, whose score is subtracted.

    Args:
        encoder: trained on the training split, or by others.
        form: "dense" is the mean over the prompt's key phrases of the pooled similarity to the
            drawing's patches; "global" is the cosine of the whole drawing and the whole prompt.
        pool: of the dense form, see `pool_similarity`.
        top_k: of pool "topk".
        implied: count the phrases that a prompt implies among its key phrases: what must stay
            empty. Without them, as in the paper, nothing that is drawn too much lowers the score.
        negative_weight: of the score of the negative phrases.
    """

    encoder: PhraseEncoder
    form: Literal["dense", "global"] = "dense"
    pool: Literal["softmax", "topk", "max"] = "softmax"
    top_k: int = 2
    implied: bool = True
    negative_weight: float = 1.0
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
        asked = [self._phrases(example) for example in examples]
        unwanted = [_listed(example, "negative_phrases") for example in examples]
        known = [
            i
            for i, phrases in enumerate(asked)
            if phrases and all(map(self.encoder.knows, phrases + unwanted[i]))
        ]
        scores = torch.full((len(examples),), math.nan)
        if not known:
            return scores
        pictures, patches = self.encoder.encode_images(drawings[known].float().cpu())
        values = self._matches([asked[i] for i in known], pictures, patches)
        with_unwanted = [n for n, i in enumerate(known) if unwanted[i]]
        if with_unwanted:
            rows = torch.tensor(with_unwanted)
            captions = [unwanted[known[n]] for n in with_unwanted]
            found = self._matches(captions, pictures[with_unwanted], patches[with_unwanted])
            values = values.index_add(0, rows, found, alpha=-self.negative_weight)
        return scores.index_put((torch.tensor(known),), values)

    def _phrases(self, example: Example) -> list[str]:
        asked = _listed(example, "phrases") or self.encoder.phrases_of(example.prompt)
        return asked + self.encoder.implied_by(asked) if self.implied else asked

    def _matches(self, captions: list[list[str]], pictures: Tensor, patches: Tensor) -> Tensor:
        """[N] on the CPU, of N captions, pictures, and their patches."""
        if self.form == "global":
            return (self.encoder.encode_captions(captions) * pictures).sum(dim=1).cpu()
        phrases = self.encoder.encode_phrases([p for caption in captions for p in caption])
        drawing = torch.tensor([i for i, caption in enumerate(captions) for _ in caption])
        similarity = torch.einsum("qd,qpd->qp", phrases, patches[drawing.to(patches.device)])
        pooled = pool_similarity(similarity, self.pool, top_k=self.top_k).cpu()
        total = torch.zeros(len(captions)).index_add(0, drawing, pooled)
        return total / drawing.bincount(minlength=len(captions))


def _listed(example: Example, column: str) -> list[str]:
    given = example.extra.get(column, [])
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise ValueError(f"{column} of {example.uid!r} is {given!r}, expected a list of phrases")
    return given


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
