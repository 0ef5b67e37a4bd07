"""Detectors and colour classifiers of transformers, for GenEval's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lvrpo.info import require
from lvrpo.rewards.boxes import Box
from lvrpo.rewards.geneval import Detection, GenevalReward
from lvrpo.rewards.reward import Samples
from lvrpo.rewards.siglip import SiglipEncoder

#: Colours of GenEval's prompts.
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
#: Classes of COCO that GenEval's prompts call otherwise.
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
#: Ways to say that a thing has a colour, whose vectors are averaged.
_TEMPLATES = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")


@dataclass(frozen=True, eq=False)
class ObjectDetector:
    """A `lvrpo.rewards.geneval.Detector`: a model that transformers has for object detection.

    Args:
        model: with the classes of its training in `config.id2label`.
        image_processor: of its folder.
        least: confidence of what is told at all.
        names: what the prompts call a class, where that is another name.
        batch_size: drawings at a time.
    """

    model: Any
    image_processor: Any
    least: float = 0.3
    names: Mapping[str, str] = field(default_factory=lambda: GENEVAL_NAMES)
    batch_size: int = 16

    @classmethod
    def from_pretrained(
        cls, path: str, *, device: torch.device | str = "cpu", **options: Any
    ) -> ObjectDetector:
        """The model of a folder, or of a name on the hub.

        Args:
            path: of the folder.
            device: of the model.
            options: `least`, `names` and `batch_size`, see the class.

        Raises:
            ModuleNotFoundError: transformers is not installed.
        """
        require("transformers", extra="transformers")
        import transformers

        model = transformers.AutoModelForObjectDetection.from_pretrained(path)
        processor = transformers.AutoImageProcessor.from_pretrained(path)
        return cls(model.to(device).eval().requires_grad_(False), processor, **options)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """See `Detector`."""
        pixels = (images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        size = (pixels.shape[1], pixels.shape[2])
        found = []
        for part in pixels.split(self.batch_size):
            given = self.image_processor(
                images=list(part.numpy()), return_tensors="pt", input_data_format="channels_last"
            ).to(self.model.device)
            read = self.image_processor.post_process_object_detection(
                self.model(**given), threshold=self.least, target_sizes=[size] * len(part)
            )
            found += [self._detections(each) for each in read]
        return found

    def _detections(self, found: Mapping[str, Tensor]) -> list[Detection]:
        columns = [found[name].tolist() for name in ("boxes", "labels", "scores")]
        detections = []
        for (x1, y1, x2, y2), label, score in zip(*columns, strict=True):
            name = self.model.config.id2label[label].lower()
            box = Box(x1, y1, x2, y2, self.names.get(name, name))
            detections.append(Detection(box, score))
        return detections


@dataclass(frozen=True, eq=False)
class ObjectColors:
    """A `lvrpo.rewards.geneval.ColorClassifier`: the colour whose words are nearest to the object.

    What is outside of an object's mask is painted gray, and the picture is cut to its box, as
    GenEval does.

    Args:
        encoder: of pictures and words.
        colors: to choose from.
    """

    encoder: SiglipEncoder
    colors: Sequence[str] = COLORS

    def __call__(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """See `ColorClassifier`."""
        return [self._color(image.cpu(), each) for each in objects]

    def _color(self, image: Tensor, thing: Detection) -> str:
        if thing.mask is not None:
            image = torch.where(thing.mask.cpu(), image, torch.tensor(0x99 / 255))
        height, width = image.shape[1:]
        # At least one pixel, inside of the picture.
        left = min(max(0, int(thing.box.x1)), width - 1)
        top = min(max(0, int(thing.box.y1)), height - 1)
        right = max(left + 1, min(width, round(thing.box.x2)))
        bottom = max(top + 1, min(height, round(thing.box.y2)))
        picture, _ = self.encoder.encode_images(image[None, :, top:bottom, left:right])
        said = [
            template.format(color, thing.box.label)
            for color in self.colors
            for template in _TEMPLATES
        ]
        words = self.encoder.encode_phrases(said).unflatten(0, (len(self.colors), len(_TEMPLATES)))
        return self.colors[int((F.normalize(words.mean(dim=1), dim=-1) @ picture[0]).argmax())]


@dataclass(frozen=True)
class DetectorReward:
    """`GenevalReward` by models of transformers.

    GenEval's published scores are of a Mask2Former and of CLIP ViT-L/14; other models give others.

    Args:
        path: of a detector's folder, or its name on the hub.
        color_path: likewise of a SigLIP; empty where no prompt names a colour.
        strict_weight: see `GenevalReward`.
        device: of both.
    """

    path: str
    color_path: str = ""
    strict_weight: float = 1.0
    device: str = "cpu"
    name: str = field(default="geneval", init=False)
    may_be_nan: bool = field(default=True, init=False)
    _reward: GenevalReward = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        colors = None
        if self.color_path:
            encoder = SiglipEncoder.from_pretrained(self.color_path, device=self.device)
            colors = ObjectColors(encoder)
        detector = ObjectDetector.from_pretrained(self.path, device=self.device)
        reward = GenevalReward(detector, colors, strict_weight=self.strict_weight)
        object.__setattr__(self, "_reward", reward)

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN for texts and for drawings without such a rule."""
        return self._reward(samples)
