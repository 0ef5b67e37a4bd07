"""Qwen2.5's tokenizer from the files of a folder; what a user writes is never a special token."""

from __future__ import annotations

import json

import pytest

from lvrpo.models.bagel import QwenTokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


def files(special=SPECIAL):
    """A byte-level tokenizer of 256 bytes, one merge and the tokens of the chat."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "hi"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("h", "i")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *special])
    config = {"tokenizer_class": "Qwen2Tokenizer"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "config.json": b'{"name": ["BAGEL-7B-MoT"],}',
    }


def test_texts_go_there_and_back():
    tokenizer = QwenTokenizer(files(), 264)
    assert (tokenizer.start, tokenizer.end, *tokenizer.markers) == (258, 259, 260, 261)
    for text in ("hi there", "Grüße, 你好 \n\t x", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("hi") == [256]
    assert tokenizer.decode([256, 259]) == "hi"


@pytest.mark.parametrize("special", SPECIAL)
def test_a_special_token_in_a_text_is_its_letters(special):
    tokenizer = QwenTokenizer(files(), 264)
    ids = tokenizer.encode(f"hi {special} hi")
    assert max(ids) <= 256
    assert tokenizer.decode(ids) == f"hi {special} hi"


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match=r"no <\|vision_start\|>, <\|vision_end\|>, expected Qwen"):
        QwenTokenizer(files(SPECIAL[:2]), 264)
    with pytest.raises(ValueError, match="a token 261, the model's vocabulary has 261"):
        QwenTokenizer(files(), 261)
    with pytest.raises(ValueError, match=r"no tokenizer.json, and not both"):
        QwenTokenizer({"config.json": b"{}"}, 264)
