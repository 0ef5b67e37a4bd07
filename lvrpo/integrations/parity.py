"""TRL's own loss against lvrpo's over its options: `python -m lvrpo.integrations.parity`.

Both get the same hidden states, in fp64; TRL's code makes the one, with log-probs of plain torch,
and `lvrpo.integrations.trl.GRPOTrainer` the other. A configuration is honoured, where loss and
gradients agree, refused by name, when a trainer would be made, or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import platform
import random
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lvrpo.integrations.trl import GRPOTrainer  # isort: skip  (it says what is not installed)

import accelerate
import torch
import transformers
import trl
from torch import Tensor

import lvrpo
from lvrpo.integrations.transformers import CompletionStates
from lvrpo.params.from_trl import LOSSES, RATIOS

#: What the grid is made of; an axis has some options that go together.
AXES: dict[str, list[dict[str, Any]]] = {
    "loss_type": [
        {"loss_type": name}
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
    ],
    "level": [{"importance_sampling_level": name} for name in ("token", "sequence")],
    "KL": [
        {"beta": 0.0},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"beta": 0.1, "use_bias_correction_kl": True},
    ],
    "delta": [{"delta": None}, {"delta": 1.5}],
    "top entropy": [{"top_entropy_quantile": 1.0}, {"top_entropy_quantile": 0.3}],
    "OPSM": [{"off_policy_mask_threshold": None}, {"off_policy_mask_threshold": 0.1}],
    "vLLM": [
        {"use_vllm": False},
        *(
            {"use_vllm": True, "vllm_importance_sampling_mode": mode}
            for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        ),
    ],
    "entropy bonus": [{"entropy_coef": 0.0}, {"entropy_coef": 0.05}],
}
#: The largest error of loss and gradients that counts as agreement, relative to the largest value.
AGREEMENT = 1e-12
#: Completions, the longest of them, hidden width and vocabulary of a case.
B, C, H, V = 6, 7, 5, 11


class Case(NamedTuple):
    """What one micro-batch has, as TRL's loss takes it, and the head that predicts it."""

    inputs: dict[str, Any]
    hidden: Tensor  # [B, C, H]
    weight: Tensor  # [V, H]


class Outcome(NamedTuple):
    """A configuration: by how much TRL and lvrpo differ, or why it is refused."""

    options: dict[str, Any]
    loss: float = 0.0
    gradient: float = 0.0
    metrics: float = 0.0
    refused: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the two are the same to rounding."""
        # Each by itself, for max passes a NaN over.
        return all(error <= AGREEMENT for error in (self.loss, self.gradient, self.metrics))


def grid() -> list[dict[str, Any]]:
    """Every configuration of `AXES` but those that TRL itself refuses."""
    every = [
        {name: value for part in parts for name, value in part.items()}
        for parts in itertools.product(*AXES.values())
    ]
    return [options for options in every if not _refused_by_trl(options)]


def _refused_by_trl(options: dict[str, Any]) -> bool:
    mode: str = options.get("vllm_importance_sampling_mode", "")
    return options["loss_type"] == "vespo" and mode.startswith("sequence")


def make_case(options: dict[str, Any], seed: int) -> Case:
    """Ragged completions, holes of a tool, one masked sequence, an advantage of 0."""
    random_numbers = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random_numbers, dtype=torch.float64)

    lengths = torch.tensor([C, C - 1, 3, 1, 5, 4])
    completion_mask = (torch.arange(C) < lengths[:, None]).long()
    completion_mask[2] = 0
    tool_mask = torch.ones(B, C, dtype=torch.long)
    tool_mask[0, 2:4] = tool_mask[4, 1] = 0
    mask = completion_mask * tool_mask
    hidden, weight = normal(B, C, H), normal(V, H)
    ids = torch.randint(V, (B, C), generator=random_numbers)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.cat([torch.zeros(1, dtype=torch.float64), normal(B - 1)]),
        "num_items_in_batch": mask.sum() * 3,
        "old_per_token_logps": logprobs + 0.3 * normal(B, C),
        "ref_per_token_logps": logprobs + 0.3 * normal(B, C),
    }
    if options["use_vllm"]:
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 0.2 * normal(B, C)
        level, _, outside = options["vllm_importance_sampling_mode"].partition("_")
        ratio = (0.5 * normal(B, 1 if level == "sequence" else C)).exp()
        if outside == "mask":
            ratio = torch.where(ratio > 1.4, 0.0, ratio)
        if level == "token":
            ratio = torch.where(mask > 0, ratio, 1.0)
        inputs["importance_sampling_ratio"] = ratio
    return Case(inputs, hidden, weight)


class _Bare:
    """What the losses read of a trainer, without a model, data or a run."""

    def __init__(self, config: Any, accelerator: Any, case: Case) -> None:
        self.args, self.accelerator, self.case = config, accelerator, case
        self.model = types.SimpleNamespace(training=True)
        self.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        self.epsilon_low = config.epsilon
        self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.aux_loss_enabled = False
        for name in COPIED:
            setattr(self, name, getattr(config, name))
        self._entropy_bonus_enabled = config.entropy_coef != 0 or config.use_adaptive_entropy
        self._last_world_entropy = float("inf")
        self._entropy_window_stats = None
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.hidden = case.hidden.clone().requires_grad_()
        self.weight = case.weight.clone().requires_grad_()

    def measured(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the gradients of hidden states and weight, and the metrics."""
        loss = self._compute_loss(None, self.case.inputs)  # type: ignore[attr-defined]
        gradients = torch.autograd.grad(loss, (self.hidden, self.weight))
        logged = [value for _, (value,) in sorted(self._metrics["train"].items())]
        return loss.detach(), torch.cat([x.flatten() for x in gradients]), torch.tensor(logged)


#: Options that TRL's trainer has as attributes of its own.
COPIED = (
    *("loss_type", "importance_sampling_level", "beta", "top_entropy_quantile", "temperature"),
    *("off_policy_mask_threshold", "use_vllm", "vllm_importance_sampling_correction"),
    *("max_completion_length", "entropy_coef", "use_adaptive_entropy"),
)


class _Theirs(_Bare, trl.GRPOTrainer):  # type: ignore[misc]
    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Any, ...]:
        every = (self.hidden @ self.weight.T / self.temperature).log_softmax(-1)
        ids, mask = self.case.inputs["completion_ids"], self.case.inputs["completion_mask"] == 0
        logprobs = every.gather(-1, ids[..., None])[..., 0]
        entropy = -(every.exp() * every).sum(-1)
        return logprobs.masked_fill(mask, 0.0), entropy.masked_fill(mask, 0.0), None


class _Ours(_Bare, GRPOTrainer):
    def __init__(self, config: Any, accelerator: Any, case: Case) -> None:
        super().__init__(config, accelerator, case)
        self._set_up_loss()

    def _states(self, *_: Any) -> CompletionStates:
        return CompletionStates(self.hidden, self.weight)


def compare(config: Any, accelerator: Any, options: dict[str, Any], seed: int) -> Outcome:
    """TRL and lvrpo on one configuration."""
    config = copy.copy(config)
    for name, value in options.items():
        setattr(config, name, value)
    case = make_case(options, seed)
    try:
        ours = _Ours(config, accelerator, case)
    except ValueError as error:
        return Outcome(options, refused=str(error))
    theirs = _Theirs(config, accelerator, case)
    (loss, *results), (their_loss, *their_results) = ours.measured(), theirs.measured()
    if ours._metrics["train"].keys() != theirs._metrics["train"].keys():
        return Outcome(options, metrics=float("inf"))
    scale = their_loss.abs().clamp(min=1)
    return Outcome(
        options,
        loss=float((loss - their_loss).abs() / scale),
        gradient=_apart(results[0], their_results[0]),
        metrics=_apart(results[1], their_results[1]),
    )


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the largest value of `y`."""
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))


@contextlib.contextmanager
def _fp64() -> Iterator[None]:
    """TRL makes fp32 tensors of some options, which would be the largest error of all."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(configurations: Iterable[dict[str, Any]]) -> list[Outcome]:
    """TRL and lvrpo on each of these options."""
    config = trl.GRPOConfig(
        output_dir="parity",
        use_cpu=True,
        bf16=False,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_completion_length=C,
        temperature=0.7,
        epsilon_high=0.28,
        report_to=[],
    )
    accelerator = accelerate.Accelerator(cpu=True)
    with _fp64():
        return [compare(config, accelerator, x, seed) for seed, x in enumerate(configurations)]


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: by loss and level, the call, how many agree, and the largest errors."""
    head = "loss_type", "level", "`LossParams`", "honoured", "refused by name", "wrong"
    lines = [_row(*head, "loss", "gradient", "metrics"), "|---" * 9 + "|"]

    def key(outcome: Outcome) -> tuple[str, str]:
        return outcome.options["loss_type"], outcome.options["importance_sampling_level"]

    for (loss, level), group in itertools.groupby(outcomes, key):
        rows = list(group)
        errors = [max(getattr(row, x) for row in rows) for x in ("loss", "gradient", "metrics")]
        cells = [loss, level, _call(loss, level), *counts(rows).values()]
        lines.append(_row(*cells, *(f"{error:.0e}" for error in errors)))
    counted = counts(outcomes)
    lines += [
        "",
        f"{len(outcomes)} configurations: {counted['honoured']} honoured, {counted['refused']} "
        f"refused by name, {counted['wrong']} wrong. " + versions(),
    ]
    lines += ["", *(f"- refused: {reason}" for reason in reasons(outcomes))]
    return "\n".join(lines).rstrip()


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many configurations are honoured, refused and wrong."""
    refused = sum(outcome.refused is not None for outcome in outcomes)
    wrong = sum(outcome.refused is None and not outcome.agrees for outcome in outcomes)
    return {
        "honoured": len(outcomes) - refused - wrong,
        "refused": refused,
        "wrong": wrong,
    }


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """The messages of what is refused, each once."""
    return sorted({outcome.refused for outcome in outcomes if outcome.refused is not None})


def _call(loss: str, level: str) -> str:
    """The fields of LossParams that name the loss."""
    fields = {"ratio": RATIOS[level], **LOSSES[loss]}
    return "`" + ", ".join(f"{name}={value!r}" for name, value in fields.items()) + "`"


def versions() -> str:
    """What was compared."""
    packages = {"TRL": trl, "transformers": transformers, "torch": torch, "lvrpo": lvrpo}
    named = ", ".join(f"{name} {package.__version__}" for name, package in packages.items())
    return f"{named}, Python {platform.python_version()}."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m lvrpo.integrations.parity")
    parser.add_argument("--sample", type=int, help="compare only so many, chosen at random")
    options = parser.parse_args(arguments)
    configurations = grid()
    if options.sample is not None:
        chosen = random.Random(0).sample(range(len(configurations)), options.sample)
        configurations = [configurations[at] for at in sorted(chosen)]
    outcomes = run(configurations)
    print(table(outcomes))
    return int(counts(outcomes)["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
