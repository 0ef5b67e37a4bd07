"""Questions about drawings, put to a vision-language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvrpo.data.example import Example
from lvrpo.info import require
from lvrpo.rewards.knowledge import KnowledgeReward, questions_of
from lvrpo.rewards.reward import Samples


@dataclass(frozen=True, eq=False)
class VqaAnswerer:
    """A `lvrpo.rewards.parts.AnswerProbability`: p(answer | picture, question) by teacher forcing.

    Each question goes through the model alone, in its own chat format, the picture before the
    question; the answer follows without a token for its end.

    Args:
        model: an image-text-to-text model, frozen.
        processor: of its folder, with a chat template.
    """

    model: Any
    processor: Any

    @classmethod
    def from_pretrained(
        cls, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> VqaAnswerer:
        """The model of a folder, or of a name on the hub.

        Args:
            path: of the folder, with weights, processor and chat template.
            device: of the model.
            dtype: of its weights.

        Raises:
            ModuleNotFoundError: transformers is not installed.
        """
        require("transformers", extra="transformers")
        import transformers

        model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        processor = transformers.AutoProcessor.from_pretrained(path)
        return cls(model.to(device).eval().requires_grad_(False), processor)

    @torch.no_grad()
    def __call__(self, images: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """[N] fp32 on the CPU; see the class and `AnswerProbability`."""
        asked = zip(images, questions, answers, strict=True)
        return torch.tensor([self._probability(*each) for each in asked])

    def _probability(self, image: Tensor, question: str, answer: str) -> float:
        from PIL import Image

        pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        given = self.processor(text=[prompt], images=[picture], return_tensors="pt")
        tokens = self.processor.tokenizer(answer, add_special_tokens=False).input_ids
        ids = torch.tensor([tokens])
        start = given["input_ids"].shape[1]
        for name, value in given.items():
            if value.shape != (1, start):
                continue
            # The answer is text: of the types of tokens, that of text is 0.
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            given[name] = torch.cat([value, more.get(name, torch.zeros_like(ids))], dim=1)
        given = given.to(self.model.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        logits = self.model(**given).logits[0, start - 1 : -1].float()
        logprobs = logits.log_softmax(dim=-1).gather(1, ids[0, :, None].to(logits.device))
        return float(logprobs.sum().exp())


@dataclass(frozen=True)
class VqaReward:
    """Mean probability of the right answers to questions about a drawing; NaN for texts.

    The column "questions" has pairs of a question and its answer. A prompt without it is asked
    about as a whole, as VQAScore does (Lin et al. 2024, arXiv 2404.01291).

    Args:
        path: of the model's folder, or its name on the hub.
        question: about a prompt without questions; "{prompt}" stands for it.
        answer: to that question.
        device: of the model.
        dtype: of its weights, by torch's name.
    """

    path: str
    question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
    answer: str = "Yes"
    device: str = "cpu"
    dtype: str = "float32"
    name: str = field(default="vqa", init=False)
    may_be_nan: bool = field(default=True, init=False)
    _knowledge: KnowledgeReward = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        answerer = VqaAnswerer.from_pretrained(
            self.path, device=self.device, dtype=getattr(torch, self.dtype)
        )
        object.__setattr__(self, "_knowledge", KnowledgeReward(answerer, self._questions))

    def _questions(self, example: Example) -> list[tuple[str, str]]:
        whole = (self.question.replace("{prompt}", example.prompt), self.answer)
        return questions_of(example) or [whole]

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32 in [0, 1], NaN for texts."""
        return self._knowledge(samples)
