"""Where prompts come from: the embedded digit scenes, or a user's JSONL files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from lvrpo import random
from lvrpo.data.digits import Split
from lvrpo.data.example import Example, Task, check_disjoint
from lvrpo.data.jsonl import JsonlExamples
from lvrpo.data.phrases import scene_words
from lvrpo.data.scenes import SceneConfig, scene_examples, with_label_noise
from lvrpo.models.tokenizer import Tokenizer
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
    def examples(self, split: Split, task: Task, count: int, seed: int) -> list[Example]:
        """`count` prompts of one task; fewer where the evaluation file has fewer."""

    @abstractmethod
    def labelled(
        self, task: Task, count: int, noise: float, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """`count` training prompts to imitate, each as `copies` examples.

        Every label is wrong with probability `noise`, independently of its neighbours.
        """

    @abstractmethod
    def answer_range(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """[low, high) of the tokens that answers are sampled from."""


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

    def examples(self, split: Split, task: Task, count: int, seed: int) -> list[Example]:
        """See `Source`."""
        return scene_examples(self.config, split, task, count, seed)

    def labelled(
        self, task: Task, count: int, noise: float, seed: int, copies: int = 1
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
            "train": list(JsonlExamples(section.source, self.picture_shape)),
            "test": list(JsonlExamples(section.eval_source, self.picture_shape)),
        }
        check_disjoint(self.files)
        texts = [
            text
            for example in self.files["train"]
            for text in (example.prompt, example.answer)
            if text
        ]
        self.words = common_words(texts)

    def examples(self, split: Split, task: Task, count: int, seed: int) -> list[Example]:
        """See `Source`; within one draw a training prompt comes again only after all others."""
        of_task = [example for example in self.files[split] if example.task == task]
        if split == "test":
            return of_task[:count]
        return self._draw(of_task, task, count, seed)

    def labelled(
        self, task: Task, count: int, noise: float, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """See `Source`; the file's labels are taken as they are."""
        of_task = [
            example
            for example in self.files["train"]
            if example.task == task and (example.answer or example.target is not None)
        ]
        drawn = self._draw(of_task, task, count, seed) if of_task else []
        return [[example] * copies for example in drawn]

    def _draw(self, of_task: list[Example], task: Task, count: int, seed: int) -> list[Example]:
        if count and not of_task:
            raise ConfigError(f"data: the training file has no {task} example")
        generator = random.stream(seed, "draw", task)
        picks: list[int] = []
        while len(picks) < count:
            picks += generator.permutation(len(of_task)).tolist()
        return [of_task[i] for i in picks[:count]]

    def answer_range(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Words and bytes."""
        return tokenizer.text_token_range


class EvaluationFile(Source):
    """Another source, evaluated on a JSONL file."""

    def __init__(self, source: Source, path: Path) -> None:
        self.source = source
        self.words, self.picture_shape = source.words, source.picture_shape
        self.test = list(JsonlExamples(path, source.picture_shape))

    def examples(self, split: Split, task: Task, count: int, seed: int) -> list[Example]:
        """See `Source`."""
        if split == "test":
            return [example for example in self.test if example.task == task][:count]
        return self.source.examples(split, task, count, seed)

    def labelled(
        self, task: Task, count: int, noise: float, seed: int, copies: int = 1
    ) -> list[list[Example]]:
        """See `Source`."""
        return self.source.labelled(task, count, noise, seed, copies)

    def answer_range(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """See `Source`."""
        return self.source.answer_range(tokenizer)


def common_words(texts: Sequence[str], most: int = 4096) -> list[str]:
    """The most frequent words of ASCII letters and digits, by count and then by spelling."""
    import re
    from collections import Counter

    counts = Counter(word for text in texts for word in re.findall(r"[A-Za-z0-9]+", text))
    return [word for word, _ in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:most]]
