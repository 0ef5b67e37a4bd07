"""What changes from step to step, and so what a checkpoint holds."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvrpo.models.protocol import DivergedError
from lvrpo.models.unified.model import UnifiedModel
from lvrpo.runs.changes import Bridge, fingerprint
from lvrpo.runs.checkpoint import Checkpoint, CheckpointError
from lvrpo.runs.setup import Task
from lvrpo.trainer.config import TrainConfig
from lvrpo.trainer.schedule import learning_rate

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """Weights, their running average, the optimizer and the number of finished steps."""

    model: UnifiedModel
    average: UnifiedModel  # of the warm start; in the policy phase it is the weights themselves
    optimizer: torch.optim.AdamW
    step: int
    bridge: Bridge  # from a schedule of the learning rate that was changed
    made_with: dict[str, str]  # fingerprints of what decides the weights, see `Checkpoint.require`
    mid_step: bool = False  # the weights are no longer, or not yet, those of a finished step
    kept: dict[str, Tensor] | None = None  # of the last finished step, see `keep`

    @classmethod
    def initial(cls, config: TrainConfig, task: Task, bridge: Bridge = None) -> TrainState:
        """Freshly initialised weights, drawn from the run's seed."""
        model = task.new_model()
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.warm_start.lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        made_with = {"fingerprint": fingerprint(config), "task": task.fingerprint}
        return cls(model, average, optimizer, 0, bridge, made_with)

    def supervised_step(self, config: TrainConfig) -> dict[str, float]:
        """Clip, step and average; returns the gradient's norm and the learning rate.

        Raises:
            DivergedError: the gradient is not finite; the weights are left alone.
        """
        section = config.warm_start
        done = (self.step + 1) / max(1, section.steps)
        warmup = min(1.0, done / 0.05)
        lr = section.lr * warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        # The average must forget the first steps even in a short run.
        decay = min(section.ema, (1 + self.step) / (10 + self.step))
        return self._step("warm_start.lr", lr, config.optimizer.grad_clip, decay)

    def begin_policy_phase(self, config: TrainConfig) -> None:
        """Start the policy from the average of the warm start, with a new optimizer."""
        self.model.load_state_dict(self.average.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.lr,
            betas=(0.9, 0.95),
            weight_decay=config.optimizer.weight_decay,
        )

    def policy_step(self, config: TrainConfig) -> dict[str, float]:
        """As `supervised_step`, for a policy gradient."""
        lr = learning_rate(config, self.step - config.warm_start.steps, self.bridge)
        return self._step("optimizer.lr", lr, config.optimizer.grad_clip, decay=0.0)

    def _step(self, key: str, lr: float, grad_clip: float, decay: float) -> dict[str, float]:
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip or math.inf))
        if not math.isfinite(norm):
            raise DivergedError(
                f"step {self.step + 1}: the norm of the gradient is {norm}; a lower {key} (here "
                f"{lr:.2g}) may help; the checkpoints before it are kept"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.mid_step = True
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages: list[Tensor] = list(self.average.parameters())
            weights: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averages, weights, 1 - decay)
        return {"grad_norm": norm, "lr": lr}

    def finish(self) -> None:
        """Count a step whose weights are in place."""
        self.step += 1
        self.mid_step, self.kept = False, None

    def keep(self) -> None:
        """Copy the last finished step, before a step that updates the weights several times."""
        if not self.mid_step:
            self.kept = {name: tensor.clone() for name, tensor in self.tensors().items()}

    def finished_tensors(self) -> dict[str, Tensor]:
        """As `tensors`, of the last finished step.

        Raises:
            CheckpointError: an update was cut off in its middle, and there is no copy.
        """
        if not self.mid_step:
            return self.tensors()
        if self.kept is None:
            raise CheckpointError(f"the update of step {self.step + 1} was cut off in its middle")
        return self.kept

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, by name."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{moment}.{name}"] = value
        return tensors

    def restore(self, checkpoint: Checkpoint, config: TrainConfig) -> None:
        """Go on from a checkpoint of this run.

        Raises:
            CheckpointError: it was made with another configuration or another `task/` folder.
        """
        checkpoint.require(self.made_with)
        if checkpoint.step > config.warm_start.steps:
            self.begin_policy_phase(config)
        load_weights(self.model, checkpoint, "model.")
        load_weights(self.average, checkpoint, "average.")
        for name, parameter in self.model.named_parameters():
            if f"optimizer.step.{name}" in checkpoint.tensors:
                self.optimizer.state[parameter] = {
                    moment: checkpoint.tensors[f"optimizer.{moment}.{name}"].clone()
                    for moment in _MOMENTS
                }
        self.step = checkpoint.step


def load_weights(model: UnifiedModel, checkpoint: Checkpoint, prefix: str) -> None:
    """Copy the tensors that start with `prefix` into a model.

    Raises:
        CheckpointError: names or shapes are not those of this model.
    """
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{checkpoint.path} is of another model: {reason}") from error
