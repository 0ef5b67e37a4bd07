"""Tokenizers and processors for the tiny models of `tiny_models`, whose vocabulary they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from integrations.tiny_models import FAMILIES, IMAGE, SIGLIP, VOCABULARY, transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<image>": IMAGE}
VIDEO = 61
#: Markers that processors put around pictures, and words.
WORDS = {f"w{number}": number for number in range(3, IMAGE)}
MARKS = {"<boi>": 3, "<eoi>": 4, "<fake_token_around_image>": 5, "<global-img>": 6}
MARKS |= {"<video>": VIDEO, "<end_of_utterance>": 62}
TEMPLATE = """
{%- for message in messages %}{{ 'w10 ' }}
{%- if message['content'] is string %}{{ message['content'] + ' ' }}
{%- else %}{% for part in message['content'] %}
{{- MARK if part['type'] == 'image' else '<video> ' if part['type'] == 'video' }}
{{- part['text'] + ' ' if part['type'] == 'text' }}
{%- endfor %}{% endif %}
{%- endfor %}{{ 'w11 ' if add_generation_prompt }}"""
SIDE = SIGLIP["image_size"]


def tokenizer(mark: str = "<image> ") -> Any:
    """A token for each word, special tokens as in the models' configurations."""
    words = {name: n for name, n in WORDS.items() if n not in MARKS.values()} | MARKS | SPECIAL
    words |= {"x": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w12"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    named |= {"video_token": "<video>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="w12",
        extra_special_tokens={
            **named,
            **{name.strip("<>").replace("-", "_"): name for name in MARKS if name.startswith("<f")},
        },
        chat_template=TEMPLATE.replace("MARK", repr(mark)),
    )


class Films:
    """Frames of videos as patches for the towers of Qwen; transformers' own needs torchvision."""

    patch, merge_size, temporal_patch_size = 4, 2, 2

    def __call__(
        self, videos: Any, *, do_sample_frames: bool, video_metadata: Any, **_: Any
    ) -> dict[str, Any]:
        """Two frames to a patch, the last one twice where it is alone."""
        assert not do_sample_frames, "frames are left out"
        films = transformers.video_utils.make_batched_videos(videos)
        told = [transformers.video_utils.VideoMetadata(**each) for each in video_metadata]
        patches, grids = [], []
        for film in films:
            frames = np.asarray(film).transpose(0, 3, 1, 2) / 127.5 - 1
            frames = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
            count, channels, height, width = frames.shape
            rows, columns, p = height // self.patch, width // self.patch, self.patch
            cut = frames.reshape(count // 2, 2, channels, rows // 2, 2, p, columns // 2, 2, p)
            cut = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)  # merged patches are neighbours
            patches.append(cut.reshape(count // 2 * rows * columns, -1))
            grids.append([count // 2, rows, columns])
        return {
            "pixel_values_videos": torch.tensor(np.concatenate(patches), dtype=torch.float32),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": told,
        }


def processor(name: str) -> Any:
    """Of a family; of one that reads text alone, a tokenizer."""
    if not FAMILIES[name].image_tokens:
        return tokenizer()
    return _PROCESSORS[name]()


def _qwen(kind: str) -> Any:
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
    )
    made = tokenizer("w8 <image> w9 ")  # a picture beside another is one of its own

    class WithoutVideos(getattr(transformers, f"{kind}Processor")):  # type: ignore[misc]
        """Is made without a processor of videos."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if argument is not None:
                return super().check_argument_for_proper_class(name, argument)
            return None

    found = WithoutVideos(images, made, chat_template=made.chat_template)
    found.video_processor = Films()
    return found


def _llava() -> Any:
    made = tokenizer()
    images = transformers.CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False
    )
    return transformers.LlavaProcessor(
        images,
        made,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=made.chat_template,
    )


def _fast_vlm() -> Any:
    made = tokenizer()
    return transformers.LlavaProcessor(
        transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        made,
        patch_size=SIDE // 2,
        vision_feature_select_strategy="full",
        chat_template=made.chat_template,
    )


def _idefics() -> Any:
    made = tokenizer()
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    return transformers.Idefics3Processor(
        images, made, image_seq_len=4, chat_template=made.chat_template
    )


def _gemma() -> Any:
    made = tokenizer("<boi> ")
    images = transformers.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return transformers.Gemma3Processor(
        images, made, chat_template=made.chat_template, image_seq_length=4
    )


_PROCESSORS = {
    "qwen2_vl": lambda: _qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: _qwen("Qwen3VL"),
    "llava": _llava,
    "fast_vlm": _fast_vlm,
    "idefics3": _idefics,
    "smolvlm": _idefics,  # its own one needs a package more, for videos
    "gemma3": _gemma,
}
#: Families with a processor.
PICTURES = tuple(_PROCESSORS)
