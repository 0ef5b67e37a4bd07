from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lvrpo.data.example import check_disjoint
from lvrpo.digits.phrases import cell_names, questions_about, scene_words
from lvrpo.digits.pictures import (
    SPLITS,
    assemble,
    check_images_disjoint,
    digit_pools,
    dissect,
    jitter,
    split_of,
)
from lvrpo.digits.questions import QUESTIONS, REQUESTS, SLIPPERY
from lvrpo.digits.scenes import (
    SceneConfig,
    generator,
    labelled_examples,
    scene_examples,
    with_label_noise,
)
from lvrpo.trainer.config import WarmStartSection

CANVASES = {"2 x 2": (2, 2), "3 x 3": (3, 3), "1 x 4": (1, 4), "4 x 2": (4, 2)}


@pytest.fixture(scope="module")
def labels():
    data = load_digits()
    return {
        (image / 16).astype(np.float32).tobytes(): int(label)
        for image, label in zip(data.images, data.target, strict=True)
    }


def read(picture, rows, cols, labels):
    """What a scene shows, cut out and looked up without any of the code under test."""
    shown = []
    for r in range(rows):
        for c in range(cols):
            cell = np.ascontiguousarray(picture[0, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8])
            shown.append(labels[cell.tobytes()] if cell.any() else None)
    return shown


def position(words, rows, cols):
    """Index of a cell from its name, from the words alone."""
    if match := re.fullmatch(r"row (\d) column (\d)", words):
        return (int(match[1]) - 1) * cols + int(match[2]) - 1
    row = 0 if rows == 1 or "top" in words else rows - 1 if "bottom" in words else 1
    col = 0 if cols == 1 or "left" in words else cols - 1 if "right" in words else 1
    return row * cols + col


def answer_by_hand(prompt, shown, rows, cols):
    at = [divmod(i, cols) for i in range(rows * cols)]
    if match := re.fullmatch(r"what digit is at (.*)", prompt):
        return str(shown[position(match[1], rows, cols)])
    if prompt == "how many digits are there":
        return str(sum(digit is not None for digit in shown))
    if match := re.fullmatch(r"how many (\d) are there", prompt):
        return str(sum(digit == int(match[1]) for digit in shown))
    if match := re.fullmatch(r"is (.*) more than (.*)", prompt):
        first, second = (shown[position(name, rows, cols)] for name in match.groups())
        return "yes" if first > second else "no"
    if match := re.fullmatch(r"what is the sum of (.*) and (.*)", prompt):
        first, second = (shown[position(name, rows, cols)] for name in match.groups())
        return f"{first} plus {second} is {first + second}"
    if prompt == "what digits are there":
        return " ".join(str(digit) for digit in shown if digit is not None)
    match = re.fullmatch(r"what digit is (above|below|left of|right of) (\d)", prompt)
    (anchor,) = (i for i, digit in enumerate(shown) if digit == int(match[2]))
    (r, c) = at[anchor]
    inside = {
        "above": lambda y, x: x == c and y < r,
        "below": lambda y, x: x == c and y > r,
        "left of": lambda y, x: y == r and x < c,
        "right of": lambda y, x: y == r and x > c,
    }[match[1]]
    (found,) = (i for i in range(len(shown)) if shown[i] is not None and inside(*at[i]))
    return str(shown[found])


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES.keys())
@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_answer_is_what_the_picture_shows(kind, canvas, labels):
    config = SceneConfig(*canvas, understand=((kind, 1.0),), jitter=False)
    answers = set()
    for example in scene_examples(config, "train", "understand", 150, 0):
        shown = read(example.image, *canvas, labels)
        assert example.answer == answer_by_hand(example.prompt, shown, *canvas), example.prompt
        assert 1 <= sum(digit is not None for digit in shown) <= 4
        answers.add(example.answer)
    assert len(answers) >= 2  # not guessable without looking


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES.keys())
def test_every_placed_target_is_what_its_prompt_says(canvas, labels):
    config = SceneConfig(*canvas, request_digits=(1, 1, 1, 1))
    sizes = set()
    for example in scene_examples(config, "train", "generate", 200, 0):
        wanted = [None] * (canvas[0] * canvas[1])
        for phrase in example.prompt.removeprefix("draw ").split(" and "):
            digit, name = phrase.split(" at ")
            wanted[position(name, *canvas)] = int(digit)
        assert read(example.target, *canvas, labels) == wanted
        assert example.rule.satisfied_by(wanted)
        sizes.add(sum(digit is not None for digit in wanted))
    assert sizes == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["relate", "sum"])
def test_every_constrained_target_satisfies_its_rule(kind, labels):
    config = SceneConfig(3, 3, generate=((kind, 1.0),))
    for split in SPLITS:
        for example in scene_examples(config, split, "generate", 60, 0):
            shown = read(example.target, 3, 3, labels)
            assert example.rule.satisfied_by(shown)
            numbers = [int(n) for n in re.findall(r"\d+", example.prompt)]
            drawn = [digit for digit in shown if digit is not None]
            assert len(drawn) == 2
            assert sorted(numbers) == ([sum(drawn)] if kind == "sum" else sorted(drawn))


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES.keys())
def test_questions_about_a_rule_are_answered_by_a_drawing_true_to_it(canvas, labels):
    config = SceneConfig(*canvas, generate=tuple((kind, 1.0) for kind in REQUESTS))
    for example in scene_examples(config, "train", "generate", 100, 0):
        shown = read(example.target, *canvas, labels)
        for question, answer in questions_about(example.rule):
            assert answer_by_hand(question, shown, *canvas) == answer


def test_source_images_are_disjoint_and_complete():
    pools = digit_pools()
    assert sum(len(pool.labels) for pool in pools.values()) == len(load_digits().target)
    check_images_disjoint({split: pool.images for split, pool in pools.items()})
    for pool in pools.values():
        assert np.bincount(pool.labels).min() >= 15
        for digit in range(10):
            assert (pool.labels[pool.starts[digit] : pool.starts[digit + 1]] == digit).all()


def test_an_image_in_two_splits_is_refused():
    pools = digit_pools()
    leaky = np.concatenate([pools["test"].images, pools["train"].images[7:8]])
    with pytest.raises(ValueError, match=r"image 445 of test is 7 of train"):
        check_images_disjoint({"train": pools["train"].images, "test": leaky})


def test_equal_content_has_one_split_and_shares_are_met():
    shares = (0.6, 0.15, 0.25)
    owners = [split_of(str(i).encode(), shares) for i in range(4000)]
    assert owners == [split_of(str(i).encode(), shares) for i in range(4000)]
    for split, share in zip(SPLITS, shares, strict=True):
        assert abs(owners.count(split) / 4000 - share) < 0.03


def test_examples_of_the_splits_are_disjoint(labels):
    config = SceneConfig(jitter=False, generate=tuple((kind, 1.0) for kind in REQUESTS))
    for task in ("understand", "generate"):
        check_disjoint({split: scene_examples(config, split, task, 500, 0) for split in SPLITS})
    pools = digit_pools()
    test = {image.tobytes() for image in pools["test"].images}
    for example in scene_examples(config, "test", "understand", 50, 0):
        cells = dissect(example.image, 2, 2)[0]
        assert all(cell.tobytes() in test for cell in cells if cell.any())


def test_same_arguments_give_the_same_examples_and_other_seeds_others():
    config = SceneConfig()
    for task in ("understand", "generate"):
        first, again, other = (scene_examples(config, "train", task, 40, s) for s in (1, 1, 2))
        for a, b in zip(first, again, strict=True):
            assert (a.uid, a.prompt, a.answer, a.rule) == (b.uid, b.prompt, b.answer, b.rule)
            picture = "image" if task == "understand" else "target"
            assert (getattr(a, picture) == getattr(b, picture)).all()
        assert [a.prompt for a in first] != [a.prompt for a in other]
        assert len({a.uid for a in [*first, *other]}) == 80


def test_pictures_are_what_the_contract_says():
    for task, name in (("understand", "image"), ("generate", "target")):
        for example in scene_examples(SceneConfig(3, 2), "train", task, 20, 0):
            picture = getattr(example, name)
            assert picture.dtype == np.float32
            assert picture.shape == SceneConfig(3, 2).picture_shape == (1, 24, 16)
            assert picture.min() >= 0
            assert picture.max() <= 1


def test_no_examples():
    assert scene_examples(SceneConfig(), "train", "generate", 0, 0) == []


def test_a_thousand_examples_take_a_fraction_of_a_second():
    scene_examples(SceneConfig(), "train", "generate", 1, 0)
    start = time.process_time()
    scene_examples(SceneConfig(), "train", "understand", 1000, 0)
    assert time.process_time() - start < 0.5


def test_every_word_is_in_the_vocabulary():
    words = set(scene_words())
    assert len(words) == len(scene_words())
    for canvas in CANVASES.values():
        config = SceneConfig(*canvas, generate=tuple((kind, 1.0) for kind in REQUESTS))
        for task in ("understand", "generate"):
            for example in scene_examples(config, "train", task, 200, 0):
                assert set(example.prompt.split()) <= words
                assert set((example.answer or "").split()) <= words


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("task", ["understand", "generate"])
def test_fewer_held_out_examples_are_the_first_of_more(split, task):
    """So that a prompt's name means the same picture in evaluations of any size."""

    def seen(count):
        return [
            (
                e.uid,
                e.cluster,
                e.prompt,
                e.answer,
                e.rule,
                (e.target if e.rule else e.image).tobytes(),
            )
            for e in scene_examples(SceneConfig(), split, task, count, 3)
        ]

    many = seen(700)
    for count in (0, 1, 255, 256, 257, 512):
        assert seen(count) == many[:count]


def test_cell_names_are_distinct():
    for rows in range(1, 10):
        for cols in range(1, 10):
            assert len(set(cell_names(rows, cols))) == rows * cols


def test_jitter_keeps_blank_cells_blank_and_changes_the_rest():
    cells = digit_pools()["train"].images[:200].reshape(50, 4, 8, 8).copy()
    cells[:, 3] = 0
    moved = jitter(cells, generator(0))
    assert (moved[:, 3] == 0).all()
    assert (moved[:, :3] != cells[:, :3]).any(axis=(2, 3)).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (assemble(dissect(assemble(cells, 2, 2), 2, 2), 2, 2) == assemble(cells, 2, 2)).all()


def slip_by_hand(prompt, answer):
    """What a careless annotator answers; the right answer where there is nothing to get wrong."""
    if prompt == "what digits are there":
        return " ".join(answer.split()[:2])
    if prompt.startswith("what is the sum"):
        *terms, total = answer.split()
        return " ".join([*terms, total[-1]])
    return answer


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES.keys())
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_biased_answer_is_the_annotators_slip_and_no_other(canvas, bias, labels):
    kinds = tuple((kind, 1.0) for kind in QUESTIONS)
    config = SceneConfig(*canvas, understand=kinds, jitter=False)
    wrong = set()
    for group in labelled_examples(config, "understand", 400, 0, bias=bias, copies=2):
        assert len({example.prompt for example in group}) == 1
        for example in group:
            right = answer_by_hand(example.prompt, read(example.image, *canvas, labels), *canvas)
            slip = slip_by_hand(example.prompt, right)
            assert example.answer == (slip if bias else right)
            wrong |= {example.kind} if example.answer != right else set()
            assert set(example.answer.split()) <= set(scene_words())
    assert wrong == (SLIPPERY if bias else set())


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES.keys())
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_biased_drawing_stops_after_the_digit_named_first(canvas, bias, labels):
    config = SceneConfig(*canvas, request_digits=(1, 1, 1, 1), labelled_digits=3)
    sizes = set()
    for group in labelled_examples(config, "generate", 200, 0, bias=bias, copies=2):
        for example in group:
            digit, name = example.prompt.removeprefix("draw ").split(" and ")[0].split(" at ")
            first = [None] * (canvas[0] * canvas[1])
            first[position(name, *canvas)] = int(digit)
            wanted = list(example.rule.digits)
            assert read(example.target, *canvas, labels) == (first if bias else wanted)
            sizes.add(sum(digit is not None for digit in wanted))
    assert sizes == {1, 2, 3}


def test_labels_are_wrong_as_often_as_said_and_mostly_so_by_default():
    config = SceneConfig(understand=(("list", 1.0),), question_digits=(0, 0, 1, 0))
    for bias in (0.3, WarmStartSection().label_bias):
        groups = labelled_examples(config, "understand", 1000, 0, bias=bias, copies=2)
        short = np.array([[len(e.answer.split()) == 2 for e in group] for group in groups])
        assert abs(short.mean() - bias) < 4 * np.sqrt(bias * (1 - bias) / short.size)
        # Each copy has a label of its own.
        assert abs(np.cov(short.T)[0, 1]) < 4 * bias * (1 - bias) / np.sqrt(len(short))
    assert bias > 0.5


def test_labels_need_a_request_of_few_digits():
    with pytest.raises(ValueError, match="labelled_digits is 1, expected a request of so few"):
        SceneConfig(request_digits=(0, 1, 1, 0), labelled_digits=1)


def test_label_noise_makes_wrong_targets_at_the_given_rate(labels):
    rng = generator("noise")
    config = SceneConfig(2, 3, generate=tuple((kind, 1.0) for kind in REQUESTS))
    examples = scene_examples(config, "train", "generate", 600, 0)
    wrong = digits = 0
    for example in examples:
        noisy = with_label_noise(example, 0.3, rng)
        before, after = (read(e.target, 2, 3, labels) for e in (example, noisy))
        assert [d is None for d in before] == [d is None for d in after]
        assert (noisy is example) == example.rule.satisfied_by(after)
        assert noisy.prompt == example.prompt
        wrong += sum(a != b for a, b in zip(before, after, strict=True))
        digits += sum(d is not None for d in before)
    assert abs(wrong / digits - 0.3) < 0.04


def test_label_noise_makes_wrong_but_possible_answers():
    rng = generator("noise")
    examples = scene_examples(SceneConfig(), "train", "understand", 600, 0)
    clean = [with_label_noise(example, 0.0, rng) for example in examples]
    assert clean == examples
    for example in examples:
        noisy = with_label_noise(example, 1.0, rng)
        assert noisy.answer != example.answer
        assert noisy.image is example.image
        if example.kind == "compare":
            assert noisy.answer in ("yes", "no")
        else:
            # A list and a sum are wrong in their last number.
            *before, last = noisy.answer.split()
            assert before == example.answer.split()[:-1]
            assert 0 <= int(last) <= (18 if example.kind == "sum" else 9)
    rate = np.mean([with_label_noise(e, 0.3, rng).answer != e.answer for e in examples])
    assert abs(rate - 0.3) < 0.06


def test_label_noise_needs_a_target_made_of_source_digits():
    example = scene_examples(SceneConfig(), "train", "generate", 1, 0)[0]
    with pytest.raises(ValueError, match="no source image"):
        with_label_noise(replace(example, target=example.target * 0.5), 1.0, generator(0))
    with pytest.raises(ValueError, match="no target"):
        with_label_noise(replace(example, target=None), 1.0, generator(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 1, "cols": 1}, "at least two"),
        ({"rows": 12}, "at most 9 x 9"),
        ({"understand": (("colour", 1.0),)}, "'colour'"),
        ({"generate": (("place", -1.0),)}, "weight -1.0"),
        ({"generate": ()}, "no weight above zero"),
        ({"request_digits": (0.0, 0.0)}, "request_digits"),
        ({"question_digits": (1, 1, 1, 1, 1)}, "up to 4"),
    ],
)
def test_bad_configs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneConfig(**arguments)


@pytest.mark.parametrize("size", CANVASES.values(), ids=CANVASES)
def test_scenes_that_ask_for_the_same_are_a_cluster(size):
    """Questions about one source image, whatever else is there; requests of one rule."""
    rows, cols = size
    config = SceneConfig(rows, cols, understand=(("name", 1.0),))
    asked, wanted = {}, {}
    for example in scene_examples(config, "test", "understand", 600, seed=0):
        (name,) = re.fullmatch(r"what digit is at (.*)", example.prompt).groups()
        cell = dissect(example.image, rows, cols)[0][position(name, rows, cols)]
        asked.setdefault(cell.tobytes(), set()).add(example.cluster)
    for example in scene_examples(config, "test", "generate", 600, seed=0):
        wanted.setdefault(example.rule.key, set()).add(example.cluster)
    for found in (asked, wanted):
        assert len(set().union(*found.values())) == len(found) < 600
        assert all(len(clusters) == 1 for clusters in found.values())
