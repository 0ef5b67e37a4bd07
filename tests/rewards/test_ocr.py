"""Text in drawings against what was asked for."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.rewards.ocr import OcrReward, wanted_text
from lvrpo.rewards.registry import load_reward
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score


def drawing(prompt="draw", **extra):
    return Example("generate", "d", prompt, extra=extra)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("STOP", 1),
        ("one stop sign", 1),
        ("s t\no p", 1),
        ("shop", 0.75),
        ("sto", 0.75),
        ("", 0),
        ("a very long other text", 0),
    ],
)
def test_letters_that_differ_cost(found, expected):
    reward = OcrReward(lambda image: found)
    samples = Samples.of_images([drawing(text="Stop")], torch.zeros(1, 1, 8, 8))
    assert score([reward], samples)[0, 0] == pytest.approx(expected)


def test_what_is_wanted():
    assert wanted_text(drawing('a sign that says "Hello" and "World"')) == "Hello World"
    assert wanted_text(drawing("a sign that says “Hello”")) == "Hello"
    assert wanted_text(drawing('a "sign"', text="other")) == "other"
    assert wanted_text(drawing("it's a sign")) == ""
    with pytest.raises(ValueError, match="text of 'd' is 3, expected a string"):
        wanted_text(drawing(text=3))


def test_what_asks_for_no_text_has_no_score():
    image = np.zeros((1, 8, 8), np.float32)
    asked = [
        Example("understand", "q", "what", image=image, answer="x"),
        drawing(),
        drawing(text="x"),
    ]
    samples = Samples(asked, ["x", None, None], torch.rand(2, 1, 8, 8), [1, 2])
    seen = []
    found = score([OcrReward(lambda image: seen.append(image) or "x")], samples)[:, 0]
    assert found.isnan().tolist() == [True, True, False]
    assert torch.equal(torch.stack(seen), samples.images[1:])


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is not None, reason="it is there")
def test_without_the_engine_the_error_says_what_to_install():
    with pytest.raises(RewardError, match=r"not installed: rapidocr.*pip install 'lvrpo\[ocr\]'"):
        load_reward("ocr")


def test_rapidocr_reads_a_word():
    pytest.importorskip("rapidocr")
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("L", (320, 96), "white")
    ImageDraw.Draw(page).text((20, 20), "HELLO", "black", ImageFont.load_default(48))
    pixels = torch.from_numpy(np.asarray(page, np.float32) / 255)[None, None]
    blank = torch.ones_like(pixels)
    samples = Samples.of_images([drawing(text="hello")] * 2, torch.cat([pixels, blank]))
    assert score([load_reward("ocr")], samples)[:, 0].tolist() == [1, 0]
