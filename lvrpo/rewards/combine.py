"""What a reward is, and the table of scores that advantages are made from.

A reward is any callable with a `name`, from `Samples` to one number per sample. NaN means "does
not apply to this sample". Weighting and normalising is `lvrpo.normalize_advantages`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lvrpo.data.example import Example


class RewardError(ValueError):
    """A reward failed or returned something that must not reach the loss."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What a batch of groups sampled. A group of G repeats its example G times.

    Args:
        examples: [B], the prompt of every sample.
        texts: [B], the sampled text, or None for a drawing.
        images: [N, C, H, W] fp32 in [0, 1], the drawings; None for no drawing.
        image_index: [N] ints, the sample each drawing belongs to, ascending.
    """

    examples: Sequence[Example]
    texts: Sequence[str | None]
    images: Tensor | None = None
    image_index: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.examples):
            raise ValueError(f"Samples: {len(self.texts)} texts of {len(self.examples)} examples")
        drawings = 0 if self.images is None else len(self.images)
        if drawings != len(self.image_index):
            raise ValueError(f"Samples: {drawings} images, {len(self.image_index)} in image_index")
        drawn = [i for i, text in enumerate(self.texts) if text is None]
        if list(self.image_index) != drawn:
            raise ValueError("Samples: image_index must list exactly the samples without a text")

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def of_texts(cls, examples: Sequence[Example], texts: Sequence[str]) -> Samples:
        """One text per example."""
        return cls(examples, texts)

    @classmethod
    def of_images(cls, examples: Sequence[Example], images: Tensor) -> Samples:
        """One drawing per example."""
        return cls(examples, [None] * len(examples), images, range(len(examples)))

    @classmethod
    def concat(cls, parts: Sequence[Samples]) -> Samples:
        """The samples of all parts, in order."""
        images = [part.images for part in parts if part.images is not None]
        index: list[int] = []
        start = 0
        for part in parts:
            index += [start + i for i in part.image_index]
            start += len(part)
        return cls(
            [example for part in parts for example in part.examples],
            [text for part in parts for text in part.texts],
            torch.cat(images) if images else None,
            index,
        )


@runtime_checkable
class Reward(Protocol):
    """One column of scores."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def may_be_nan(self) -> bool:
        """Whether NaN means "does not apply"; without it a NaN is taken for a bug and refused."""

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32, one score per sample."""


@dataclass(frozen=True)
class FunctionReward:
    """A plain function as a reward; it may return any sequence of numbers, None for NaN.

    Args:
        function: from `Samples` to B numbers.
        name: for reports.
        may_be_nan: whether NaN or None is meant.
    """

    function: Callable[[Samples], Any]
    name: str
    may_be_nan: bool = False

    def __call__(self, samples: Samples) -> Tensor:
        """What the function returns, as a tensor."""
        return _as_tensor(self.function(samples))


def score(rewards: Sequence[Reward], samples: Samples) -> Tensor:
    """Every reward of every sample.

    Args:
        rewards: K of them.
        samples: B samples.

    Returns:
        [B, K] fp32 on the CPU, NaN where a reward does not apply.

    Raises:
        RewardError: a reward raised, returned the wrong shape, +-inf, or a NaN it did not declare;
            or no reward applies to some sample. It names the reward and the prompt.
    """
    if not rewards:
        raise ValueError("score: no rewards")
    table = torch.stack([_column(reward, samples) for reward in rewards], dim=1)
    unscored = table.isnan().all(dim=1)
    if bool(unscored.any()):
        names = ", ".join(reward.name for reward in rewards)
        raise RewardError(f"no reward ({names}) applies to {_describe(samples, unscored)}")
    return table


def _column(reward: Reward, samples: Samples) -> Tensor:
    try:
        values = _as_tensor(reward(samples))
    except Exception as error:
        first = samples.examples[0] if len(samples) else None
        at = "" if first is None else f", first prompt {first.uid!r} ({first.prompt!r})"
        raise RewardError(
            f"reward {reward.name!r} raised {type(error).__name__}: {error}{at}, "
            f"at {_origin(error)}"
        ) from error
    if values.shape != (len(samples),):
        raise RewardError(
            f"reward {reward.name!r} returned shape {tuple(values.shape)} for {len(samples)} "
            "samples, expected one number each"
        )
    infinite = values.isinf()
    if bool(infinite.any()):
        raise RewardError(f"reward {reward.name!r} is infinite for {_describe(samples, infinite)}")
    missing = values.isnan()
    if bool(missing.any()) and not reward.may_be_nan:
        raise RewardError(
            f"reward {reward.name!r} is NaN for {_describe(samples, missing)}; set may_be_nan on "
            "it if that means 'does not apply'"
        )
    return values


def _origin(error: Exception) -> str:
    """File and line that raised: the one line a user sees must lead to the bug."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"


def _as_tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float32)
    if isinstance(values, np.ndarray):
        return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())
    return torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float32)


def _describe(samples: Samples, bad: Tensor) -> str:
    at = int(bad.nonzero()[0])
    example, text = samples.examples[at], samples.texts[at]
    sampled = "a drawing" if text is None else f"the text {text!r}"
    more = int(bad.sum()) - 1
    others = f" and {more} more samples" if more else ""
    return f"sample {at} ({sampled}) of prompt {example.uid!r} ({example.prompt!r}){others}"


def load_reward(spec: str) -> Reward:
    """A user's reward from "package.module:attribute" or "path/to/file.py:attribute".

    The attribute is a reward, a class of rewards that takes no arguments, or a plain function from
    `Samples` to numbers; a function may set `name` and `may_be_nan` as its own attributes.

    Raises:
        RewardError: it cannot be imported, is not there, or cannot be called.
    """
    where, separator, attribute = spec.rpartition(":")
    if not separator or not where or not attribute:
        raise RewardError(f"reward {spec!r}: expected 'module:function' or 'file.py:function'")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    except Exception as error:
        raise RewardError(f"reward {spec!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise RewardError(f"reward {spec!r}: {where} has no attribute {attribute!r}")
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise RewardError(f"reward {spec!r} is a {type(found).__name__}, expected a function")
    if isinstance(found, Reward):
        return found
    name = str(getattr(found, "name", attribute))
    return FunctionReward(found, name, bool(getattr(found, "may_be_nan", False)))


def _import_module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    # Not the bare stem: a file may be called like a package that is imported already.
    name = f"lvrpo_reward:{path.resolve()}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # dataclasses and pickle look a class's module up by name.
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_spec.name]
        raise
    return module
