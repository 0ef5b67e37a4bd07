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

from lvrpo.models.protocol import DivergedError
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.journal import Snapshot
from lvrpo.trainer.placement import as_stored, leave_unused, like_stored, whole_tensor
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
        self.average: RunningAverage | None = None
        self._mid_step = False  # the weights are no longer, or not yet, those of a finished step
        self._kept: Snapshot | None = None  # the last finished step, see `keep`
        if self.step < config.warm_start.steps:
            self.average = RunningAverage(model, EMA)
            self._begin_warm_start()
        else:
            self._begin_policy_phase()
        if saved is not None:
            restore_optimizer(model, self._optimizer, _part(saved, "optimizer."))
            # The weights last: what makes room in an optimizer is a step that moves none.
            load_weights(model, saved, "model.")
            if self.average is not None:
                self.average.load(_part(saved, "average."))

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
        leave_unused(self.model)
        total = nn.utils.clip_grad_norm_(self.model.parameters(), bound)
        norm = float(whole_tensor(total))
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
            self.average.update(self.model)
        return {"grad_norm": norm, "lr": float(lr)}

    def finish(self) -> None:
        """Count a step whose weights are in place, and make ready for the next."""
        self.step += 1
        self._rates.step()
        if self.average is not None and self.step == self.config.warm_start.steps:
            self.model.load_state_dict(self.average.weights)
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
        """Everything a snapshot needs, by name; not copied. Those of shards are DTensors."""
        parts: dict[str, Mapping[str, Tensor]] = {"model": self.weights()}
        if self.average is not None:
            parts["average"] = self.average.tensors()
        parts["optimizer"] = optimizer_tensors(self.model, self._optimizer)
        return {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}

    def weights(self) -> dict[str, Tensor]:
        """Those of the model alone, as in `tensors`."""
        return {name: as_stored(tensor) for name, tensor in self.model.state_dict().items()}


class RunningAverage:
    """The exponential average of a model's weights, which begins with them.

    Args:
        model: as it is now.
        decay: of what was averaged.

    Attributes:
        weights: averaged, placed as the model's own are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._count = torch.ones((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one more update."""
        seen = int(self._count)
        decay = min(self.decay, seen / (9 + seen))  # it must forget the first steps of a short run
        for name, weight in model.state_dict().items():
            average = self.weights[name]
            if weight.is_floating_point():
                average.lerp_(weight, 1 - decay)
            else:
                average.copy_(weight)
        self._count += 1

    def tensors(self) -> dict[str, Tensor]:
        """What a snapshot needs; not copied."""
        named = {f"module.{name}": as_stored(tensor) for name, tensor in self.weights.items()}
        return {"n_averaged": self._count, **named}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Copy what `tensors` gave."""
        for name, average in self.weights.items():
            average.copy_(like_stored(saved[f"module.{name}"], average))
        self._count.copy_(saved["n_averaged"])


#: One tensor per parameter and kind of state, by name, whatever the optimizer.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What any optimizer has gathered, by parameter; its hyperparameters are left out.

    Nothing is copied, and nothing is there before its first step.
    """
    if not optimizer.state:  # asking torch would give it one, of a step that was never made
        return {}
    named = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return {
        name: as_stored(torch.as_tensor(value))
        for name, value in named.items()
        if name.startswith("state.")
    }


def restore_optimizer(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Give an optimizer that has made no step what `optimizer_tensors` returned, copied.

    It makes a step of rate 0, so the weights are loaded after it.
    """
    named: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    for name, value in saved.items():
        own = named.get(name)
        if isinstance(own, int | float):
            named[name] = value.item()
        else:
            named[name] = value.clone() if own is None else like_stored(value.clone(), own)
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
    own = module.state_dict()
    try:
        module.load_state_dict(
            {
                name: like_stored(tensor, own[name]) if name in own else tensor
                for name, tensor in _part(snapshot, prefix).items()
            }
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{snapshot.origin} is of another model: {reason}") from error
