"""Losses at the level of whole sequences, and bounds of any size, against TRL's own function."""

from __future__ import annotations

import collections
import itertools
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from lvrpo.ops.grpo_loss import LossParams, grpo_loss
from lvrpo.sampler_correction import top_entropy_mask

GRPOTrainer = pytest.importorskip("trl", reason="pip install 'lvrpo[trl]'").GRPOTrainer
ROWS, COLUMNS = 5, 7
LENGTHS = torch.tensor([7, 4, 1, 6, 3])
#: By TRL's name of the loss: what it is here.
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "seq_mean_token_sum_norm", "max_length": COLUMNS},
    "luspo": {"aggregation": "seq_mean_token_sum"},
    "dapo": {"aggregation": "token_mean"},
    "cispo": {"surrogate": "detached", "aggregation": "token_mean"},
    "sapo": {"surrogate": "sigmoid"},
    "vespo": {"surrogate": "gamma", "aggregation": "token_mean"},
}


class Accelerator:
    """Of one process."""

    num_processes = 1

    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


def trl_loss(options: dict[str, Any], logps: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """TRL's loss of these log-probs, on all of its trainer that this takes."""
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, inputs["entropy"], None),
        get_high_entropy_mask=types.MethodType(
            GRPOTrainer.get_high_entropy_mask, types.SimpleNamespace(accelerator=Accelerator())
        ),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        args=types.SimpleNamespace(
            use_bias_correction_kl=options["bias_corrected"],
            delta=options["delta"],
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=torch.tensor(1.05).item(),  # what its fp32 makes of 1.05
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=options["top_entropy"],
        off_policy_mask_threshold=None,
        importance_sampling_level=options["level"],
        loss_type=options["loss_type"],
        beta=options["beta"],
        epsilon_low=0.1,
        epsilon_high=options["epsilon_high"],
        max_completion_length=COLUMNS,
        use_vllm=False,
        model=torch.nn.Identity(),
        current_gradient_accumulation_steps=1,
        accelerator=Accelerator(),
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
    )
    ids = torch.zeros(ROWS, COLUMNS, dtype=torch.long)
    given = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids}
    given |= {"num_items_in_batch": inputs["completion_mask"].sum()}
    return GRPOTrainer._compute_loss(trainer, None, {**given, **inputs})


def padded() -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and what else TRL's loss takes."""
    made = torch.Generator().manual_seed(3)

    def normal(spread: float) -> Tensor:
        return spread * torch.randn(ROWS, COLUMNS, generator=made).double()

    logps = -normal(1.0).abs() - 0.1
    return logps, {
        "completion_mask": (torch.arange(COLUMNS) < LENGTHS[:, None]).long(),
        "old_per_token_logps": logps + normal(0.4),
        "ref_per_token_logps": logps + normal(0.4),
        "entropy": normal(1.0).abs(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.25, 2.0]).double(),
    }


def ours(options: dict[str, Any], logps: Tensor, inputs: dict[str, Tensor], backend: str) -> Tensor:
    name, mask = options["loss_type"], inputs["completion_mask"]
    sequence = options["level"] == "sequence"
    bounds: dict[str, Any] = {"clip_low": 0.1, "clip_high": options["epsilon_high"]}
    bounds["ratio_cap"] = options["delta"]
    if name == "cispo":
        bounds = {"clip_low": float("inf"), "clip_high": options["epsilon_high"] - 1}
    elif name in ("sapo", "vespo"):
        bounds = {"gate_neg": torch.tensor(1.05).item()}
    factor = "sequence_ratio" if sequence else "ratio"
    params = LossParams(
        **LOSSES[name] | bounds,
        ratio="seq_sum" if name == "vespo" else "seq_mean" if sequence else "token",
        beta=options["beta"],
        kl_factor=factor if options["bias_corrected"] else "none",
    )
    weights = None
    if options["top_entropy"] < 1:
        weights = top_entropy_mask(inputs["entropy"], fraction=options["top_entropy"], mask=mask)
    return grpo_loss(
        logps,
        inputs.get("old_per_token_logps"),
        inputs["advantages"],
        mask=mask,
        policy_weights=weights,
        ref_logprobs=inputs["ref_per_token_logps"],
        params=params,
        backend=backend,
    ).loss


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_loss_and_gradient_are_those_of_trl(backend, loss_type, level, on_policy):
    logps, inputs = padded()
    if on_policy:
        del inputs["old_per_token_logps"]
    kls = [(0.0, False), (0.3, False), (0.3, True)]
    caps = [None, 0.8, 1.02, 1.3] if loss_type in ("grpo", "luspo") else [None]
    for (beta, corrected), delta, high, top in itertools.product(
        kls, caps, (0.2, 0.05), (1.0, 0.3)
    ):
        options = {"loss_type": loss_type, "level": level, "delta": delta, "epsilon_high": high}
        options |= {"beta": beta, "bias_corrected": corrected, "top_entropy": top}
        found: list[tuple[Tensor, Tensor]] = []
        for loss_of in (trl_loss, lambda *given: ours(*given, backend)):
            leaf = logps.clone().requires_grad_()
            loss = loss_of(options, leaf, inputs)
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        for theirs, own in zip(*found, strict=True):
            torch.testing.assert_close(own, theirs, msg=str(options))
