"""From examples to prompts, by the processor and the chat template of a model's folder.

Whatever a folder's parts disagree about, and whatever a processor would take away from a picture,
is refused here, before a token is sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lvrpo.data.example import Example, Picture, Video
from lvrpo.data.marks import parts_of
from lvrpo.integrations.prompt_groups import PER_TOKEN, image_positions
from lvrpo.models.huggingface.layout import Prompt

#: Models, by `model_type`, in which a picture sees itself whole, by its tokens of type 1.
WHOLE_PICTURES = frozenset({"gemma3"})
#: Models whose prompts see themselves whole.
WHOLE_PROMPTS = frozenset({"paligemma"})
LAID_OUT = WHOLE_PICTURES | WHOLE_PROMPTS
#: Inputs that say what kind of token each is.
TYPES = ("token_type_ids", "mm_token_type_ids")
#: What positions go by, and nothing else.
POSITIONS_ALONE = ("second_per_grid_ts",)
#: Of a side, that a crop may take for rounding.
CROPPED_PIXELS = 1


class PromptReader:
    """Makes prompts for a model.

    Args:
        model: of transformers.
        processor: of its folder; a tokenizer for a model that reads text alone.
        chat: whether a prompt is a turn of a user in the folder's chat template, that the model
            answers; False: it is the beginning of a text.

    Raises:
        ValueError: the parts disagree about tokens, there is no end token, or no chat template, or
            one that fails or leaves words out.
    """

    def __init__(self, model: Any, processor: Any, *, chat: bool = True) -> None:
        self.model, self.processor, self.chat = model, processor, chat
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.has_pictures = processor is not self.tokenizer
        self.kind = model.config.model_type
        #: tokens that end an answer; the first closes answers to imitate
        self.end_ids = end_ids(model, self.tokenizer)
        check_tokens(model, processor)
        if chat and not getattr(processor, "chat_template", None):
            raise ValueError(
                f"the {type(processor).__name__} has no chat template, expected one in the folder "
                "(chat_template.jinja), or prompts that are plain text: chat=False"
            )
        if chat:
            self._check_template()

    def read(self, example: Example) -> Prompt:
        """The prompt of a question.

        Raises:
            ValueError: it has pictures or videos that the model cannot read, or not whole; or no
                tokens.
        """
        self._check_shown(example)
        try:
            return self.encode(self._content(example))
        except ValueError as error:
            raise ValueError(f"{example.uid}: {error}") from error

    def _check_template(self) -> None:
        words = "words of a question"
        text = self._templated([{"type": "text", "text": words}])
        if words not in text:
            raise ValueError(
                f"the chat template makes {text!r} of the user's turn {words!r}, expected these "
                "words in it"
            )

    def _check_shown(self, example: Example) -> None:
        """See that a model reads the pictures and videos of a prompt, and all of each."""
        for name, count in (("picture", len(example.images)), ("video", len(example.videos))):
            if count and not self.has_pictures:
                raise ValueError(
                    f"{example.uid}: the question has a {name}, and a {self.kind} reads text "
                    "alone, expected a folder with a vision-language model and its processor"
                )
        if example.videos and getattr(self.processor, "video_processor", None) is None:
            raise ValueError(
                f"{example.uid}: the question has a video, and the "
                f"{type(self.processor).__name__} reads pictures alone, expected a folder with a "
                "processor of videos, for which transformers needs torchvision; or 'images'"
            )
        for picture in example.images:
            check_crop(self.processor.image_processor, picture, example.uid)
        for frames, _ in example.videos:
            check_crop(self.processor.video_processor, frames[0], example.uid)

    def _content(self, example: Example) -> list[dict[str, Any]]:
        """Parts of a turn, as chat templates of transformers take them."""
        if not self.has_pictures:  # to which a mark is a word
            return [{"type": "text", "text": example.prompt}]
        content: list[dict[str, Any]] = []
        for part in parts_of(example):
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif isinstance(part, Video):
                frames = [as_image(frame) for frame in part.frames]
                content.append({"type": "video", "video": frames, "fps": part.fps})
            else:
                content.append({"type": "image", "image": as_image(part)})
        return content

    def encode(self, content: Sequence[Mapping[str, Any]]) -> Prompt:
        """A prompt of parts, as chat templates of transformers take them.

        Args:
            content: of a user's turn, {"type": "text", "text": ...}, {"type": "image", "image": a
                PIL image} or {"type": "video", "video": PIL images, "fps": a number}.

        Raises:
            ValueError: there are no tokens, or not those of every picture; or a picture is larger
                than the model has positions for.
        """
        inputs = self._encoded(content)
        check_positions(self.model.config, inputs)
        prompt = self.of_inputs(inputs)
        expected = sum(part["type"] == "image" for part in content)
        token = image_token_id(self.model.config)
        found = sum(token == each for each in prompt.token_ids)
        if found < expected:
            raise ValueError(
                f"the processor left {found} tokens of {expected} pictures, expected one of each "
                "at least: it truncates, or the chat template leaves pictures out"
            )
        return prompt

    def of_inputs(self, inputs: Mapping[str, Any]) -> Prompt:
        """A prompt of what a processor returned for it.

        Args:
            inputs: of the model for a batch of one, without padding.

        Raises:
            ValueError: there are no tokens.
        """
        tensors = {name: torch.as_tensor(values) for name, values in inputs.items()}
        ids: list[int] = tensors["input_ids"][0].tolist()
        if not ids:
            raise ValueError("the prompt has no tokens, expected one at least")
        types, pictures = {}, {}
        if self.has_pictures:
            types = {name: tensors[name][0] for name in TYPES if name in tensors}
            others = (*PER_TOKEN, *POSITIONS_ALONE)
            pictures = {name: values for name, values in tensors.items() if name not in others}
        positions, after = self._positions(tensors)
        return Prompt(ids, self._spans(ids, types), positions, after, types, pictures)

    def _templated(self, content: Sequence[Mapping[str, Any]], **how: Any) -> Any:
        """The text of a user's turn, or what the processor makes of it where `how` is named."""
        parts = words_of(content) if not self.has_pictures else list(content)
        turns = [{"role": "user", "content": parts}]
        form = partial(self.processor.apply_chat_template, turns, add_generation_prompt=True)
        try:  # a template is a program, which may raise anything
            text = form(tokenize=False)
        except Exception as error:
            taken = "a list of parts" if self.has_pictures else "a text"
            raise ValueError(
                f"the chat template refuses a user's turn: {type(error).__name__}: {error}; "
                f"expected one that takes {taken} as content (chat_template.jinja of the folder), "
                "or prompts that are plain text: chat=False"
            ) from error
        return form(tokenize=True, return_dict=True, **how) if how else text

    def _encoded(self, content: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        how: dict[str, Any] = {"return_tensors": "pt"}
        found: Mapping[str, Any]
        videos = [part for part in content if part["type"] == "video"]
        of_videos = of_whole_videos(videos) if videos else {}
        if self.chat:
            how |= {"processor_kwargs": of_videos} if of_videos else {}
            found = self._templated(content, **how)
            return found
        if not self.has_pictures:
            found = self.tokenizer(words_of(content), **how)
            return found
        marked = "".join(
            part["text"]
            if part["type"] == "text"
            else getattr(self.processor, f"{part['type']}_token")
            for part in content
        )
        shown = [part["image"] for part in content if part["type"] == "image"]
        films = [part["video"] for part in videos]
        found = self.processor(
            text=[marked], images=shown or None, videos=films or None, **of_videos, **how
        )
        return found

    def _positions(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """[D, P], and the position of what comes next."""
        count = inputs["input_ids"].shape[1]
        # A token more, of text, shows where the model goes on.
        longer = {
            name: pad(values, (0, 1)) if name in PER_TOKEN else values
            for name, values in inputs.items()
            if name != "attention_mask"
        }
        positions = image_positions(self.model, longer)
        if positions is None:
            return torch.arange(count)[None], count
        return positions[:, 0, :count], int(positions[0, 0, count])

    def _spans(self, ids: Sequence[int], types: Mapping[str, Tensor]) -> list[tuple[int, str]]:
        if self.kind in WHOLE_PROMPTS:
            return [(len(ids), "full")]
        if self.kind not in WHOLE_PICTURES:
            return [(len(ids), "causal")]
        runs = itertools.groupby(types["token_type_ids"].tolist(), lambda kind: kind == 1)
        return [(len([*run]), "full" if whole else "causal") for whole, run in runs]


def words_of(content: Sequence[Mapping[str, Any]]) -> str:
    """The text of a turn's parts."""
    return "".join(part["text"] for part in content if part["type"] == "text")


def as_image(picture: Picture) -> Any:
    """[C, H, W] in [0, 1] as an RGB image of PIL, in its own size."""
    from PIL import Image

    pixels = np.round(picture * 255).astype(np.uint8)
    if len(pixels) == 1:
        pixels = np.repeat(pixels, 3, axis=0)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def of_whole_videos(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of a processor for videos whose frames are all read, at the times they are of."""
    told = [
        {
            "fps": part["fps"],
            "total_num_frames": len(part["video"]),
            "frames_indices": list(range(len(part["video"]))),
        }
        for part in parts
    ]
    return {"do_sample_frames": False, "video_metadata": told}


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens at which the model's own `generate` ends; that of the tokenizer first.

    Raises:
        ValueError: there is none.
    """
    ends = as_ids(model.generation_config.eos_token_id)
    ends = ends or as_ids(model.config.get_text_config().eos_token_id)
    own = tokenizer.eos_token_id
    if own in ends or (not ends and own is not None):
        ends = [own, *(token for token in ends if token != own)]
    if not ends:
        raise ValueError(
            "neither the model nor the tokenizer has an end token (eos_token_id), expected one"
        )
    return tuple(ends)


def as_ids(found: int | Collection[int] | None) -> list[int]:
    """What configurations hold: no token, one, or several."""
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def image_token_id(config: Any) -> int | None:
    """The token that a picture's place is held by; its name differs between configurations."""
    names = ("image_token_id", "image_token_index")
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def placeholders(config: Any) -> frozenset[int]:
    """Tokens that hold the places of pictures and videos."""
    video = (getattr(config, name, None) for name in ("video_token_id", "video_token_index"))
    return frozenset(token for token in (image_token_id(config), *video) if token is not None)


def check_tokens(model: Any, processor: Any) -> None:
    """See that a model and its tokenizer mean the same tokens.

    Raises:
        ValueError: the tokenizer has tokens beyond the vocabulary, or another special token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer has tokens up to {largest} and the model embeddings for {vocabulary}, "
            "expected a tokenizer of this model, or resized embeddings (resize_token_embeddings)"
        )
    text = model.config.get_text_config()
    ends = {*as_ids(model.generation_config.eos_token_id), *as_ids(text.eos_token_id)}
    pairs = [
        ("eos_token_id", ends, tokenizer.eos_token_id),
        ("bos_token_id", {*as_ids(text.bos_token_id)}, tokenizer.bos_token_id),
    ]
    if processor is not tokenizer:
        image = {*as_ids(image_token_id(model.config))}
        pairs += [("image_token_id", image, token) for token in processor.image_token_ids]
    for name, ours, theirs in pairs:
        if ours and theirs is not None and theirs not in ours:
            raise ValueError(
                f"the model's {name} is {' or '.join(map(str, sorted(ours)))} and that of the "
                f"{type(processor).__name__} is {theirs} "
                f"({tokenizer.convert_ids_to_tokens(theirs)!r}), expected the same token"
            )


def check_crop(image_processor: Any, picture: Picture, uid: str) -> None:
    """See that a processor reads all of a picture.

    Raises:
        ValueError: it would cut some of it off.
    """
    if not getattr(image_processor, "do_center_crop", False):
        return
    crop = image_processor.crop_size
    height, width = picture.shape[1:]
    if getattr(image_processor, "do_resize", False):
        size = image_processor.size
        if shortest := size.get("shortest_edge"):
            scale = shortest / min(height, width)
            height, width = int(height * scale), int(width * scale)
        elif "height" in size:
            height, width = size["height"], size["width"]
    if height > crop["height"] + CROPPED_PIXELS or width > crop["width"] + CROPPED_PIXELS:
        raise ValueError(
            f"{uid}: the processor crops a picture of {height} x {width} to {crop['height']} x "
            f"{crop['width']} pixels, expected all of it to be read: pad pictures to its shape, or "
            "set do_center_crop to false and a size of two sides in preprocessor_config.json"
        )


def check_positions(config: Any, inputs: Mapping[str, Any]) -> None:
    """See that a tower of a fixed grid has positions for what a processor made of pictures.

    Args:
        config: of the model.
        inputs: of the model; pixels are [..., H, W], or patches, whose towers take any size.

    Raises:
        ValueError: it has not.
    """
    most = getattr(getattr(config, "vision_config", None), "image_size", None)
    for name in ("pixel_values", "pixel_values_videos"):
        shape = tuple(inputs[name].shape) if name in inputs else ()
        if len(shape) < 4 or not isinstance(most, int):
            continue
        if max(shape[-2:]) > most:
            raise ValueError(
                f"the processor makes pictures of {shape[-2]} x {shape[-1]} pixels and the model "
                f"has positions for {most} x {most} (image_size of its tower), expected a size of "
                "at most that in preprocessor_config.json"
            )
