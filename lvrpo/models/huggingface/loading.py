"""From a folder as transformers saves one to a policy: what is trained of it, and what is not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvrpo.info import require
from lvrpo.integrations.prompt_groups import unshared
from lvrpo.integrations.transformers import set_attention
from lvrpo.integrations.transformers.release import require_transformers
from lvrpo.models.huggingface.policy import HuggingFacePolicy, trained_part
from lvrpo.models.huggingface.prompts import LAID_OUT, PromptReader

#: Tensors of a kind that are told one by one.
NAMED = 6


@dataclass(frozen=True)
class Lora:
    """Matrices of low rank that are trained in the place of a model's own weights.

    Attributes:
        rank: of each.
        alpha: what they add is multiplied by alpha / rank.
        targets: names of the layers, or their ends; empty: all linear layers of the text model but
            the head.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ()


def from_pretrained(
    path: str | Path,
    *,
    chat: bool = True,
    frozen: Sequence[str] = (),
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> HuggingFacePolicy:
    """A policy of the model in a folder; torch's random state decides where a LoRA begins.

    Args:
        path: of the folder, with a configuration, weights, and a tokenizer or a processor.
        chat: see `PromptReader`.
        frozen: what the names of parameters begin with that are not trained, as "model.visual".
        lora: trains adapters of PEFT instead of the model's weights.
        gradient_checkpointing: whether layers are computed again in the backward pass.
        dtype: of the weights.
        device: of the weights.
        backend: of the ops.

    Raises:
        ImportError: transformers, or PEFT for a LoRA, is missing or not a tested release.
        ValueError: the folder is not one that a policy can be made of; says why.
    """
    return make_policy(
        load_folder(Path(path), dtype).to(device),
        load_processor(Path(path)),
        chat=chat,
        frozen=frozen,
        lora=lora,
        gradient_checkpointing=gradient_checkpointing,
        backend=backend,
    )


def make_policy(
    model: Any,
    processor: Any,
    *,
    chat: bool = True,
    frozen: Sequence[str] = (),
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    backend: str | None = None,
) -> HuggingFacePolicy:
    """A policy of a model of transformers, which is changed in place.

    Args:
        model: a language model, or one that reads pictures too.
        processor: its processor; its tokenizer for a language model.
        chat: see `from_pretrained`, like the others.
        frozen: likewise.
        lora: likewise.
        gradient_checkpointing: likewise.
        backend: of the ops.

    Raises:
        ValueError: it cannot be a policy, or its parts disagree; says why.
    """
    for why in (*unshared(model, LAID_OUT), *sees_ahead(model)):
        raise ValueError(
            f"a {type(model).__name__} cannot be a policy: {why}, expected a model whose tokens "
            "meet in causal attention alone"
        )
    reader = PromptReader(model, processor, chat=chat)
    model.eval()
    set_attention(model)
    freeze(model, frozen)
    if lora is not None:
        model = with_lora(model, lora)
    if gradient_checkpointing:
        checkpoint_layers(model)
    return HuggingFacePolicy(model, reader, trained_part(model), backend)


def sees_ahead(model: Any) -> Iterator[str]:
    """Why answers of a model cannot be sampled token by token; nothing if they can."""
    if any(getattr(layer, "is_causal", None) is False for layer in model.get_decoder().modules()):
        yield f"tokens of {model.config.model_type} see later ones"


def load_folder(path: Path, dtype: torch.dtype, *, with_weights: bool = True) -> Any:
    """The model of a folder; nothing else is read.

    Args:
        path: of the folder.
        dtype: of the weights.
        with_weights: False for a model as it would be initialised, on the default device; there
            may be no weights then.

    Raises:
        ValueError: it is no such folder, or its weights are not those of its configuration; says
            what is missing.
    """
    with _named(path):
        kind, config = _kind(path)
        if not with_weights:
            return kind.from_config(config, dtype=dtype)
        return _load(kind, path, dtype)


def check_weights(path: Path) -> None:
    """See that a folder's weights are those of its configuration; their headers alone are read.

    Raises:
        ModuleNotFoundError: accelerate is missing, which transformers needs for that.
        ValueError: they are not.
    """
    require("accelerate", extra="transformers")
    with _named(path):
        kind, _ = _kind(path)
        _load(kind, path, torch.float32, device_map="meta")


def _kind(path: Path) -> tuple[Any, Any]:
    """The class of transformers that loads a folder, and its configuration."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if (path / "generation_config.json").is_file():
        # A model would be loaded with another one in place of one that cannot be read.
        transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    if reads_pictures(config):
        return transformers.AutoModelForImageTextToText, config
    if answers(config):
        return transformers.AutoModelForCausalLM, config
    raise ValueError(
        f"its model_type is {config.model_type!r}, expected a model from text, or images and text, "
        "to text"
    )


def _load(kind: Any, path: Path, dtype: torch.dtype, **where: str) -> Any:
    with _silent():
        model, found = kind.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # which are told below, with their names
            output_loading_info=True,
            **where,
        )
    wrong = {
        "missing": found["missing_keys"],
        "extra": found["unexpected_keys"],
        "of another shape": [
            f"{name} {tuple(theirs)}, expected {tuple(ours)}"
            for name, theirs, ours in found["mismatched_keys"]
        ],
    }
    told = [f"{len(names)} {how}: {_some(names)}" for how, names in wrong.items() if names]
    if told:
        raise ValueError(
            f"tensors of {type(model).__name__} are {'; '.join(told)}; expected the weights of its "
            "config.json"
        )
    return model


def _some(names: Collection[str]) -> str:
    """The first names of many."""
    first = sorted(names)[:NAMED]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")


def load_processor(path: Path) -> Any:
    """The processor of a folder, or its tokenizer where its model reads text alone.

    Raises:
        ValueError: there is none.
    """
    import transformers

    with _named(path):
        config = transformers.AutoConfig.from_pretrained(path)
        kind = transformers.AutoTokenizer
        if reads_pictures(config):
            kind = transformers.AutoProcessor
        return kind.from_pretrained(path, local_files_only=True)


def reads_pictures(config: Any) -> bool:
    """Whether the model of a configuration is one from images and text to text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def answers(config: Any) -> bool:
    """Whether the model of a configuration is one from text to more of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from printing what is raised here, and bars across those of a run."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in a line what transformers explains over many."""
    require_transformers()
    from safetensors import SafetensorError

    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: there is no config.json, expected a folder as save_pretrained writes one"
        )
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{_unreadable(path)}: {' '.join(str(error).split())}") from error


def _unreadable(path: Path) -> Path:
    """The damaged file of a folder, which few errors of transformers name; or the folder."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(path.iterdir()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                safe_open(file, framework="pt")
        except (OSError, ValueError, SafetensorError):
            return file
    return path


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Leave parameters out of training.

    Raises:
        ValueError: no parameter's name begins with one of the prefixes, or all of them do.
    """
    names = dict(model.named_parameters())
    for prefix in prefixes:
        begun = [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
        if not begun:
            tops = sorted({name.rpartition(".layers.")[0] or name for name in names})
            raise ValueError(
                f"no parameter of {type(model).__name__} is in {prefix!r}, expected one of "
                f"{', '.join(tops[:12])}"
            )
        for name in begun:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError(f"{', '.join(prefixes)}: nothing is left to train, expected fewer of them")


def with_lora(model: Any, lora: Lora) -> Any:
    """The model with adapters, everything else frozen; as it was until they are trained."""
    require("peft")
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=[*lora.targets] or text_layers(model),
    )
    try:
        return peft.get_peft_model(model, config).eval()
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name in text_layers(model)})
        raise ValueError(
            f"lora targets {list(lora.targets)}: {' '.join(str(error).split())} Its text model has "
            f"{', '.join(names)}"
        ) from error


def text_layers(model: Any) -> list[str]:
    """Names of the linear layers of the text model."""
    text = model.get_decoder()
    (prefix,) = (name for name, module in model.named_modules() if module is text)
    return [
        f"{prefix}.{name}" for name, module in text.named_modules() if isinstance(module, nn.Linear)
    ]


def checkpoint_layers(model: Any) -> None:
    """Compute layers again in the backward pass.

    Layers are checkpointed in training mode alone, which theirs is then; what drops out is below
    them, in evaluation mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
