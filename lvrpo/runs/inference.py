"""What the commands ask of a trained run: a score on held-out data, a drawing, an answer."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lvrpo.data.example import SKILLS, Example
from lvrpo.data.jsonl import DataError, load_picture
from lvrpo.data.words import words_of
from lvrpo.intervals import wilson_interval
from lvrpo.models.protocol import Policy
from lvrpo.rewards.reward import RewardError
from lvrpo.runs.changes import fingerprint
from lvrpo.runs.checkpoint import load_newest
from lvrpo.runs.config_file import load_config
from lvrpo.runs.directory import RunDirectoryError, is_run, require_format
from lvrpo.runs.evals import evaluation_row
from lvrpo.runs.gallery import save_enlarged
from lvrpo.runs.log import Row
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.scores import eval_rewards, eval_scores
from lvrpo.runs.setup import FrozenParts, Setup
from lvrpo.trainer.evaluate import Planned, held_out, measure_all
from lvrpo.trainer.sampling import as_trained, headline
from lvrpo.trainer.schedule import flow_schedule
from lvrpo.trainer.state import load_weights
from lvrpo.trainer.task import Rewards, Task

#: First words that tell a question, and a request to draw, in English.
_QUESTIONS = frozenset(
    ("what", "which", "who", "where", "when", "why", "how", "is", "are", "does", "do", "can", "has")
)
_REQUESTS = frozenset(("draw", "paint", "sketch", "create", "generate", "render", "make"))
_NAMED = 5  # unknown words that are told one by one


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run on held-out prompts.

    Args:
        row: counts, keyed as a row of evals.jsonl.
        notes: what a reader of the scores should know.
    """

    row: Row
    notes: list[str]

    def lines(self) -> list[str]:
        """One line per score and reward, with its 95 % interval."""
        rates = [
            f"{name:<32} {each['rate']:6.1%}  [{each['low']:.1%}, {each['high']:.1%}]  "
            f"of {each['total']}"
            for name, each in self.scores().items()
        ]
        means = [
            f"{name:<32} {each['mean']:6.4g}  [{each['low']:.4g}, {each['high']:.4g}]  "
            f"of {each['count']}"
            for name, each in self.rewards().items()
        ]
        return rates + means

    def to_json(self) -> str:
        """Scores and rewards; an interval that too few prompts tell of is null."""
        found = {"scores": self.scores(), "rewards": self.rewards()}
        for reward in found["rewards"].values():
            reward |= {key: None for key in ("low", "high") if math.isnan(reward[key])}
        return json.dumps(found, indent=1, allow_nan=False)

    def rewards(self) -> dict[str, dict[str, Any]]:
        """{"reward/<task>/<name>": mean, low and high of its 95 % interval, count}."""
        found = {}
        for (task, name), mean in eval_rewards(self.row).items():
            low, high = mean.interval()
            values = {"mean": mean.value, "low": low, "high": high, "count": mean.count}
            found[f"reward/{task}/{name}"] = values
        return found

    def scores(self) -> dict[str, dict[str, Any]]:
        """{"<task>/<measure>": rate, low and high of its 95 % interval, total}."""
        found = {}
        for score in eval_scores(self.row):
            low, high = wilson_interval(score.successes, score.total)
            rate = score.successes / score.total
            found[score.name] = {"rate": rate, "low": low, "high": high, "total": score.total}
        return found


def load_policy(directory: Path) -> tuple[Setup, FrozenParts, Policy]:
    """The averaged weights of a run's newest checkpoint, ready to sample from.

    Raises:
        RunDirectoryError: not a run, or no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
    """
    if not is_run(directory):
        raise RunDirectoryError(f"{directory} is not a run: it has no config.toml")
    require_format(directory)
    config = load_config(directory / "config.toml")
    setup = Setup(config)
    parts, newest = setup.saved_parts(directory), load_newest(directory / "checkpoints")
    if parts is None or newest is None:
        raise RunDirectoryError(f"{directory} has no checkpoint yet: lvrpo train {directory}")
    newest.require({"fingerprint": fingerprint(config), "task": parts.fingerprint})
    policy = setup.new_policy(parts)
    is_average = "average.n_averaged" in newest.tensors  # the warm start goes on
    load_weights(policy.module, newest.snapshot(), "average.module." if is_average else "model.")
    policy.module.requires_grad_(False)
    return setup, parts, policy


def evaluate_run(directory: Path, *, items: int, seed: int, data: Path | None) -> Evaluation:
    """Score the newest checkpoint of a run on held-out prompts, or on a JSONL file.

    Args:
        directory: of the run.
        items: questions and drawing prompts, each.
        seed: of the samples.
        data: a JSONL file instead of the run's own held-out prompts.

    Raises:
        DataError: the file is wrong, or no rule and no answer tells what is right in it.
    """
    setup, parts, policy = load_policy(directory)
    config, task = setup.config, setup.task(parts, data)
    notes = []
    if data is not None:
        texts = [
            text
            for name in SKILLS
            for example in task.source.examples("test", name, items, 0)
            for text in (example.prompt, example.answer or "")
        ]
        notes = _foreign_note(parts.words, texts, data)
    rewards = _rewards(directory, setup, task, notes)
    with ProgressView() as view:
        plan = [
            Planned(sampling(config, skill), held_out(task, "test", skill, items), rewards)
            for skill in SKILLS
            for sampling in (as_trained, headline)
        ]
        found = measure_all(
            policy,
            task,
            config,
            plan,
            seed=seed,
            label="",
            step=0,
            progress=partial(view.evaluation, ""),
        )
    row = evaluation_row(found)
    if not eval_scores(row) and not eval_rewards(row):
        where = data or config.data.eval_source or "the held-out data"
        raise DataError(
            f"{where}: nothing to judge, no example has an answer, a rule or a reward of this run's"
        )
    return Evaluation(row, notes)


def _rewards(directory: Path, setup: Setup, task: Task, notes: list[str]) -> Rewards:
    """The rewards of the run; none, and a note, where they cannot be made."""
    saved = load_newest(directory / "reference")
    if saved is None:
        notes.append("the warm start goes on: rewards are not measured yet")
        return {}
    saved.require({"fingerprint": fingerprint(setup.config), "task": task.fingerprint})
    reference = task.new_policy()
    load_weights(reference.module, saved.snapshot())
    reference.module.requires_grad_(False)
    try:
        return task.make_rewards(reference)
    except RewardError as error:
        notes.append(f"rewards are not measured: {error}")
        return {}


def _foreign_note(known: Iterable[str], texts: Sequence[str], data: Path) -> list[str]:
    """Say it where a file speaks of other things than the run was trained on."""
    counts = Counter(word for text in texts for word in words_of(text))
    known = set(known)
    unknown = [word for word, _ in counts.most_common() if word not in known]
    if not unknown:
        return []
    share = sum(counts[word] for word in unknown) / counts.total()
    named = ", ".join(repr(word) for word in unknown[:_NAMED])
    return [
        f"{share:.0%} of the words of {data} are none of this run's training data ({named}"
        f"{', ...' if len(unknown) > _NAMED else ''}): the scores say what it makes of them"
    ]


def prompt_notes(known: Sequence[str], prompt: str, *, about_a_picture: bool) -> list[str]:
    """What a model is likely to have misunderstood of a prompt.

    Args:
        known: the words of its training data.
        prompt: what it was given.
        about_a_picture: whether a picture came with it, so that it is answered and not drawn.

    Raises:
        DataError: the prompt is empty.
    """
    words, vocabulary = words_of(prompt), set(known)
    if not prompt.strip():
        raise DataError(f"the prompt is {prompt!r}, expected what to draw, or a question")
    unknown = [word for word in dict.fromkeys(words) if word not in vocabulary]
    notes = []
    for word in unknown[:_NAMED]:
        near = difflib.get_close_matches(word.lower(), known, n=3)
        hint = f", which has {', '.join(map(repr, near))}" if near else ""
        notes.append(f"{word!r} is no word of the training data{hint}: it is spelled in bytes")
    if len(unknown) > _NAMED:
        notes.append(f"and {len(unknown) - _NAMED} more words are none of the training data")
    if not words:
        notes.append("the prompt has no words: it is spelled in bytes")
    first = words[0].lower() if words else ""
    is_question = first in _QUESTIONS or prompt.rstrip().endswith(
        ("?", "\N{FULLWIDTH QUESTION MARK}")
    )
    if is_question and not about_a_picture:
        notes.append("this reads like a question; it is drawn, as there is no --image to ask about")
    if first in _REQUESTS and about_a_picture:
        notes.append("this reads like a request to draw; with --image it is answered in words")
    return notes


def output_paths(output: Path | None, count: int) -> list[Path]:
    """Where drawings go; no file is ever replaced.

    Args:
        output: the file, or for several drawings `name-1.png`, `name-2.png`, ...; None for the
            first free ones of drawing.png, drawing-2.png, ... here.
        count: of drawings.

    Raises:
        RunDirectoryError: a file is there already, its folder is not, or its ending is no format
            of pictures that can be written.
    """
    if output is None:
        names = (Path(f"drawing{f'-{i}' if i > 1 else ''}.png") for i in itertools.count(1))
        return list(itertools.islice((path for path in names if not path.exists()), count))
    from PIL import Image

    formats = Image.registered_extensions()
    if formats.get(output.suffix.lower()) not in Image.SAVE:
        raise RunDirectoryError(
            f"{output}: cannot be written: {output.suffix or 'a name without an ending'!r} is no "
            "format of pictures, expected .png or another that Pillow writes"
        )
    if not output.parent.is_dir():
        raise RunDirectoryError(f"{output}: cannot be written: no folder {output.parent}")
    numbers = range(1, count + 1)
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in numbers]
    for path in paths:
        if path.exists():
            raise RunDirectoryError(f"{path}: is there already, expected the name of a new file")
    return paths


def draw_prompt(
    directory: Path, prompt: str, *, count: int, seed: int, output: Path | None
) -> tuple[list[Path], list[str]]:
    """Draw a prompt `count` times into files, see `output_paths`.

    Returns:
        The files, and what to know about them.
    """
    output_paths(output, count)  # whatever cannot be written is said before anything is drawn
    setup, parts, policy = load_policy(directory)
    config = setup.config
    notes = prompt_notes(parts.words, prompt, about_a_picture=False)
    example = Example("generate", "command line", prompt)
    schedule = flow_schedule(config.rollout)
    drawn = policy.sample_images([example], count, schedule, seed=seed, step=0).images
    paths = output_paths(output, count)
    for picture, path in zip(drawn.numpy(), paths, strict=True):
        try:
            save_enlarged(picture, path)
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path}: cannot be written: {error}") from error
    return paths, notes


def answer_question(
    directory: Path, question: str, image: Path, *, count: int, seed: int
) -> tuple[list[str], list[str]]:
    """Sample `count` answers to a question about an image file.

    Returns:
        The answers, and what to know about them.
    """
    setup, parts, policy = load_policy(directory)
    config = setup.config
    notes = prompt_notes(parts.words, question, about_a_picture=True)
    try:
        pixels = load_picture(image, parts.picture_shape)
    except Exception as error:  # Pillow raises a different class for every broken format
        raise DataError(f"{image}: cannot be read: {error}") from error
    example = Example("understand", "command line", question, image=pixels, answer="")
    answers = policy.sample_texts(
        [example],
        count,
        max_tokens=config.rollout.max_answer_tokens,
        temperature=config.rollout.temperature,
        seed=seed,
        step=0,
    ).texts
    return answers, notes
