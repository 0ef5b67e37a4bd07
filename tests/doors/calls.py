"""Every op in one table: how its inputs are made and it is called, and which numbers it takes.

The tests beside this file hold all ops to what a trainer does to any op. A new op needs a row here,
and a new number of an op, or of its parameter class, an entry in `settings`.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lvrpo
from lvrpo import backends
from lvrpo.params.advantages import AdvantageParams
from lvrpo.params.flow import FlowLossParams, GuidanceParams, StepCoefficients
from lvrpo.params.metrics import Metrics
from lvrpo.params.policy_loss import LossParams

#: How many values of every number are tried.
VALUES = 12
Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Inputs to add, and the numbers that matter with them: `VALUES` values by name.

    "params.beta" is the field of the parameter class that the op takes as `params`.
    """

    name: str
    numbers: Mapping[str, Sequence[Any]]
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Call:
    """One op.

    Attributes:
        op: its name in lvrpo.
        make: inputs in a dtype, the same at every call.
        differentiable: inputs that get a gradient.
        narrow: inputs that mixed precision leaves in 16 bits next to others in fp32.
        settings: between them, every number that the op takes.
        params: its parameter class.
        shapes: numbers that say a shape, or of which one value alone is accepted; with the reason.
    """

    op: str
    make: Callable[[torch.dtype], Inputs]
    differentiable: tuple[str, ...]
    narrow: tuple[str, ...]
    settings: tuple[Setting, ...] = ()
    params: type | None = None
    shapes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def inputs(self, backend: str, dtype: torch.dtype = torch.float32) -> Inputs:
        """Fresh leaves; skips the test where the op has no such backend."""
        reasons = backends.named(backend).why_not(self.op)
        if reasons:
            pytest.skip(f"backend {backend}: {'; '.join(reasons)}")
        return self.with_leaves(self.make(dtype)) | {"backend": backend}

    def with_leaves(self, inputs: Inputs) -> Inputs:
        return inputs | {
            name: inputs[name].detach().clone().requires_grad_() for name in self.differentiable
        }

    def run(self, **inputs: Any) -> tuple[Tensor, ...]:
        """Every tensor of the result."""
        return tuple(tensors_of(getattr(lvrpo, self.op)(**inputs)))

    @staticmethod
    def total(results: Sequence[Tensor]) -> Tensor:
        """A scalar to differentiate: all results that have a gradient, differently weighted."""
        terms = []
        for result in results:
            if result.requires_grad:
                like = {"dtype": torch.float32, "device": result.device}
                factors = torch.linspace(0.5, 1.5, result.numel(), **like)
                terms.append((result * factors.reshape(result.shape)).sum())
        return torch.stack(terms).sum()

    def gradients(self, inputs: Inputs, results: Sequence[Tensor]) -> list[Tensor]:
        """Of `total`, by the inputs that want one."""
        leaves = [inputs[name] for name in self.differentiable if inputs[name].requires_grad]
        return list(torch.autograd.grad(self.total(results), leaves)) if leaves else []

    def numbers(self) -> set[str]:
        """The names of all numbers, by the annotations of the op and of its parameter class."""
        hints = typing.get_type_hints(inspect.unwrap(getattr(lvrpo, self.op)))
        found = {name for name, hint in hints.items() if name != "return" and is_number(hint)}
        if self.params is not None:
            hints = typing.get_type_hints(self.params)
            fields = {field.name for field in dataclasses.fields(self.params)}
            found |= {f"params.{name}" for name in fields if is_number(hints[name])}
        return found


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Metrics):
        return [result.sums, result.extremes]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
    return [tensor for part in result for tensor in tensors_of(part)]


def device_of(inputs: Inputs) -> str:
    return next(x.device.type for x in inputs.values() if isinstance(x, Tensor))


def is_number(hint: Any) -> bool:
    """Whether a float or an int may be given, or a few; bools choose, and lists are data."""
    if typing.get_origin(hint) in (typing.Literal, Sequence):
        return False
    return hint in (int, float) or any(is_number(part) for part in typing.get_args(hint))


def with_numbers(inputs: Inputs, numbers: Mapping[str, Any]) -> Inputs:
    """The arguments of a call with these numbers."""
    fields = {name[7:]: x for name, x in numbers.items() if name.startswith("params.")}
    given = inputs | {name: x for name, x in numbers.items() if not name.startswith("params.")}
    if fields:
        given["params"] = dataclasses.replace(inputs["params"], **fields)
    return given


def between(low: float, high: float) -> list[float]:
    return [low + (high - low) * step / (VALUES - 1) for step in range(VALUES)]


def pairs(first: Sequence[float], second: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(first, second, strict=True))


IGNORED = -100
SOFTMAX: dict[str, Sequence[Any]] = {
    "temperature": between(0.5, 1.6),
    "softcap": between(3.0, 9.0),
    "ignore_index": list(range(-100, -100 + VALUES)),
    "vocab_range": pairs([0, 1, 2] * 4, list(range(17, 17 + VALUES))),
}


def softmax_setting(ids: Tensor, **more: Sequence[Any]) -> Setting:
    """The numbers of a softmax over a vocabulary; none of the tokens is ignored in it."""
    return Setting("softmax", SOFTMAX | more, {"token_ids": ids.clamp(min=3)})


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


IDS = torch.tensor([4, 11, IGNORED, 16, 3])
VOCAB = 29


def ids() -> Tensor:
    return torch.tensor(IDS.tolist())


def gather_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(1)
    return {"logits": random(5, VOCAB, dtype=dtype), "token_ids": ids(), "return_entropy": True}


def head_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(2)
    head = {"hidden": (5, 6), "weight": (VOCAB, 6), "bias": (VOCAB,)}
    return {name: random(*shape, dtype=dtype) for name, shape in head.items()} | {
        "token_ids": ids()
    }


def loss_data(dtype: torch.dtype) -> Inputs:
    return {
        "old_logprobs": random(5, dtype=dtype).abs().neg() - 2,
        "advantages": random(3, dtype=dtype),
        "cu_seqlens": torch.tensor([0, 2, 4, 5]),
        "ref_logprobs": random(5, dtype=dtype).abs().neg() - 2,
        "mask": torch.tensor([1, 1, 1, 0, 1]),
        "policy_weights": torch.tensor([1.0, 0.5, 0.0, 3.0, 2.0]).to(dtype),
        "params": LossParams(beta=0.1),
    }


def logprob_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(3)
    logprobs = {"logprobs": random(5, dtype=dtype).abs().neg() - 2}
    return logprobs | loss_data(dtype) | {"entropy": random(5, dtype=dtype).abs()}


def logits_loss_inputs(dtype: torch.dtype) -> Inputs:
    given = gather_inputs(dtype) | loss_data(dtype)
    del given["return_entropy"]
    return given


def linear_loss_inputs(dtype: torch.dtype) -> Inputs:
    return head_inputs(dtype) | loss_data(dtype)


def advantage_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(4)
    rewards = random(12, 2, dtype=dtype)
    lengths = torch.arange(1, 13)
    return {
        "rewards": rewards,
        "groups": torch.tensor([0, 4, 9, 12]),
        "lengths": lengths,
        "params": AdvantageParams(),
    }


def attention_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(5)
    tensors = {"q": (9, 4, 8), "k": (9, 2, 8), "v": (9, 2, 8)}
    mask = lvrpo.SpanMask.from_spans([3, 4, 2], [-1, 0, 0], ["causal", "full", "causal"])
    return {name: random(*shape, dtype=dtype) for name, shape in tensors.items()} | {"mask": mask}


def coefficients(images: int) -> StepCoefficients:
    t = torch.linspace(0.9, 0.5, images)
    return StepCoefficients(c_x=1 - t / 9, c_v=t - 1.1, std=t / 3, t=t, dt=-t / 7)


def step_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(6)
    latents = {name: random(3, 2, 5, dtype=dtype) for name in ("velocity", "x_t", "noise")}
    return latents | {"coeffs": coefficients(3)}


def flow_loss_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(7)
    velocity = random(3, 2, 5, dtype=torch.float32)
    return {
        "velocity": velocity.to(dtype),
        "velocity_old": (velocity + random(3, 2, 5, dtype=torch.float32) / 50).to(dtype),
        "velocity_ref": (velocity + random(3, 2, 5, dtype=torch.float32) / 20).to(dtype),
        "noise": random(3, 2, 5, dtype=dtype),
        "coeffs": coefficients(3),
        "advantages": torch.tensor([1.0, -0.5, 2.0]).to(dtype),
        "mask": torch.tensor([1, 0, 1]),
        "policy_weights": torch.tensor([1.0, 0.5, 2.0]).to(dtype),
        "params": FlowLossParams(beta=0.1),
    }


def guidance_inputs(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(8)
    return {
        "velocity": random(3, 2, 5, dtype=dtype),
        "without_text": random(3, 2, 5, dtype=dtype),
        "without_image": random(3, 2, 5, dtype=dtype),
        "guided": torch.tensor([1, 0, 1]),
        "params": GuidanceParams(),
    }


POLICY = {"denominator": between(1.0, 9.0)}
LOSS_SETTINGS = (
    Setting(
        "clip",
        POLICY
        | {
            "params.clip_low": between(0.1, 0.3),
            "params.clip_high": between(0.1, 0.4),
            "params.ratio_cap": between(1.5, 3.0),
            "params.log_ratio_limit": between(0.5, 20.0),
            "params.beta": between(0.01, 0.3),
            "params.kl_log_ratio_limit": between(0.3, 5.0),
            "params.kl_limit": between(0.1, 3.0),
            "params.entropy_coef": between(0.01, 0.2),
        },
    ),
    Setting(
        "selection",
        {"top_entropy": between(0.1, 0.9), "off_policy_threshold": between(0.001, 0.3)},
    ),
    Setting("threshold", {"entropy_threshold": between(0.5, 2.0)}),
    Setting(
        "sigmoid",
        {"params.gate_pos": between(0.5, 2.0), "params.gate_neg": between(0.6, 2.1)},
        {"params": LossParams.preset("sapo")},
    ),
    Setting(
        "gamma",
        {
            "params.gamma_pos": pairs(between(1.0, 3.0), between(2.0, 4.0)),
            "params.gamma_neg": pairs(between(1.0, 3.0), between(2.0, 4.0)),
        },
        {"params": LossParams.preset("vespo")},
    ),
    Setting(
        "length",
        {"params.max_length": list(range(4, 4 + VALUES))},
        {"params": LossParams.preset("dr_grpo", max_length=3)},
    ),
)
ONE_VALUE = "no other value is accepted"

CALLS = {
    call.op: call
    for call in (
        Call("gather_logprobs", gather_inputs, ("logits",), ("logits",), (softmax_setting(ids()),)),
        Call(
            "linear_logprobs",
            lambda dtype: head_inputs(dtype) | {"return_entropy": True},
            ("hidden", "weight", "bias"),
            ("weight", "bias"),
            (softmax_setting(ids(), memory_budget=list(range(400, 400 + VALUES))),),
        ),
        Call(
            "grpo_loss",
            logprob_inputs,
            ("logprobs", "entropy"),
            ("logprobs",),
            LOSS_SETTINGS,
            LossParams,
        ),
        Call(
            "logits_grpo_loss",
            logits_loss_inputs,
            ("logits",),
            ("logits",),
            (*LOSS_SETTINGS, softmax_setting(ids())),
            LossParams,
        ),
        Call(
            "linear_grpo_loss",
            linear_loss_inputs,
            ("hidden", "weight", "bias"),
            ("weight", "bias"),
            (
                *LOSS_SETTINGS,
                softmax_setting(ids(), memory_budget=list(range(400, 400 + VALUES))),
            ),
            LossParams,
        ),
        Call(
            "normalize_advantages",
            advantage_inputs,
            (),
            ("rewards",),
            (
                Setting(
                    "numbers",
                    {
                        "weights": pairs(between(0.5, 2.0), between(1.0, 3.0)),
                        "params.eps": between(1e-6, 1e-2),
                        "params.std_floor": between(0.0, 2.0),
                        "params.clip": between(0.5, 2.0),
                        "params.ddof": [0, 1] * (VALUES // 2),
                    },
                ),
            ),
            AdvantageParams,
            {"groups": "an int says how many samples make a group"},
        ),
        Call(
            "packed_attention",
            attention_inputs,
            ("q", "k", "v"),
            ("k", "v"),
            (Setting("scores", {"scale": between(0.1, 0.6), "softcap": between(1.0, 6.0)}),),
            shapes={"dropout_p": ONE_VALUE, "window_size": ONE_VALUE},
        ),
        Call("flow_step", step_inputs, ("velocity", "x_t"), ("velocity",)),
        Call(
            "flow_policy_loss",
            flow_loss_inputs,
            ("velocity",),
            ("velocity",),
            (
                Setting(
                    "ppo",
                    POLICY
                    | {
                        "params.clip_low": between(1e-4, 1e-2),
                        "params.clip_high": between(1e-4, 1e-2),
                        "params.adv_clip": between(0.5, 3.0),
                        "params.log_ratio_scale": between(0.1, 2.0),
                        "params.log_ratio_limit": between(5.0, 20.0),
                        "params.beta": between(0.01, 0.4),
                    },
                ),
                Setting(
                    "dppo",
                    {"params.tau": between(1e-6, 1e-2)},
                    {"params": FlowLossParams(variant="dppo")},
                ),
            ),
            FlowLossParams,
        ),
        Call(
            "guided_velocity",
            guidance_inputs,
            ("velocity", "without_text", "without_image"),
            ("velocity", "without_text"),
            (
                Setting(
                    "scales",
                    {
                        "params.text_scale": between(1.5, 5.0),
                        "params.image_scale": between(1.2, 2.0),
                        "params.renorm_min": between(0.0, 0.4),
                    },
                ),
            ),
            GuidanceParams,
        ),
    )
}

every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
