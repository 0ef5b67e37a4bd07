"""A tokenizer of a few words and models of random weights, for examples that download nothing."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

COLOURS = ("red", "green", "blue")
SPECIAL = ("<pad>", "<eos>", "<unk>", "<image>", "user:", "assistant:")
WORDS = (*SPECIAL, *COLOURS, "which", "colour", "is", "this", "say", "not", "word", "?")
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
#: Turns of a conversation, whose content is text or a list of text and images.
TEMPLATE = """
{%- for message in messages %}{{ message['role'] + ': ' }}
{%- if message['content'] is string %}{{ message['content'] + ' ' }}
{%- else %}{% for part in message['content'] %}
{{- '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endif %}
{%- endfor %}{{ 'assistant: ' if add_generation_prompt }}"""


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each of `WORDS`."""
    numbered = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        chat_template=TEMPLATE,
    )


def language_model() -> transformers.PreTrainedModel:
    """Qwen3 of two layers."""
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def processor() -> transformers.LlavaProcessor:
    """For pictures of 8 x 8 pixels: five tokens of each."""
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def vision_model() -> transformers.PreTrainedModel:
    """LLaVA of two layers on either side."""
    torch.manual_seed(0)
    eye = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        vision_config=eye,
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=WORDS.index("<image>"),
        image_seq_length=5,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)
