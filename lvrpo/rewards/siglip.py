"""SigLIP and SigLIP 2 of transformers as the encoder of r_sem.

Zhai et al. 2023, arXiv 2303.15343; Tschannen et al. 2025, arXiv 2502.14786. Fixed sizes
(`SiglipModel`) and NaFlex (`Siglip2Model`) alike; pictures and texts are prepared by the processor
and the tokenizer of the model's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lvrpo.info import require
from lvrpo.rewards.reward import Samples
from lvrpo.rewards.semantic import SemanticReward


@dataclass(frozen=True, eq=False)
class SiglipEncoder:
    """A `lvrpo.rewards.parts.PhraseEncoder`.

    The model pools the patches of a picture by attention, and patches alone are in no space with
    texts. Here the pooling head is given one patch at a time: the vector of a patch is that of a
    picture which is nothing but this patch, as its tower saw it among all others.

    Args:
        model: a `SiglipModel` or a `Siglip2Model`.
        image_processor: of its folder.
        tokenizer: of its folder.
        batch_size: pictures, or texts, that go through the model at a time.
        split: whether a prompt is cut into key phrases, at commas and "and"; else it is one.
    """

    model: Any
    image_processor: Any
    tokenizer: Any
    batch_size: int = 32
    split: bool = True

    def __post_init__(self) -> None:
        if not getattr(self.model.vision_model, "use_head", False):
            raise ValueError("SiglipEncoder: the model has no pooling head (vision_use_head)")

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        split: bool = True,
    ) -> SiglipEncoder:
        """The model of a folder, or of a name on the hub.

        Args:
            path: of the folder, with weights, tokenizer and image processor.
            device: of the model.
            dtype: of its weights.
            batch_size: see the class.
            split: see the class.

        Raises:
            ModuleNotFoundError: transformers is not installed.
            ValueError: it is a model of another kind.
        """
        require("transformers", extra="transformers")
        import transformers

        model = transformers.AutoModel.from_pretrained(path, dtype=dtype)
        kinds = ("siglip", "siglip2")
        if model.config.model_type not in kinds:
            raise ValueError(
                f"SiglipEncoder: {path} is a {model.config.model_type!r}, expected one of {kinds}"
            )
        return cls(
            model.to(device).eval().requires_grad_(False),
            transformers.AutoImageProcessor.from_pretrained(path),
            transformers.AutoTokenizer.from_pretrained(path),
            batch_size,
            split,
        )

    def phrases_of(self, prompt: str) -> list[str]:
        """See `PhraseEncoder`."""
        if not self.split:
            return [prompt]
        asked = re.sub(r"^\s*(?:draw|paint|generate|an? (?:photo|picture|image) of)\s+", "", prompt)
        parts = re.split(r"[,;.]\s+|\s+and\s+", asked.strip().rstrip("."))
        return [part.strip() for part in parts if part.strip()]

    def implied_by(self, phrases: Sequence[str]) -> list[str]:
        """See `PhraseEncoder`: nothing."""
        return []

    def knows(self, phrase: str) -> bool:
        """See `PhraseEncoder`: it is not longer than what the text tower reads."""
        return (
            len(self.tokenizer(phrase, padding=False, truncation=False).input_ids)
            <= self._positions
        )

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `PhraseEncoder`; on the model's device."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        found = [self._encode(part) for part in pixels.split(self.batch_size)]
        pictures, patches = (torch.cat(each) for each in zip(*found, strict=True))
        return pictures, patches

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        given = self.image_processor(
            images=list(pixels.permute(0, 2, 3, 1).numpy()),
            return_tensors="pt",
            input_data_format="channels_last",
        )
        given = {name: value.to(self.model.device) for name, value in given.items()}
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        seen = self.model.get_image_features(**given)
        patches = seen.last_hidden_state
        if "pixel_attention_mask" in given:  # drawings of one size have as many patches each
            patches = patches[:, : int(given["pixel_attention_mask"][0].sum())]
        count, each, width = patches.shape
        alone = self.model.vision_model.head(patches.reshape(count * each, 1, width))
        patches = F.normalize(alone.float(), dim=-1).unflatten(0, (count, each))
        return F.normalize(seen.pooler_output.float(), dim=-1), patches

    @torch.no_grad()
    def encode_phrases(self, phrases: Sequence[str]) -> Tensor:
        """See `PhraseEncoder`; on the model's device."""
        found = []
        for start in range(0, len(phrases), self.batch_size):
            # To full length, which is how it was trained.
            given = self.tokenizer(
                list(phrases[start : start + self.batch_size]),
                padding="max_length",
                max_length=self._positions,
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            found.append(self.model.get_text_features(**given).pooler_output.float())
        return F.normalize(torch.cat(found), dim=-1)

    def encode_captions(self, captions: Sequence[Sequence[str]]) -> Tensor:
        """See `PhraseEncoder`: the phrases one after the other, with commas between."""
        return self.encode_phrases([", ".join(phrases) for phrases in captions])

    @property
    def _positions(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)


@dataclass(frozen=True)
class SiglipReward:
    """`SemanticReward` by a SigLIP model, in memory from the moment it is made.

    Args:
        path: of the model's folder, or its name on the hub.
        form: "dense", phrase by phrase, or "global", the cosine of drawing and prompt.
        pool: of the dense form over patches: "max" (the paper's), "topk" or "softmax".
        top_k: of pool "topk".
        negative_weight: of the column "negative_phrases".
        device: of the model.
        dtype: of its weights, by torch's name.
        batch_size: pictures at a time.
    """

    path: str
    form: Literal["dense", "global"] = "dense"
    pool: Literal["softmax", "topk", "max"] = "softmax"
    top_k: int = 2
    negative_weight: float = 1.0
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 32
    name: str = field(default="siglip", init=False)
    may_be_nan: bool = field(default=True, init=False)
    _semantic: SemanticReward = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        encoder = SiglipEncoder.from_pretrained(
            self.path,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            batch_size=self.batch_size,
            split=self.form == "dense",
        )
        semantic = SemanticReward(
            encoder, self.form, self.pool, self.top_k, negative_weight=self.negative_weight
        )
        object.__setattr__(self, "_semantic", semantic)

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32, NaN for texts, and for prompts that are too long for the model."""
        return self._semantic(samples)
