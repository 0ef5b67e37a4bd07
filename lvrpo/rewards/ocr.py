"""Text in drawings: an OCR engine reads it, and it is compared with what was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.info import require
from lvrpo.rewards.distance import edit_distance
from lvrpo.rewards.reward import Samples

#: [C, H, W] in [0, 1] to the text that is read in it.
TextReader: TypeAlias = Callable[[Tensor], str]
#: Column with the text that a drawing must show.
TEXT = "text"


@dataclass
class RapidOcr:
    """RapidOCR's models on ONNX Runtime, `pip install 'lvrpo[ocr]'`; loaded with the first drawing.

    Args:
        options: of `rapidocr.RapidOCR`, by name.
    """

    options: dict[str, Any] = field(default_factory=dict)
    _engine: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require("rapidocr", "onnxruntime", extra="ocr")

    def __call__(self, image: Tensor) -> str:
        """See `TextReader`."""
        if self._engine is None:
            from rapidocr import RapidOCR

            self._engine = RapidOCR(params=self.options or None)
        pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        found = self._engine(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
        return " ".join(found.txts or ())


@dataclass(frozen=True)
class OcrReward:
    """1 - min(edit distance, n) / n for a wanted text of n letters; 1 where the drawing has it.

    Blanks and case do not count. What is wanted is the column "text", or else what the prompt has
    in double quotes; NaN without either. This is the OCR reward of Flow-GRPO.

    Args:
        read: reads a drawing; None is `RapidOcr`.
    """

    read: TextReader | None = None
    name: ClassVar[str] = "ocr"
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.read is None:
            object.__setattr__(self, "read", RapidOcr())

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN for texts and where no text is asked for."""
        assert self.read is not None
        scores = torch.full((len(samples),), math.nan)
        images: Sequence[Tensor] = () if samples.images is None else list(samples.images)
        for image, at in zip(images, samples.image_index, strict=True):
            wanted = _letters(wanted_text(samples.examples[at]))
            if wanted:
                found = _letters(self.read(image))
                distance = 0 if wanted in found else edit_distance(found, wanted)
                scores[at] = 1 - min(distance, len(wanted)) / len(wanted)
        return scores


def wanted_text(example: Example) -> str:
    """The text that a drawing must show; empty where none is asked for.

    Raises:
        ValueError: the column "text" is no string.
    """
    given = example.extra.get(TEXT)
    if given is None:
        return " ".join(re.findall(r'["“]([^"“”]+)["”]', example.prompt))
    if not isinstance(given, str):
        raise ValueError(f"{TEXT} of {example.uid!r} is {given!r}, expected a string")
    return given


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()
