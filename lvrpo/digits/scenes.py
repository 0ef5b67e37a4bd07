"""Digit scenes: real handwritten digits on a small canvas, with questions and requests to draw.

A canvas has rows x cols cells of 8 x 8 pixels and holds one to four digits. What a split may show
is fixed by hash: a source image belongs to one split, and so does a layout that is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lvrpo.data.example import Example, Skill
from lvrpo.digits.pictures import (
    SIDE,
    Split,
    assemble,
    digit_pools,
    dissect,
    jitter,
    read_source,
    split_of,
)
from lvrpo.digits.questions import EMPTY, QUESTIONS, REQUESTS, Canvas, Draft, Draw, Label
from lvrpo.digits.rules import DigitRule, digit_rule

_MAX_DIGITS = 4
_PROMPT_SHARES = (0.70, 0.10, 0.20)

Weights: TypeAlias = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class SceneConfig:
    """What the scenes look like and what is asked about them.

    Args:
        rows: of cells.
        cols: of cells.
        understand: kinds of question with their weights, of `questions.QUESTIONS`.
        generate: kinds of request with their weights, of `questions.REQUESTS`. "relate" and
            "sum" have many right drawings; a small flow model blends them, so they are off.
        question_digits: weights of 1, 2, 3, 4 digits in a picture that is asked about.
        request_digits: weights of 1, 2, 3, 4 digits in a layout that is asked for.
        labelled_digits: most digits of a request that comes with a drawing to imitate.
        jitter: shift and dim training pictures of questions a little, so that a model reads
            drawings that are not pixel copies of the source images. Targets stay exact.
    """

    rows: int = 2
    cols: int = 2
    understand: Weights = (
        ("name", 0.4),
        ("count", 0.1),
        ("count_of", 0.1),
        ("list", 0.1),
        ("relate", 0.1),
        ("compare", 0.1),
        ("sum", 0.1),
    )
    generate: Weights = (("place", 1.0),)
    question_digits: tuple[float, ...] = (0.1, 0.3, 0.3, 0.3)
    request_digits: tuple[float, ...] = (0.2, 0.5, 0.3, 0.0)
    labelled_digits: int = 2
    jitter: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.rows * self.cols < 2:
            raise ValueError(
                f"SceneConfig: canvas is {self.rows} x {self.cols} cells, expected at least two"
            )
        if max(self.rows, self.cols) > 9:
            raise ValueError(f"SceneConfig: canvas is {self.rows} x {self.cols}, at most 9 x 9")
        _check_weights("understand", self.understand, tuple(QUESTIONS))
        _check_weights("generate", self.generate, tuple(REQUESTS))
        for name in ("question_digits", "request_digits"):
            weights = getattr(self, name)
            if len(weights) > _MAX_DIGITS or min(weights, default=-1) < 0 or sum(weights) <= 0:
                raise ValueError(
                    f"SceneConfig: {name} is {weights}, expected up to {_MAX_DIGITS} weights"
                )
        if sum(self.request_digits[: max(0, self.labelled_digits)]) <= 0:
            raise ValueError(
                f"SceneConfig: labelled_digits is {self.labelled_digits}, expected a request of so "
                f"few digits among request_digits = {self.request_digits}"
            )

    @property
    def cells(self) -> int:
        """Number of cells of the canvas."""
        return self.rows * self.cols

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of every picture."""
        return 1, self.rows * SIDE, self.cols * SIDE


def scene_examples(
    config: SceneConfig, split: Split, task: Skill, count: int, seed: int
) -> list[Example]:
    """`count` examples of one task, the same for the same arguments.

    Without jitter, as held-out ones are, they are the first of any larger number of them.

    Args:
        config: canvas and mix of tasks.
        split: whose source images and requests to use.
        task: "understand" or "generate".
        count: how many, >= 0.
        seed: of the draw. Examples of other seeds have other uids.

    Raises:
        ValueError: this split has no request of a kind that `config` asks for.
    """
    key = repr(config), split, task, seed
    drafts = _draft(config, split, task, count, generator(*key))
    labels = [Label(draft.digits, draft.answer) for draft in drafts]
    # A stream of their own: more examples begin with the same ones, in the same pictures.
    return _illustrate(config, split, task, seed, drafts, labels, generator(*key, "pictures"))


def labelled_examples(
    config: SceneConfig, task: Skill, count: int, seed: int, *, bias: float, copies: int = 1
) -> list[list[Example]]:
    """`count` training examples as an annotator labelled them, each in `copies` pictures.

    A model that imitates labels which are wrong in one way more often than right is wrong at its
    mode: neither more of them nor sharper sampling mends it, which both mend independent errors.

    Args:
        config: canvas and mix of tasks; requests for more than `config.labelled_digits` digits have
            no label, so none is drawn.
        task: "understand" or "generate".
        count: how many, >= 0.
        seed: of the draw.
        bias: probability that a label is what `Draft.slip` says, where there is one; independent
            for each copy.
        copies: of each, with other source images and a label of its own.
    """
    few = replace(config, request_digits=config.request_digits[: config.labelled_digits])
    rng = generator(repr(few), "labelled", task, seed)
    drafts = [d for d in _draft(few, "train", task, count, rng) for _ in range(copies)]
    slips = rng.random(len(drafts)) < bias
    labels = [
        draft.slip if slips[i] and draft.slip else Label(draft.digits, draft.answer)
        for i, draft in enumerate(drafts)
    ]
    examples = _illustrate(few, "train", task, seed, drafts, labels, rng)
    return [examples[i : i + copies] for i in range(0, len(examples), copies)]


def _illustrate(
    config: SceneConfig,
    split: Split,
    task: Skill,
    seed: int,
    drafts: Sequence[Draft],
    labels: Sequence[Label],
    rng: np.random.Generator,
) -> list[Example]:
    pool = digit_pools()[split]
    digits = np.array([label.digits for label in labels], dtype=np.int64)
    digits = digits.reshape(len(drafts), config.cells)
    blank = len(pool.images)
    source = np.full(digits.shape, blank)
    full = digits != EMPTY
    source[full] = pool.pick(digits[full], rng.random(int(full.sum())))
    cells = np.concatenate([pool.images, np.zeros((1, SIDE, SIDE), np.float32)])[source]
    if task == "understand" and split == "train" and config.jitter:
        cells = jitter(cells, rng)
    pictures = assemble(cells, config.rows, config.cols)

    examples = []
    for index, (draft, label, picture) in enumerate(zip(drafts, labels, pictures, strict=True)):
        uid = f"{split}/{task}/{draft.kind}/{seed}.{index}"
        shown = {"image": picture, "answer": label.answer}
        wanted = {"target": picture, "rule": draft.rule}
        parts: dict[str, Any] = shown if task == "understand" else wanted
        # Who misreads the digit asked about first misreads it in every scene.
        cluster = draft.rule.key if draft.rule else f"image {source[index, draft.first]}"
        examples.append(Example(task, uid, draft.prompt, kind=draft.kind, cluster=cluster, **parts))
    return examples


def generator(*key: object) -> np.random.Generator:
    """A random stream of its own for every key, by hash."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def with_label_noise(
    example: Example,
    probability: float,
    rng: np.random.Generator,
    *,
    split: Split = "train",
) -> Example:
    """The example with a wrong answer, or wrong digits in its target, with this probability.

    Supervised data from the web is wrong in part. A model that imitates it honestly learns to be
    wrong as often, and more of the same data cannot cure it; a verifier can. With clean labels
    the supervised start is already nearly right and leaves reinforcement learning nothing to do.

    Args:
        example: of `scene_examples`.
        probability: of a wrong answer, or of each digit in the target being another one.
        rng: a stream of the caller's.
        split: whose source images the wrong digits are drawn from: the one of `example`.

    Raises:
        ValueError: the target is not made of digits of this split.
    """
    if example.task == "understand":
        if rng.random() >= probability:
            return example
        return replace(example, answer=_wrong_answer(example, rng))
    rule = digit_rule(example)
    if example.target is None or rule is None:
        raise ValueError(f"with_label_noise: {example.uid!r} has no target with a rule")
    rows, cols = (side // SIDE for side in example.target.shape[1:])
    hit = rng.random(rows * cols) < probability
    if not hit.any():
        return example
    pool = digit_pools()[split]
    cells = dissect(example.target, rows, cols)[0]
    digits = [read_source(cell, split) for cell in cells]
    wrong = [i for i, digit in enumerate(digits) if digit is not None and hit[i]]
    if not wrong:
        return example
    changed = list(digits)
    # Two wrong digits may still add up to the right sum: draw again until the rule is broken.
    while rule.satisfied_by(changed):
        for i in wrong:
            changed[i] = (int(digits[i] or 0) + int(rng.integers(1, 10))) % 10
    cells = cells.copy()
    chosen = np.array([changed[i] for i in wrong], dtype=np.int64)
    cells[wrong] = pool.images[pool.pick(chosen, rng.random(len(wrong)))]
    return replace(example, target=assemble(cells[None], rows, cols)[0])


def _wrong_answer(example: Example, rng: np.random.Generator) -> str:
    if example.answer in ("yes", "no"):
        return "no" if example.answer == "yes" else "yes"
    most = {"count": _MAX_DIGITS, "count_of": _MAX_DIGITS, "sum": 18}
    low, high = int(example.kind in ("count", "count_of")), most.get(example.kind, 9)
    *before, last = (example.answer or "0").split()  # the digits of a list, the terms of a sum
    shift = int(rng.integers(1, high - low + 1))
    return " ".join([*before, str(low + (int(last) - low + shift) % (high - low + 1))])


def _draft(
    config: SceneConfig, split: Split, task: Skill, count: int, rng: np.random.Generator
) -> list[Draft]:
    drafts: list[Draft] = []
    builders = QUESTIONS if task == "understand" else REQUESTS
    canvas, tried = Canvas(config.rows, config.cols), 0
    for kind, draw in _draws(config, task, rng):
        if len(drafts) == count:
            break
        draft = builders[kind](canvas, draw)
        if draft is None:
            continue
        # Only a request has a wording worth holding out; a question is new by its picture.
        if draft.rule is None or _prompt_split(draft.rule) == split:
            drafts.append(draft._replace(first=draw.order[0]))
            tried = 0
        elif (tried := tried + 1) > 10_000:
            raise ValueError(f"scene_examples: split {split!r} has no request of kind {kind!r}")
    return drafts


def _prompt_split(rule: DigitRule) -> Split:
    return split_of(rule.key.encode(), _PROMPT_SHARES)


def _draws(
    config: SceneConfig, task: Skill, rng: np.random.Generator
) -> Iterator[tuple[str, Draw]]:
    names, weights = zip(*getattr(config, task), strict=True)
    amounts = config.question_digits if task == "understand" else config.request_digits
    amounts = amounts[: config.cells]
    cells, chunk = np.arange(config.cells), 256
    while True:
        kinds = rng.choice(len(names), chunk, p=_normalised(weights)).tolist()
        counts = (1 + rng.choice(len(amounts), chunk, p=_normalised(amounts))).tolist()
        orders = rng.permuted(np.tile(cells, (chunk, 1)), axis=1).tolist()
        digits = rng.integers(0, 10, (chunk, min(config.cells, _MAX_DIGITS))).tolist()
        spares = rng.random(chunk).tolist()
        for kind, *choices in zip(kinds, orders, digits, counts, spares, strict=True):
            yield names[kind], Draw(*choices)


def _normalised(weights: tuple[float, ...]) -> NDArray[np.float64]:
    values = np.asarray(weights, dtype=np.float64)
    normalised: NDArray[np.float64] = values / values.sum()
    return normalised


def _check_weights(name: str, weights: Weights, kinds: tuple[str, ...]) -> None:
    for kind, weight in weights:
        if kind not in kinds:
            raise ValueError(
                f"SceneConfig: {name} has kind {kind!r}, expected one of {', '.join(kinds)}"
            )
        if not weight >= 0:
            raise ValueError(f"SceneConfig: {name} gives {kind!r} the weight {weight}")
    if not sum(weight for _, weight in weights) > 0:
        raise ValueError(f"SceneConfig: {name} has no weight above zero")
