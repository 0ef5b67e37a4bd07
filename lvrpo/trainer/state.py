"""What changes from step to step, and so what a snapshot holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lvrpo.models.protocol import DivergedError
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.journal import Snapshot
from lvrpo.trainer.schedule import Bridge, learning_rate, warm_start_rate

#: Decay of the average of the warm start's weights.
EMA = 0.995


class TrainState:
    """Weights, their running average, the optimizer with its rate, and the number of steps.

    The warm start averages its weights and ends by taking the average for them, with an optimizer
    of its own for what follows: a snapshot of its last step is where the policy begins.

    Args:
        model: is trained in place, on its own device; fresh unless there is a snapshot.
        config: in force.
        saved: to go on from.
        bridge: from a schedule of the learning rate that was changed.

    Attributes:
        step: finished ones, counted through both phases.
        average: of the weights of the warm start; None in the policy phase.

    Raises:
        ValueError: the snapshot is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        saved: Snapshot | None = None,
        bridge: Bridge = None,
    ) -> None:
        self.model, self.config, self._bridge = model, config, bridge
        self.step = 0 if saved is None else saved.step
        self.average: AveragedModel | None = None
        self._mid_step = False  # the weights are no longer, or not yet, those of a finished step
        self._kept: Snapshot | None = None  # the last finished step, see `keep`
        if self.step < config.warm_start.steps:
            self.average = running_average(model, EMA)
            self._begin_warm_start()
        else:
            self._begin_policy_phase()
        if saved is not None:
            restore_optimizer(model, self._optimizer, _part(saved, "optimizer."))
            # The weights last: what makes room in an optimizer is a step that moves none.
            load_weights(model, saved, "model.")
            if self.average is not None:
                load_weights(self.average, saved, "average.")

    def _begin_warm_start(self) -> None:
        optimizer = AdamW(self.model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
        self._use(optimizer, partial(warm_start_rate, self.config.warm_start))

    def _begin_policy_phase(self) -> None:
        decay = self.config.optimizer.weight_decay
        optimizer = AdamW(self.model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=decay)
        first = self.config.warm_start.steps

        def rate(step: int) -> float:
            return learning_rate(self.config, step - first, self._bridge)

        self._use(optimizer, rate)

    def _use(self, optimizer: Optimizer, rate: Callable[[int], float]) -> None:
        """Take an optimizer of rate 1, so that the factor of its schedule is the rate itself."""
        begun = self.step
        self._optimizer = optimizer
        self._rates = LambdaLR(optimizer, lambda done: rate(begun + done))

    def update(self) -> dict[str, float]:
        """Clip the gradient, step and average; returns the gradient's norm and the learning rate.

        Raises:
            DivergedError: the gradient is not finite; the weights are left alone.
        """
        bound = self.config.optimizer.grad_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), bound))
        (lr,) = self._rates.get_last_lr()
        if not math.isfinite(norm):
            section = "optimizer" if self.average is None else "warm_start"
            raise DivergedError(
                f"step {self.step + 1}: the norm of the gradient is {norm}; a lower {section}.lr "
                f"(here {lr:.2g}) may help; the checkpoints before it are kept"
            )
        self._mid_step = True
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        return {"grad_norm": norm, "lr": float(lr)}

    def finish(self) -> None:
        """Count a step whose weights are in place, and make ready for the next."""
        self.step += 1
        self._rates.step()
        if self.average is not None and self.step == self.config.warm_start.steps:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None
            self._begin_policy_phase()
        self._mid_step, self._kept = False, None

    def keep(self) -> None:
        """Copy the last finished step, before a step that updates the weights several times."""
        if not self._mid_step:
            tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
            self._kept = Snapshot(self.step, tensors)

    def finished(self) -> Snapshot | None:
        """The last finished step; None where an update was cut off and there is no copy."""
        return self._kept if self._mid_step else Snapshot(self.step, self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Everything a snapshot needs, by name; not copied."""
        parts: dict[str, Mapping[str, Tensor]] = {"model": self.model.state_dict()}
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        parts["optimizer"] = optimizer_tensors(self.model, self._optimizer)
        return {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}


_Tensors = tuple[Tensor, ...] | list[Tensor]


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential average of a model's weights, this one's first."""

    def average(averaged: _Tensors, weights: _Tensors, seen: Tensor | int) -> None:
        # It must forget the first steps even in a short run.
        get_ema_multi_avg_fn(min(decay, int(seen) / (9 + int(seen))))(averaged, weights, seen)

    averaged = AveragedModel(model, multi_avg_fn=average).requires_grad_(False)
    averaged.update_parameters(model)
    return averaged


#: One tensor per parameter and kind of state, by name, whatever the optimizer.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What any optimizer has gathered, by parameter; its hyperparameters are left out.

    Nothing is copied, and nothing is there before its first step.
    """
    if not optimizer.state:  # asking torch would give it one, of a step that was never made
        return {}
    named = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return {name: torch.as_tensor(v) for name, v in named.items() if name.startswith("state.")}


def restore_optimizer(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Give an optimizer that has made no step what `optimizer_tensors` returned, copied.

    It makes a step of rate 0, so the weights are loaded after it.
    """
    named: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    for name, value in saved.items():
        named[name] = value.item() if isinstance(named.get(name), int | float) else value.clone()
    set_optimizer_state_dict(model, optimizer, named, options=_FLAT)
    for name, parameter in model.named_parameters():
        if not any(key.startswith(f"state.{name}.") for key in saved):
            optimizer.state.pop(parameter, None)  # it has had no gradient yet


def _part(snapshot: Snapshot, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in snapshot.tensors.items()
        if name.startswith(prefix)
    }


def load_weights(module: nn.Module, snapshot: Snapshot, prefix: str = "") -> None:
    """Copy the tensors whose names start with `prefix` into a module.

    Raises:
        ValueError: names or shapes are not those of this module.
    """
    try:
        module.load_state_dict(_part(snapshot, prefix))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{snapshot.origin} is of another model: {reason}") from error
