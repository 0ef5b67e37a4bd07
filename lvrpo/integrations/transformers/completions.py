"""Hidden states and head of a language model for `linear_grpo_loss`, from its own forward.

The head is met where it stands, by hooks that are there for one call: wrappers (FSDP, DDP, PEFT,
autocast, accelerate) act as they do in training, and no logits are formed. What the model does to
its logits afterwards is not looked up by names of its configuration, it is measured: the head
answers with one row of known numbers.

B sequences of L tokens, C of them the completion, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lvrpo import checks
from lvrpo.integrations.transformers.attention import IMPLEMENTATION
from lvrpo.integrations.transformers.release import require_transformers

NAME = "completion_states"
#: Inputs that are about logits, of which there are none.
ABOUT_LOGITS = ("labels", "logits_to_keep", "return_dict")
#: Among the known numbers, one whose soft-cap is the identity and one whose soft-cap is the cap.
SMALL, LARGE = 2.0**-30, 2.0**20


@dataclasses.dataclass(frozen=True, eq=False)
class CompletionStates:
    """What `linear_logprobs` and `linear_grpo_loss` need of a model; see `completion_states`.

    The model's logits are softcap * tanh(logit_scale * z / softcap), z = hidden @ weight.T + bias.

    Attributes:
        hidden: [B, C, H], row c of a sequence predicts its completion's token c; or all the
            rows that the head was given, [B, L, H].
        weight: [V, H] of the head.
        bias: [V], or None.
        logit_scale: > 0; multiplies the logits.
        softcap: > 0, of the scaled logits; None: they have none.
        aux_loss: of a mixture of experts that was asked for it; None otherwise.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    aux_loss: Tensor | None = None

    def head(self, temperature: float = 1.0) -> dict[str, Any]:
        """Keyword arguments of `linear_logprobs` and `linear_grpo_loss`.

        Args:
            temperature: divides the model's own logits.
        """
        return {
            "hidden": self.hidden,
            "weight": self.weight,
            "bias": self.bias,
            "temperature": temperature / self.logit_scale,
            "softcap": None if self.softcap is None else self.softcap / self.logit_scale,
        }


def completion_states(
    model: nn.Module,
    inputs: Mapping[str, Any],
    completion_length: int | None = None,
    *,
    autocast: bool = True,
) -> CompletionStates:
    """Run a causal language model up to its head.

    Args:
        model: a transformers model with a linear head, wrapped in whatever it is trained with.
            Parameters that a wrapper shards again after each module are refused where those of the
            head are among them: the loss comes after the forward.
        inputs: keyword arguments of its forward; `use_cache` is False unless given.
        completion_length: C, the last tokens of every sequence, which are the targets; None: keep
            all rows, as for a packed buffer, whose targets `row_index` names.
        autocast: whether autocast, where it is on, narrows what the head reads; False for a head
            that stays in fp32.

    Returns:
        Tensors with the model's graph, as its own head would read them: under autocast in the dtype
        of autocast.

    Raises:
        ImportError: transformers is missing, or not a release that this is tested with.
        ValueError: the model has no linear head, or one with an adapter; its logits are no scale
            and soft-cap of that head; an input is about logits; fewer than C + 1 tokens; a
            `span_mask` for another attention than lvrpo's, or for an adapter with tokens of its
            own.

    Example:
        >>> states = completion_states(model, inputs, completion_length=16)  # doctest: +SKIP
        >>> lvrpo.linear_logprobs(**states.head(temperature=0.7), token_ids=ids)  # doctest: +SKIP
    """
    require_transformers()
    for name in ABOUT_LOGITS:
        if name in inputs:
            raise ValueError(
                f"{NAME}: inputs have {name!r}, but no logits are formed: leave it out"
            )
    whole = _model_with_head(model)
    if "span_mask" in inputs:
        _check_adapter(model)
        _check_attention(whole)
    met = _Head(completion_length, autocast)
    with met.hooks(_layers_of_head(whole)):
        outputs = model(**{"use_cache": False, **inputs})
    if met.hidden is None or met.weight is None:
        raise ValueError(
            f"{NAME}: {type(model).__name__} did not run its head where hooks see it; a model that "
            "is compiled as a whole does not: compile its layers"
        )
    if met.weight.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"{NAME}: the weight of the head was sharded again after the forward; let the root "
            "hold it (no fully_shard of the head, reshard_after_forward=False of the root)"
        )
    scale, softcap = _scale_and_cap(met.probe, outputs.logits.detach())
    return CompletionStates(
        _Joined.apply(met.hidden, outputs.logits),
        met.weight,
        met.bias,
        scale,
        softcap,
        getattr(outputs, "aux_loss", None),
    )


def _model_with_head(model: nn.Module) -> Any:
    """The outermost model that has a head, inside of what it is wrapped in."""
    for module in model.modules():
        find = getattr(type(module), "get_output_embeddings", None)
        if find is not None and find(module) is not None:
            return module
    raise ValueError(f"{NAME}: {type(model).__name__} has no head (get_output_embeddings)")


def _layers_of_head(model: Any) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    plain = [layer for layer in layers if type(layer).forward is nn.Linear.forward]
    if not layers or plain != layers:
        raise ValueError(f"{NAME}: the head is a {type(head).__name__}, expected nn.Linear")
    return layers


def _check_adapter(model: nn.Module) -> None:
    """A `span_mask` has no rows for tokens that an adapter of PEFT adds: they could get lost."""
    for module in model.modules():
        adapter = getattr(module, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ValueError(
                f"{NAME}: inputs have a span_mask, but the adapter adds tokens of its own "
                f"({adapter.peft_type.value}), expected none, or LoRA: give it separate sequences"
            )


def _check_attention(model: Any) -> None:
    """Other attention would not look at a `span_mask`, and say nothing."""
    found = model.config.get_text_config()._attn_implementation
    if found != IMPLEMENTATION:
        raise ValueError(
            f"{NAME}: inputs have a span_mask, but the model's attention is {found!r}, expected "
            f"{IMPLEMENTATION!r}: set_attention(model)"
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Head:
    """The head of one forward: takes what it is given, and answers with the known numbers."""

    def __init__(self, completion_length: int | None, autocast: bool) -> None:
        self.completion_length = completion_length
        self.factor = checks.as_factor if autocast else _as_it_is
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @contextlib.contextmanager
    def hooks(self, layers: list[nn.Linear]) -> Iterator[None]:
        """Stand before and behind these layers, inside of what wrappers do there."""
        handles: list[Any] = []
        try:
            for layer in layers:
                handles.append(layer.register_forward_pre_hook(self._before))
                handles.append(layer.register_forward_hook(self._after, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        if self.hidden is not None:
            raise ValueError(
                f"{NAME}: the head runs more than one linear layer; merge its adapter, or leave "
                "the head out of the adapter's modules"
            )
        (hidden,) = arguments
        count = self.completion_length
        if count is not None:
            if not 0 < count < hidden.shape[1]:
                raise ValueError(
                    f"{NAME}: completion_length is {count}, expected 1 to {hidden.shape[1] - 1}, "
                    "one less than the tokens that the head was given"
                )
            hidden = hidden[:, -count - 1 : -1]
        self.hidden = self.factor(hidden)
        return (hidden[:, :0],)

    def _after(self, layer: nn.Linear, arguments: object, logits: Tensor) -> Tensor:
        self.weight = self.factor(layer.weight)
        self.bias = None if layer.bias is None else self.factor(layer.bias)
        # On the host, where its numbers can be read without waiting for a device.
        with torch.device("cpu"):
            self.probe = torch.linspace(-64.0, 64.0, logits.shape[-1], dtype=torch.float64)
            self.probe[:2] = torch.tensor([SMALL, LARGE])
        answer: Tensor = _Answer.apply(self.probe[None, None], self.hidden, self.weight, self.bias)
        return answer


def _scale_and_cap(probe: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """What a model did to the known numbers.

    Raises:
        ValueError: it is no scale and soft-cap, or its dtype hides which.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{NAME}: the model's outputs are cast to {logits.dtype}, which hides the scale of its "
            "logits; leave them (fully_shard's output_dtype)"
        )
    seen = logits.double().flatten()
    as_many = len(seen) == len(probe)
    scale, largest = float(seen[0]) / SMALL, float(seen[1])
    softcap = None if abs(largest - scale * LARGE) <= 1e-4 * abs(largest) else abs(largest)
    expected = scale * probe
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
    if as_many and scale > 0 and bool(((seen - expected).abs() <= 1e-5 * expected.abs()).all()):
        return scale, softcap
    raise ValueError(
        f"{NAME}: the model's logits are no scale and soft-cap of its head's (a bias or a mask of "
        "tokens behind the head, or a cut vocabulary), which linear ops cannot follow"
    )


class _Answer(torch.autograd.Function):
    """The known numbers, as a result of hidden, weight and bias, to which it has no gradient."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, *inputs: Tensor | None) -> Tensor:
        return probe.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        return None, None, None, None


class _Joined(torch.autograd.Function):
    """The hidden states, as a result of the model's output too, where wrappers await backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.like = logits.detach()
        view: Tensor = hidden.view_as(hidden)
        return view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.like)
