"""Tokenizers and processors for the tiny models of `tiny_models`, whose vocabulary they share."""

from __future__ import annotations

from typing import Any

from integrations.tiny_models import FAMILIES, IMAGE, SIGLIP, VOCABULARY, transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<image>": IMAGE}
#: Markers that processors put around pictures, and words.
WORDS = {f"w{number}": number for number in range(3, IMAGE)}
MARKS = {"<boi>": 3, "<eoi>": 4, "<fake_token_around_image>": 5, "<global-img>": 6}
MARKS |= {"<video>": 61, "<end_of_utterance>": 62}
TEMPLATE = """
{%- for message in messages %}{{ 'w10 ' }}
{%- if message['content'] is string %}{{ message['content'] + ' ' }}
{%- else %}{% for part in message['content'] %}
{{- MARK if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endif %}
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


def processor(name: str) -> Any:
    """Of a family; of one that reads text alone, a tokenizer."""
    if not FAMILIES[name].image_tokens:
        return tokenizer()
    return _PROCESSORS[name]()


def _qwen(kind: str) -> Any:
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
    )
    made = tokenizer()

    class WithoutVideos(getattr(transformers, f"{kind}Processor")):  # type: ignore[misc]
        """The processor of videos needs torchvision."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if argument is not None:
                return super().check_argument_for_proper_class(name, argument)
            return None

    return WithoutVideos(images, made, chat_template=made.chat_template)


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
    "idefics3": _idefics,
    "smolvlm": _idefics,  # its own one needs a package more, for videos
    "gemma3": _gemma,
}
#: Families with a processor.
PICTURES = tuple(_PROCESSORS)
