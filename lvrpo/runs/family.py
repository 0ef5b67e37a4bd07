"""What a run asks of a model family: what is fitted before the first step, and policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lvrpo.data.sources import Source
from lvrpo.models.packs import Layout
from lvrpo.models.protocol import Policy
from lvrpo.models.transformer import Parameters, Transformer


class LaidOutPolicy(Policy, Layout, Protocol):
    """A policy whose buffers are made of spans."""

    @property
    def answer_range(self) -> tuple[int, int]:
        """[low, high) of the tokens an answer may hold."""


class FamilyData(Protocol):
    """What a family is fitted to."""

    @property
    def source(self) -> Source:
        """Of the prompts."""

    @property
    def words(self) -> Sequence[str]:
        """The commonest of the training data, or all that it has."""

    @property
    def spelled(self) -> bool:
        """Whether an answer may hold words that are none of these."""

    @property
    def training_rows(self) -> Sequence[Mapping[str, Any]]:
        """The lines of the training file; empty where examples are made and not read."""

    @property
    def all_rows(self) -> Sequence[Mapping[str, Any]]:
        """The lines of all files; likewise."""


class FamilyParts(Protocol):
    """What a family's weights are made for, kept with them."""

    @property
    def words(self) -> tuple[str, ...]:
        """Those of one token each; empty for a vocabulary that is not of the data."""

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of pictures; H = W = 0: they keep their own size."""

    def tensors(self) -> dict[str, Tensor]:
        """All that was fitted, by name."""

    def state(self) -> dict[str, Any]:
        """Everything else, for JSON."""


class Family(Protocol):
    """A model family, as the configuration of a run describes it."""

    @property
    def own_size(self) -> bool:
        """Whether pictures of files keep their size."""

    @property
    def described(self) -> str:
        """The model, by the keys that say how large it is."""

    def check(self, data: FamilyData) -> None:
        """Refuse what cannot be trained with this data.

        Raises:
            ConfigError: names the key.
        """

    def unfitted(self, data: FamilyData) -> FamilyParts:
        """Parts of the right shape that have learned nothing."""

    def fit(self, data: FamilyData) -> FamilyParts:
        """Parts that are made for the data.

        Raises:
            ConfigError: they cannot be.
        """

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> FamilyParts:
        """What `FamilyParts.tensors` and `FamilyParts.state` told.

        Raises:
            ConfigError: something outside of the run that they are of has changed.
        """

    def new_policy(self, parts: Any) -> LaidOutPolicy:
        """The policy that a run begins with, the same every time.

        Where the default device is "meta", a policy without weights, for its shapes.
        """

    def drawing_shape(self, parts: Any) -> tuple[int, int, int]:
        """[C, H, W] of what the policy draws."""

    def transformer(self, parts: Any) -> Transformer:
        """What the policy's model is made of, for a plan."""

    def parameters(self, policy: Any) -> Parameters:
        """Those of a policy's model, counted, the frozen ones included."""

    @property
    def uncounted(self) -> Sequence[str]:
        """What a plan leaves out, in words."""

    def answer_length(self, parts: Any, answer: str) -> int:
        """Tokens of an answer, its end left out."""

    def export(self, policy: Any, folder: Path, *, adapter: bool) -> None:
        """Write a policy of this family into a new folder, for others to read.

        Args:
            policy: may be changed by it.
            folder: to be made, or empty.
            adapter: whether only what a LoRA has trained is written, if there is one.
        """

    def notes(self, parts: Any) -> list[str]:
        """Lines worth reading before the first step."""
