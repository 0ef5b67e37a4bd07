from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvrpo.data.words import words_of
from lvrpo.digits.phrases import scene_words
from lvrpo.digits.scenes import SceneConfig, scene_examples
from lvrpo.models.unified.tokenizer import (
    BOS,
    CONTROL_TOKENS,
    EOS,
    FIRST_BYTE,
    IMAGE,
    PAD,
    Tokenizer,
)

WORDS = Tokenizer(scene_words())
TEXTS = st.one_of(
    st.text(st.characters()),  # lone surrogates too
    st.lists(st.sampled_from([*WORDS.words, " ", "  ", "\n", "Draw", "é", "<eos>", "3a"])).map(
        "".join
    ),
    st.lists(st.sampled_from([*WORDS.words, "xyz", "", "?"])).map(" ".join),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_round_trip(text):
    ids = WORDS.encode(text)
    assert WORDS.decode(ids) == text
    low, high = WORDS.text_token_range
    assert all(low <= token < high and token != EOS for token in ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(WORDS) - 1)))
def test_any_sampled_ids_decode(ids):
    text = WORDS.decode(ids)
    assert WORDS.decode(WORDS.encode(text)) == text


def test_a_known_word_costs_one_token():
    for task in ("understand", "generate"):
        for example in scene_examples(SceneConfig(), "train", task, 50, 0):
            assert len(WORDS.encode(example.prompt)) == len(example.prompt.split())
            answer = example.answer or ""
            assert len(WORDS.encode(answer)) == len(answer.split())


#: Letters and digits of many scripts, with the marks that make up their words.
WORDS_OF_THE_WORLD = [
    *["t-shirt", "top-left", "x2-3b", "R2", "été", "e\u0301te\u0301", "Straße", "naïve-ish"],
    *[
        "рубашка",
        "сине-зелёный",
        "ποδήλατο",
        "ελληνικά",
        "חולצה",
        "שָׁלוֹם",
        "قميص",
        "مُحَمَّد",
        "हिन्दी",
        "লাল",
    ],
    *[
        "சிவப்பு",
        "ไทย",
        "ผู้ชาย",
        "시험",
        "左上",
        "ひらがな",
        "一二三",
        "٣٤",
        "ქართული",
        "հայերեն",
        "ភាសា",
    ],
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(WORDS_OF_THE_WORLD), min_size=1, max_size=6))
def test_every_word_of_a_data_file_can_be_one_token(words):
    text = " ".join(words)
    assert words_of(text) == words
    assert words_of(f"«{text}», \u201c{text}\u201d: {text}?") == words * 3
    tokenizer = Tokenizer(sorted(set(words)))
    assert len(tokenizer.encode(text)) == len(words)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()), st.text(st.characters()))
def test_whatever_the_words_of_a_text_are_the_round_trip_is_exact(text, other):
    tokenizer = Tokenizer(dict.fromkeys(words_of(text)))
    for each in (text, other, text + " " + other, f"{other} {text}"):
        assert tokenizer.decode(tokenizer.encode(each)) == each


def test_ranges_keep_control_tokens_out_of_text():
    low, high = WORDS.text_token_range
    assert all(token < low for token in (PAD, BOS, IMAGE))
    assert low <= EOS < high == len(WORDS)
    assert WORDS.word_token_range == (EOS, len(WORDS))
    for name in CONTROL_TOKENS:
        assert min(WORDS.encode(name)) >= FIRST_BYTE


def test_control_tokens_are_left_out_of_text():
    seven, three = WORDS.encode("7")[0], WORDS.encode("3")[0]
    assert WORDS.decode([BOS, seven, IMAGE, three, EOS, PAD]) == "7 3"
    assert [WORDS.name(token) for token in (PAD, FIRST_BYTE + 65, EOS, seven)] == [
        "<pad>",
        "<0x41>",
        "<eos>",
        "7",
    ]


def test_json_and_fingerprint():
    again = Tokenizer.from_json(WORDS.to_json())
    assert again == WORDS
    assert again.fingerprint == WORDS.fingerprint
    assert Tokenizer(["a", "b"]).fingerprint == "3204e036023cbdfc8829bee4011be49a"
    assert Tokenizer(["b", "a"]).fingerprint != Tokenizer(["a", "b"]).fingerprint
    with pytest.raises(ValueError, match="format 1"):
        Tokenizer.from_json("[]")


@pytest.mark.parametrize(
    "words",
    [["a", "a"], ["a b"], [""], ["«"], ["é-"], ["-left"], ["a_b"], ["top--left"], ["\ud800"]],
)
def test_bad_words_are_refused(words):
    with pytest.raises(ValueError, match="Tokenizer"):
        Tokenizer(words)


@pytest.mark.parametrize("token", [-1, len(WORDS)])
def test_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match="is not in"):
        WORDS.decode([token])
