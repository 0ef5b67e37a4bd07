"""A unified policy as a folder: its weights, its vocabulary and its autoencoder.

config.json              sizes of the model and of the autoencoder, words, tokens of answers
model.safetensors        the model
autoencoder.safetensors  between pictures and latents
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from lvrpo.models.unified.latents import LinearAutoencoder
from lvrpo.models.unified.model import UnifiedConfig, UnifiedModel
from lvrpo.models.unified.policy import UnifiedPolicy
from lvrpo.models.unified.tokenizer import Tokenizer

FORMAT = "lvrpo-unified-1"
#: Arguments of the autoencoder.
CODEC = ("channels", "height", "width", "patch", "dim", "tokens_per_patch")
CONFIG, WEIGHTS, AUTOENCODER = "config.json", "model.safetensors", "autoencoder.safetensors"


def save_unified(policy: UnifiedPolicy, path: Path | str) -> None:
    """Write a policy into a folder, in the dtype of its weights.

    Args:
        policy: to be written.
        path: of a folder that does not exist, or is empty.

    Raises:
        FileExistsError: the folder has files.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, expected a new folder")
    codec = policy.autoencoder
    described = {
        "format": FORMAT,
        "model": dataclasses.asdict(policy.module.config),
        "autoencoder": {name: getattr(codec, name) for name in CODEC},
        "words": policy.tokenizer.words,
        "answer_range": policy.answer_range,
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=1) + "\n")
    for name, module in ((WEIGHTS, policy.module), (AUTOENCODER, codec)):
        save_model(module, str(folder / name))


def load_unified(path: Path | str, *, backend: str | None = None) -> UnifiedPolicy:
    """The policy of a folder that `save_unified` wrote, on the CPU.

    Args:
        path: of the folder.
        backend: of every op; None for the first that can run.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: it is not such a folder, or its weights are not those of its config.json.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS, AUTOENCODER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, expected what `lvrpo export` wrote")
    described: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} has the format {described.get('format')!r}, expected {FORMAT!r}"
        )
    autoencoder = LinearAutoencoder(**described["autoencoder"])
    with torch.random.fork_rng(devices=[]):
        module = UnifiedModel(UnifiedConfig(**described["model"]))
    for name, part in ((WEIGHTS, module), (AUTOENCODER, autoencoder)):
        try:
            load_model(part, folder / name)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder / name}: {' '.join(str(error).split())}") from error
    low, high = described["answer_range"]
    return UnifiedPolicy(
        module=module,
        tokenizer=Tokenizer(described["words"]),
        autoencoder=autoencoder,
        latent_grid=autoencoder.grid,
        answer_range=(low, high),
        backend=backend,
    )
