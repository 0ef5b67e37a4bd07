"""Where prompts come from: the embedded digit scenes, or a user's JSONL files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

from lvrpo import random
from lvrpo.data.example import SKILLS, Example, Skill, check_identities_disjoint
from lvrpo.data.jsonl import JsonlExamples
from lvrpo.digits.phrases import scene_words
from lvrpo.digits.pictures import Split
from lvrpo.digits.scenes import SceneConfig, scene_examples, with_label_noise
from lvrpo.models.unified.tokenizer import Tokenizer, words_of
from lvrpo.trainer.config import ConfigError, DataSection


class Source(ABC):
    """Prompts of both tasks, drawn by seed."""

    words: Sequence[str]  # that cost one token each; all others are spelled in bytes
    picture_shape: tuple[int, int, int]  # [C, H, W]

    @staticmethod
    def from_config(section: DataSection) -> Source:
        """The source that a configuration names."""
        if section.source == "scenes":
            return SceneSource(section)
        return JsonlSource(section)

    @abstractmethod
    def examples(self, split: Split, task: Skill, count: int, seed: int) -> list[Example]:
        """`count` prompts of one task; fewer where the evaluation file has fewer."""

    @abstractmethod
    def labelled(
        self, task: Skill, count: int, noise: float, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """`count` training prompts to imitate, each as `copies` examples.

        Every label is wrong with probability `noise`, independently of its neighbours.
        """

    @abstractmethod
    def answer_range(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """[low, high) of the tokens that answers are sampled from."""

    def notes(self) -> list[str]:
        """Lines about the data that are worth reading before the first step."""
        return []


class SceneSource(Source):
    """The embedded data set; its test split has other digits and other requests."""

    def __init__(self, section: DataSection) -> None:
        self.config = SceneConfig(
            rows=section.rows,
            cols=section.columns,
            understand=tuple(section.questions.items()),
            generate=tuple(section.requests.items()),
        )
        self.words = scene_words()
        self.picture_shape = self.config.picture_shape

    def examples(self, split: Split, task: Skill, count: int, seed: int) -> list[Example]:
        """See `Source`."""
        return scene_examples(self.config, split, task, count, seed)

    def labelled(
        self, task: Skill, count: int, noise: float, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """See `Source`."""
        rng = random.stream(seed, "label noise", task)
        return [
            [with_label_noise(example, noise, rng) for _ in range(copies)]
            for example in self.examples("train", task, count, seed)
        ]

    def answer_range(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Words only: no answer needs bytes."""
        return tokenizer.word_token_range


class JsonlSource(Source):
    """A user's file; the evaluation file is separate and must not overlap with it."""

    def __init__(self, section: DataSection) -> None:
        if not section.eval_source:
            raise ConfigError(
                "data.eval_source is empty, expected the JSONL file that a run on "
                f"{section.source} is evaluated with"
            )
        self.picture_shape = (section.channels, section.height, section.width)
        self.files = {
            "train": JsonlExamples(section.source, self.picture_shape),
            "test": JsonlExamples(section.eval_source, self.picture_shape),
        }
        check_identities_disjoint(
            {
                split: zip((row["uid"] for row in file.rows), file.identities, strict=True)
                for split, file in self.files.items()
            }
        )
        rows = self.files["train"].rows
        self.words = common_words([row[text] for row in rows for text in _TEXTS if text in row])
        self._prompts = {task: _positions(self.files["train"], task) for task in SKILLS}
        self._labelled = {
            task: [i for i in self._prompts[task] if _LABELS[task] in rows[i]] for task in SKILLS
        }

    def examples(self, split: Split, task: Skill, count: int, seed: int) -> list[Example]:
        """See `Source`; within one draw a training prompt comes again only after all others."""
        if split == "test":
            return take(self.files["test"], task, count)
        if count and not self._prompts[task]:
            raise ConfigError(
                f"{self.files['train'].path}: no line has the task {task!r}; set "
                f"rollout.{task}_prompts = 0 to train without it"
            )
        return self._draw(self._prompts[task], task, count, seed)

    def labelled(
        self, task: Skill, count: int, noise: float, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """See `Source`; the file's labels are taken as they are."""
        if not self._labelled[task]:
            return []
        drawn = self._draw(self._labelled[task], task, count, seed)
        return [[example] * copies for example in drawn]

    def _draw(self, positions: Sequence[int], task: Skill, count: int, seed: int) -> list[Example]:
        if not count:
            return []
        generator = random.stream(seed, "draw", task)
        rounds, rest = divmod(count, len(positions))
        picks = [generator.permutation(len(positions)) for _ in range(rounds)]
        # Few of many are chosen without a look at the others.
        picks.append(generator.choice(len(positions), rest, replace=False))
        file = self.files["train"]
        return [file[positions[i]] for chosen in picks for i in chosen.tolist()]

    def check_pictures(self) -> None:
        """See that there is a picture to fit the latents on: a target, or that of a question.

        Raises:
            ConfigError: there is none.
        """
        file = self.files["train"]
        if not any("target" in row or "image" in row for row in file.rows):
            raise ConfigError(
                f"data.source is {str(file.path)!r}, which has no picture to fit the latents on: "
                "expected a 'target' with some drawing prompts, or some questions with an 'image'"
            )

    def notes(self) -> list[str]:
        """What part of the held-out drawing prompts are prompts of the training, word for word."""
        train, test = (
            [row["prompt"] for row in self.files[split].rows if row["task"] == "generate"]
            for split in ("train", "test")
        )
        known = set(train)
        again = [prompt for prompt in test if prompt in known]
        if not again:
            return []
        return [
            f"{len(again)} of {len(test)} held-out drawing prompts are training prompts word for "
            f"word, {again[0]!r} for one: their scores tell of new drawings, not of new prompts"
        ]

    def answer_range(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Words and bytes."""
        return tokenizer.text_token_range


_TEXTS = ("prompt", "answer")
_LABELS: dict[Skill, str] = {"understand": "answer", "generate": "target"}


def _positions(file: JsonlExamples, task: Skill) -> list[int]:
    return [i for i, row in enumerate(file.rows) if row["task"] == task]


def take(file: JsonlExamples, task: Skill, count: int) -> list[Example]:
    """The first `count` examples of one task."""
    return [file[i] for i in _positions(file, task)[:count]]


def common_words(texts: Sequence[str], most: int = 4096) -> list[str]:
    """The most frequent words, by count and then by spelling."""
    counts = Counter(word for text in texts for word in words_of(text))
    return [word for word, _ in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:most]]
