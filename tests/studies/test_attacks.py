from __future__ import annotations

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.rewards.semantic import SemanticReward
from lvrpo.studies.attacks import ascend, plain_attacks, scores_of, search

EXAMPLES = [Example("generate", f"g{i}", f"bright {i}") for i in range(6)]


class Brightness:
    """The reward with the best drawing of all: white."""

    name, may_be_nan = "brightness", False

    def __call__(self, samples):
        return samples.images.mean(dim=(1, 2, 3))


class Window:
    """One embedding per picture, its four quarters; a phrase "bright q" is its quarter q."""

    def phrases_of(self, prompt):
        return [prompt]

    def implied_by(self, phrases):
        return []

    def knows(self, phrase):
        return phrase.split()[1] in "0123"

    def encode_images(self, images):
        quarters = torch.nn.functional.avg_pool2d(images, 8).flatten(1)
        return quarters, quarters[:, None]

    def encode_phrases(self, phrases):
        return torch.eye(4)[[int(phrase.split()[1]) for phrase in phrases]]


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_a_search_never_loses_and_finds_what_there_is_to_find(start):
    begin = torch.full((6, 1, 16, 16), start)
    found = search(Brightness(), EXAMPLES, begin, np.random.default_rng(0), 60)
    before, after = (scores_of(Brightness(), EXAMPLES, each) for each in (begin, found))
    assert (after >= before).all()
    assert start == 1.0 or (after > before + 0.05).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert (begin == start).all()


def test_each_drawing_is_searched_for_alone():
    """What is kept is decided drawing by drawing, so no two end alike."""
    begin = torch.zeros(6, 1, 16, 16)
    found = search(Brightness(), EXAMPLES, begin, np.random.default_rng(0), 20)
    assert len({each.numpy().tobytes() for each in found}) == 6


def test_an_ascent_makes_what_the_prompt_names_as_bright_as_it_can():
    reward = SemanticReward(Window())
    found = ascend(reward, EXAMPLES, torch.zeros(6, 1, 16, 16), 20)
    quarters = torch.nn.functional.avg_pool2d(found, 8).flatten(1)
    assert torch.equal(quarters[:4], torch.eye(4))
    assert torch.equal(found[4:], torch.zeros(2, 1, 16, 16))  # of unknown words there is no score


def test_plain_attacks_are_pictures():
    found = plain_attacks(3, (2, 16, 24), np.random.default_rng(0))
    assert len(found) > 5
    for drawings in found.values():
        assert drawings.shape == (3, 2, 16, 24)
        assert drawings.min() >= 0
        assert drawings.max() <= 1
    board = found["checkerboard"]
    assert not (board[..., 1:] == board[..., :-1]).any()
