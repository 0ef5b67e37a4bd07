"""A model of transformers as a policy that answers: `HuggingFacePolicy`.

Its attention is lvrpo's, in the rollout and in the update, so that a prompt and its pictures are
computed once for all answers. Nothing drops out: modules stay in evaluation mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lvrpo.data.example import Example, Skill
from lvrpo.integrations.transformers.completions import completion_states
from lvrpo.models.answer_sampler import AnswerSampler
from lvrpo.models.flow import FlowSchedule, Guidance
from lvrpo.models.huggingface.decoding import Decoding
from lvrpo.models.huggingface.layout import Prompt, PromptBuilder, TokenBatch
from lvrpo.models.huggingface.prompts import PromptReader, placeholders
from lvrpo.models.packs import GuidedPictures, Pack, PictureGroup, TextGroup, pack_groups
from lvrpo.models.protocol import Answers, Head, Outputs, Pictures
from lvrpo.models.sampling import Sampling


@dataclass(frozen=True)
class HuggingFacePolicy:
    """A `lvrpo.models.protocol.Policy` that answers and does not draw; see `from_pretrained`.

    Attributes:
        model: of transformers, with the attention "lvrpo".
        reader: of prompts.
        module: the trained parameters of the model, by their names there.
        backend: of every op but attention; None for the first that can run.
    """

    model: Any
    reader: PromptReader
    module: nn.Module
    backend: str | None = None

    @property
    def skills(self) -> frozenset[Skill]:
        """Answers."""
        return frozenset({"understand"})

    @property
    def device(self) -> torch.device:
        """Where the model reads tokens."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def network(self) -> nn.Module:
        """The model."""
        return self.model  # type: ignore[no-any-return]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers of the text model."""
        return [*self.model.get_decoder().layers]

    def renewed(self) -> HuggingFacePolicy:
        """See `lvrpo.models.protocol.Policy`."""
        return dataclasses.replace(self, module=trained_part(self.model))

    def to(self, device: torch.device) -> HuggingFacePolicy:
        """See `lvrpo.models.protocol.Policy`."""
        return dataclasses.replace(self, model=self.model.to(device))

    @property
    def answer_range(self) -> tuple[int, int]:
        """[low, high) of the tokens an answer may hold: all of them."""
        return 0, self.model.get_output_embeddings().weight.shape[0]

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Of no drawings."""
        return 0, 0

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Of no drawings."""
        return 0, 0

    def builder(self) -> PromptBuilder:
        """An empty packed buffer."""
        return PromptBuilder(placeholders(self.model.config), self.reader.end_ids[0])

    def prompt(self, example: Example) -> PromptBuilder:
        """A buffer with one prompt in it."""
        builder = self.builder()
        builder.prompt(self.reader.read(example))
        return builder

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of a complete answer, closed by the end token."""
        ids = self.reader.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.reader.end_ids[0]]

    def encode(self, images: Tensor) -> Tensor:
        """Refused: there are no latents.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self._name} cannot draw, expected no pictures to encode")

    def without_words(self, example: Example) -> PromptBuilder:
        """Refused: see `skills`.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self._name} cannot draw, expected questions alone")

    without_pictures = without_words

    def packs(
        self,
        texts: Sequence[TextGroup],
        pictures: Sequence[PictureGroup] = (),
        latents: Tensor | None = None,
        timesteps: Tensor | None = None,
        max_rows: int = 1 << 30,
        *,
        share_prompts: bool = True,
        guided: GuidedPictures | None = None,
    ) -> Iterator[Pack]:
        """See `pack_groups`; groups of pictures are refused."""
        packs = pack_groups(
            self, texts, pictures, latents, timesteps, max_rows, share_prompts=share_prompts
        )
        return (pack.to(self.device) for pack in packs)

    def forward(self, pack: Pack) -> Outputs:
        """One pass over a pack of this policy's."""
        batch = pack.batch
        assert isinstance(batch, TokenBatch)
        states = completion_states(self.model, batch.inputs(self.model.dtype))
        head = Head(
            states.weight, states.bias, self.answer_range, states.logit_scale, states.softcap
        )
        no_pictures = states.hidden.new_zeros(0, *self.latent_shape)
        return Outputs(states.hidden[0, pack.predictors], head, no_pictures)

    @torch.no_grad()
    def sample_texts(
        self,
        examples: Sequence[Example],
        group_size: int,
        *,
        sampling: Sampling,
        seed: int,
        step: int,
    ) -> Answers:
        """See `lvrpo.models.protocol.Policy`.

        Raises:
            DivergedError: the model's logits are not finite.
            ValueError: the model has no positions for a prompt and its answers.
        """
        prompts = self.check_prompts(examples, sampling.max_tokens)
        sampler = AnswerSampler(
            examples,
            group_size,
            sampling,
            prompt_ids=[prompt.token_ids for prompt in prompts],
            vocab_range=self.answer_range,
            end_ids=self.reader.end_ids,
            decode=self.decode_answer,
            device=self.device,
            seed=seed,
            step=step,
            backend=self.backend,
        )
        decoding = Decoding(self.model, self.builder, prompts, group_size)
        while True:
            ids, _ = sampler.draw(decoding.logits, decoding.row_index)
            if not len(sampler.active):
                return sampler.answers()
            decoding.append(ids, sampler.active)

    def sample_images(
        self,
        examples: Sequence[Example],
        group_size: int,
        schedule: FlowSchedule,
        *,
        start_noise: float = 1.0,
        guidance: Guidance | None = None,
        seed: int,
        step: int,
    ) -> Pictures:
        """Refused: see `skills`.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self._name} cannot draw, expected questions alone")

    def decode_answer(self, token_ids: Sequence[int]) -> str:
        """Words of a sampled answer."""
        text: str = self.reader.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def check_prompts(self, examples: Sequence[Example], max_tokens: int) -> list[Prompt]:
        """The prompts of questions that can be answered in so many tokens.

        Raises:
            ValueError: one cannot be read, see `PromptReader.read`, or the model has no positions
                for it and its answers.
        """
        prompts = [self.reader.read(example) for example in examples]
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for example, prompt in zip(examples, prompts, strict=True):
            if most is not None and len(prompt.token_ids) + max_tokens > most:
                raise ValueError(
                    f"{example.uid}: a prompt of {len(prompt.token_ids)} tokens and an answer of "
                    f"up to {max_tokens}, the model has positions for {most} "
                    "(max_position_embeddings)"
                )
        return prompts

    @property
    def _name(self) -> str:
        return f"a policy of {type(self.model).__name__}"


def trained_part(model: nn.Module) -> nn.Module:
    """The trained parameters of a model, by their names, and nothing else that it has."""
    root = nn.Module()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            *path, last = name.split(".")
            module = root
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, parameter)
    return root
