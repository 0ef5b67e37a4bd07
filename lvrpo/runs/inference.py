"""What the commands ask of a trained run: its policy, a drawing, an answer."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lvrpo.data.example import Example, Picture
from lvrpo.data.jsonl import DataError, load_picture
from lvrpo.data.words import words_of
from lvrpo.models.protocol import Policy
from lvrpo.runs.changes import fingerprint
from lvrpo.runs.checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    load_newest,
    step_of,
)
from lvrpo.runs.config_file import load_config
from lvrpo.runs.directory import RunDirectoryError, is_run, require_format
from lvrpo.runs.gallery import save_enlarged
from lvrpo.runs.setup import FrozenParts, Setup
from lvrpo.trainer.config import ConfigError
from lvrpo.trainer.placement import place_frozen, run_device
from lvrpo.trainer.sampling import answer_sampling
from lvrpo.trainer.schedule import flow_guidance, flow_schedule
from lvrpo.trainer.state import load_weights

#: First words that tell a question, and a request to draw, in English.
_QUESTIONS = frozenset(
    ("what", "which", "who", "where", "when", "why", "how", "is", "are", "does", "do", "can", "has")
)
_REQUESTS = frozenset(("draw", "paint", "sketch", "create", "generate", "render", "make"))
_NAMED = 5  # unknown words that are told one by one


def read_run(directory: Path, device: str | None = None) -> tuple[Setup, FrozenParts]:
    """What a run is made of; no weight of its model is read.

    Args:
        directory: of the run.
        device: in place of its `run.device`; None for that.

    Raises:
        RunDirectoryError: not a run, or it has only begun.
        CheckpointError: `task/` is damaged.
        ConfigError: there is no such device here.
    """
    if not is_run(directory):
        raise RunDirectoryError(f"{directory} is not a run: it has no config.toml")
    require_format(directory)
    config = load_config(directory / "config.toml")
    if device is not None:
        run = dataclasses.replace(config.run, device=device)
        config = dataclasses.replace(config, run=run)
    try:
        run_device(config.run.device)
    except ConfigError as error:
        raise ConfigError(f"{error}; --device names another") from error
    setup = Setup(config)
    parts = setup.saved_parts(directory)
    if parts is None or not checkpoints(directory / "checkpoints"):
        raise RunDirectoryError(f"{directory} has no checkpoint yet: lvrpo train {directory}")
    return setup, parts


def load_policy(directory: Path) -> tuple[Setup, FrozenParts, Policy]:
    """The averaged weights of a run's newest checkpoint, ready to sample from on `run.device`.

    Raises:
        RunDirectoryError: not a run, or no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
        ConfigError: there is no such device here.
    """
    setup, parts = read_run(directory)
    policy = policy_at(directory, setup, parts)
    return setup, parts, place_frozen(policy, setup.config.run)


def policy_at(directory: Path, setup: Setup, parts: FrozenParts, step: int | None = None) -> Policy:
    """The averaged weights of a checkpoint, on the CPU.

    Args:
        directory: of the run.
        setup: of the run.
        parts: of the run.
        step: of the checkpoint; None for the newest.

    Raises:
        RunDirectoryError: there is none of this step.
        CheckpointError: the checkpoint is damaged.
    """
    folder = directory / "checkpoints"
    found = {step_of(path): path for path in checkpoints(folder)}
    if step is not None and step not in found:
        there = ", ".join(map(str, found))
        raise RunDirectoryError(f"{directory} has no checkpoint of step {step}; there are {there}")
    saved = load_newest(folder) if step is None else load_checkpoint(found[step])
    assert saved is not None
    # Those of the warm start have an average.
    prefix = "average.module." if "average.n_averaged" in saved.tensors else "model."
    return _policy_of(saved, setup, parts, prefix)


def load_reference(directory: Path, setup: Setup, parts: FrozenParts) -> Policy | None:
    """The frozen policy of the end of a run's warm start, on the CPU; None while that goes on.

    Raises:
        CheckpointError: it is damaged, or of a run of another configuration.
    """
    saved = load_newest(directory / "reference")
    return None if saved is None else _policy_of(saved, setup, parts)


def _policy_of(saved: Checkpoint, setup: Setup, parts: FrozenParts, prefix: str = "") -> Policy:
    saved.require({"fingerprint": fingerprint(setup.config), "task": parts.fingerprint})
    policy = setup.new_policy(parts)
    load_weights(policy.module, saved.snapshot(), prefix)
    policy.module.requires_grad_(False)
    return policy


def foreign_notes(known: Iterable[str], texts: Sequence[str], data: Path) -> list[str]:
    """Say it where a file speaks of other things than the run was trained on."""
    counts = Counter(word for text in texts for word in words_of(text))
    known = set(known)
    unknown = [word for word, _ in counts.most_common() if word not in known]
    if not known or not unknown:
        return []
    share = sum(counts[word] for word in unknown) / counts.total()
    named = ", ".join(repr(word) for word in unknown[:_NAMED])
    return [
        f"{share:.0%} of the words of {data} are none of this run's training data ({named}"
        f"{', ...' if len(unknown) > _NAMED else ''}): the scores say what it makes of them"
    ]


def prompt_notes(known: Sequence[str], prompt: str, *, is_drawn: bool) -> list[str]:
    """What a model is likely to have misunderstood of a prompt.

    Args:
        known: the words of its training data; none: of a model that has its words from elsewhere.
        prompt: what it was given.
        is_drawn: whether it is drawn, and not answered.

    Raises:
        DataError: the prompt is empty.
    """
    words, vocabulary = words_of(prompt), set(known)
    if not prompt.strip():
        raise DataError(f"the prompt is {prompt!r}, expected what to draw, or a question")
    unknown = [word for word in dict.fromkeys(words) if known and word not in vocabulary]
    notes = []
    for word in unknown[:_NAMED]:
        near = difflib.get_close_matches(word.lower(), known, n=3)
        hint = f", which has {', '.join(map(repr, near))}" if near else ""
        notes.append(f"{word!r} is no word of the training data{hint}: it is spelled in bytes")
    if len(unknown) > _NAMED:
        notes.append(f"and {len(unknown) - _NAMED} more words are none of the training data")
    if known and not words:
        notes.append("the prompt has no words: it is spelled in bytes")
    first = words[0].lower() if words else ""
    is_question = first in _QUESTIONS or prompt.rstrip().endswith(
        ("?", "\N{FULLWIDTH QUESTION MARK}")
    )
    if is_question and is_drawn:
        notes.append("this reads like a question; it is drawn, as there is no --image to ask about")
    if first in _REQUESTS and not is_drawn:
        notes.append("this reads like a request to draw; it is answered in words")
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


def sample_prompt(
    directory: Path,
    prompt: str,
    image: Path | None,
    *,
    edit: bool = False,
    count: int,
    seed: int,
    output: Path | None,
    device: str | None = None,
) -> tuple[Sequence[object], list[str]]:
    """Answer a prompt `count` times, or draw it into files, see `output_paths`.

    A prompt with a picture is answered, unless that is to be edited, and so is any prompt by a
    policy that does not draw.

    Returns:
        The answers or the files, and what to know about them.

    Raises:
        ConfigError: there is no such device here.
        ValueError: there is no picture to be edited, the policy does not draw, or there is a file
            for an answer.
    """
    if edit and image is None:
        raise ValueError("--edit without a picture, expected the one to be edited as --image")
    is_drawn = edit or image is None
    if is_drawn:  # whatever cannot be written is said before anything is drawn
        output_paths(output, count)
    setup, parts = read_run(directory, device)
    picture = _picture(image, parts)
    policy = place_frozen(policy_at(directory, setup, parts), setup.config.run)
    draws = "generate" in policy.skills
    if edit and not draws:
        raise ValueError(f"--edit with {directory}, whose model answers and does not draw")
    if output is not None and not (is_drawn and draws):
        raise ValueError(
            f"--output is {output}, expected none: the prompt is answered, and answers are printed"
        )
    if is_drawn and draws:
        return _drawings(
            setup, parts, policy, prompt, picture, count=count, seed=seed, output=output
        )
    return _answers(setup, parts, policy, prompt, picture, count=count, seed=seed)


def _drawings(
    setup: Setup,
    parts: FrozenParts,
    policy: Policy,
    prompt: str,
    picture: Picture | None,
    *,
    count: int,
    seed: int,
    output: Path | None,
) -> tuple[list[Path], list[str]]:
    config = setup.config
    notes = prompt_notes(parts.family.words, prompt, is_drawn=True)
    example = Example("generate", "command line", prompt, image=picture)
    schedule = flow_schedule(config.rollout)
    guidance = flow_guidance(config.rollout)
    drawn = policy.sample_images(
        [example], count, schedule, guidance=guidance, seed=seed, step=0
    ).images
    paths = output_paths(output, count)
    for drawing, path in zip(drawn.numpy(), paths, strict=True):
        try:
            save_enlarged(drawing, path)
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path}: cannot be written: {error}") from error
    return paths, notes


def _answers(
    setup: Setup,
    parts: FrozenParts,
    policy: Policy,
    question: str,
    picture: Picture | None,
    *,
    count: int,
    seed: int,
) -> tuple[list[str], list[str]]:
    notes = prompt_notes(parts.family.words, question, is_drawn=False)
    example = Example("understand", "command line", question, image=picture, answer="")
    answers = policy.sample_texts(
        [example],
        count,
        sampling=answer_sampling(setup.config.rollout),
        seed=seed,
        step=0,
    ).texts
    return answers, notes


def _picture(file: Path | None, parts: FrozenParts) -> Picture | None:
    if file is None:
        return None
    try:
        return load_picture(file, parts.family.picture_shape)
    except Exception as error:  # Pillow raises a different class for every broken format
        raise DataError(f"{file}: cannot be read: {error}") from error
