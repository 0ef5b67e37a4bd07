"""Runs of TRL's trainer, and of ours, on a model of two layers and an alphabet of eleven words."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

WORDS = ("<pad>", "<eos>", "<unk>", *"abcdefghijk")
PROMPTS = ["a b", "c d e f", "g", "h i j"] * 10
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


class Run(NamedTuple):
    """What each step of a run had: loss, gradient of all parameters, and what was logged."""

    losses: list[float]
    gradients: list[Tensor]
    logged: list[dict[str, float]]


def tokenizer() -> Any:
    words = {word: number for number, word in enumerate(WORDS)}
    found = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_model(family: str = "Qwen2", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(word in "aei" for word in text.split())) for text in completions]


def early_b(completions: list[str], **_: Any) -> list[float]:
    return [1.0 / (1 + text.split().index("b")) if "b" in text else 0.0 for text in completions]


class Gradients(transformers.TrainerCallback):
    """Keeps what the optimizer is about to see."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        every = [p.grad.flatten() for p in more["model"].parameters() if p.grad is not None]
        self.found.append(torch.cat(every).clone())


def config_of(folder: Any, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 10,
        "logging_steps": 1,
        # Adam makes a whole step of the rounding in a gradient that is zero (of a key's bias).
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return trl.GRPOConfig(**defaults | options)


def trainer(
    kind: type,
    model: Any,
    folder: Any,
    *,
    rewards: Any = vowels,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer; `given` is for the constructor, `options` are the config's."""
    made = kind(
        model=model,
        reward_funcs=rewards,
        args=config_of(folder, **options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        **(given or {}),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def run(
    kind: type,
    folder: Any,
    *,
    family: str = "Qwen2",
    sizes: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train a tiny model of a family, of other sizes than `SIZES`."""
    model, gradients = tiny_model(family, **(sizes or {})), Gradients()
    model.save_pretrained(folder / "model")  # where TRL finds a reference policy
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    made = trainer(kind, model, folder, **options)
    made.add_callback(gradients)
    made.train()
    logged = made.state.log_history[:-1]  # the last sums the run up
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    return Run(losses, gradients.found, logged)
