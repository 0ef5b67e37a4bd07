"""What families share whose models are read from a folder: its files, and its frozen weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from lvrpo.runs.family import FamilyData
from lvrpo.trainer.config import ConfigError, TrainConfig

#: Files that are compared byte by byte; of larger ones, weights, the size is.
COMPARED_BYTES = 64 << 20


@dataclass(frozen=True)
class FolderParts:
    """A `lvrpo.runs.family.FamilyParts`: which folder the weights began with.

    Attributes:
        digest: of the folder's files, see `folder_digest`.
    """

    digest: str
    words: tuple[str, ...] = ()
    picture_shape: tuple[int, int, int] = (3, 0, 0)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def state(self) -> dict[str, Any]:
        """The digest."""
        return {"folder": self.digest}


class FolderFamily:
    """The part of a `lvrpo.runs.family.Family` that goes by the folder alone: nothing is fitted.

    Args:
        config: of a run.
    """

    own_size = True

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path = Path(config.model.path)
        # One copy for all policies that have it: of those that are sharded none has it whole.
        self._frozen = WeakValueDictionary[str, nn.Parameter]()

    @property
    def described(self) -> str:
        """See `Family`."""
        return f"model.path = {self.config.model.path!r}"

    def unfitted(self, data: FamilyData) -> FolderParts:
        """See `Family`."""
        return self.fit(data)

    def fit(self, data: FamilyData) -> FolderParts:
        """See `Family`."""
        return FolderParts(folder_digest(self.path))

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> FolderParts:
        """See `Family`."""
        return unchanged(self.path, state)


def folder_digest(path: Path) -> str:
    """Of the names of a folder's files, their sizes, and what the smaller ones hold."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*")) if path.is_dir() else ():
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            if size <= COMPARED_BYTES:
                digest.update(file.read_bytes())
    return digest.hexdigest()


def unchanged(path: Path, state: Mapping[str, Any]) -> FolderParts:
    """The parts of a folder whose files are those of a run.

    Args:
        path: of the folder.
        state: of the run, see `FolderParts.state`.

    Raises:
        ConfigError: they are not, or there is no folder.
    """
    require_folder(path)
    found = FolderParts(folder_digest(path))
    if found.digest != state["folder"]:
        raise ConfigError(
            f"model.path is {str(path)!r}, whose files have changed since the run began: put them "
            "back, name the folder that has them by `lvrpo train RUN --set model.path=FOLDER`, or "
            "start a new run"
        )
    return found


def require_folder(path: Path) -> None:
    """See that a model has a folder.

    Raises:
        ConfigError: it has none; says how a run goes on whose folder is elsewhere now.
    """
    if not path.is_dir():
        raise ConfigError(
            f"model.path is {str(path)!r}, where there is no folder, expected that of a model, for "
            "nothing is downloaded; a run whose folder was moved goes on by `lvrpo train RUN --set "
            "model.path=FOLDER`"
        )


def share_frozen(model: nn.Module, kept: MutableMapping[str, nn.Parameter]) -> None:
    """Give a model the frozen parameters of another of the same folder, or keep its own for others.

    A policy and its reference then differ by what is trained, and the rest is in memory once.
    """
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                full = f"{prefix}.{name}"
                module.register_parameter(name, kept.setdefault(full, parameter))
