"""The folder that BAGEL is published in: read whole, and written back bit for bit.

ema.safetensors      the model; or shards that a *.safetensors.index.json names
ae.safetensors       the autoencoder
llm_config.json      the sizes of the language model
vit_config.json      the sizes of the tower
*.json, *.txt        tokenizer and all else, kept as they are
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lvrpo.models.bagel.autoencoder import AutoencoderConfig, FluxAutoencoder
from lvrpo.models.bagel.config import BagelConfig, Shapes
from lvrpo.models.bagel.model import Bagel

WEIGHTS, INDEX, AUTOENCODER = "ema.safetensors", "*.safetensors.index.json", "ae.safetensors"
KEPT_SUFFIXES = (".json", ".txt")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class StoredFile:
    """What one file of tensors holds, without their values."""

    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str] | None


@dataclass(frozen=True)
class BagelCheckpoint:
    """A published folder in memory."""

    model: Bagel
    autoencoder: FluxAutoencoder
    model_files: Mapping[str, StoredFile]
    autoencoder_files: Mapping[str, StoredFile]
    other_files: Mapping[str, bytes]  # configurations and tokenizer, as they were


def load_bagel(
    path: Path | str, *, dtype: torch.dtype | None = None, with_weights: bool = True
) -> BagelCheckpoint:
    """Read a published BAGEL folder onto the CPU.

    Args:
        path: of the folder.
        dtype: of the model; None keeps that of each tensor. The autoencoder, which is frozen, keeps
            its own.
        with_weights: False leaves both on the meta device, for their shapes; such a checkpoint has
            nothing to be saved.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: a configuration has a value that this model does not compute, or tensors are
            missing, extra or of another shape: all of them are listed, and nothing is loaded.
    """
    folder = Path(path)
    llm, vit = (_read_json(folder / name) for name in ("llm_config.json", "vit_config.json"))
    model, model_files = _load(
        folder,
        _model_files(folder),
        lambda shapes: Bagel(BagelConfig.from_published(llm, vit, shapes)),
        with_weights,
    )
    autoencoder, autoencoder_files = _load(
        folder,
        [AUTOENCODER],
        lambda shapes: FluxAutoencoder(AutoencoderConfig.from_published(shapes)),
        with_weights,
    )
    drawn = autoencoder.config.latent_channels * autoencoder.config.latent_patch**2
    if drawn != model.config.latent_dim:
        raise ValueError(
            f"{folder}: the autoencoder's latent tokens have {drawn} numbers, the model draws "
            f"{model.config.latent_dim}: {AUTOENCODER} is of another model"
        )
    kept = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in KEPT_SUFFIXES)
    return BagelCheckpoint(
        model=model if dtype is None else model.to(dtype),
        autoencoder=autoencoder.eval().requires_grad_(False),
        model_files=model_files,
        autoencoder_files=autoencoder_files,
        other_files={file.name: file.read_bytes() for file in kept},
    )


def save_bagel(checkpoint: BagelCheckpoint, path: Path | str) -> None:
    """Write a folder as the one that was read: the same files, names and dtypes.

    What has not been trained is the same bits, in whatever wider dtype it was held meanwhile.

    Args:
        checkpoint: as `load_bagel` made it; its model may have been trained.
        path: of a folder that does not exist, or is empty.

    Raises:
        FileExistsError: the folder has files.
        ValueError: the checkpoint was read without weights.
    """
    if not checkpoint.model_files:
        raise ValueError("the checkpoint was read without weights: there is nothing to save")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, expected a new folder")
    for name, content in checkpoint.other_files.items():
        (folder / name).write_bytes(content)
    for module, files in (
        (checkpoint.model, checkpoint.model_files),
        (checkpoint.autoencoder, checkpoint.autoencoder_files),
    ):
        state = module.state_dict()
        for name, stored in files.items():
            tensors = {
                key: state[key].detach().to("cpu", dtype).contiguous()
                for key, dtype in stored.dtypes.items()
            }
            metadata = None if stored.metadata is None else dict(stored.metadata)
            save_file(tensors, folder / name, metadata)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, expected a BAGEL folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def _model_files(folder: Path) -> list[str]:
    """Names of the files with the model's tensors."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    indices = sorted(folder.glob(INDEX))
    if len(indices) != 1:
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS} and {len(indices)} files {INDEX}, expected either"
        )
    names = _read_json(indices[0]).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{indices[0]} has no weight_map")
    return sorted(set(names.values()))


def _load(
    folder: Path, files: Sequence[str], make: Callable[[Shapes], Module], with_weights: bool
) -> tuple[Module, dict[str, StoredFile]]:
    """A module with the tensors of some files, which are to be its own and no others."""
    shapes: Shapes = {}
    twice: list[str] = []
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    twice += [key] if key in shapes else []
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is no file of tensors: {error}") from error
    with torch.device("meta"):
        module = make(shapes)
    _check(folder, module, shapes, twice)
    if not with_weights:
        return module, {}
    state: dict[str, Tensor] = {}
    stored: dict[str, StoredFile] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
            stored[name] = StoredFile(dtypes, file.metadata())
        state |= tensors
    module.load_state_dict(state, assign=True)
    return module, stored


def _check(folder: Path, module: nn.Module, shapes: Shapes, twice: Sequence[str]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    common = expected.keys() & shapes.keys()
    wrong = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "extra": sorted(shapes.keys() - expected.keys()),
        "in two files": sorted(twice),
        "of another shape": [
            f"{name} {shapes[name]}, expected {expected[name]}"
            for name in sorted(common)
            if shapes[name] != expected[name]
        ],
    }
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if found:
        raise ValueError(f"{folder}: tensors of {type(module).__name__} are {'; '.join(found)}")
