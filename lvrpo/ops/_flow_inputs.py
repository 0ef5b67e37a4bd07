"""What the objective of flow-matching steps takes, checked and in the form that backends take.

N samples: pairs of (image, trained step).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvrpo import checks
from lvrpo.dtypes import numbers, widen
from lvrpo.ops.flow_step import as_noise, check_coefficients
from lvrpo.params.flow import StepCoefficients

LATENTS = ("velocity", "velocity_old", "noise", "velocity_ref")


@dataclasses.dataclass(frozen=True)
class FlowInputs:
    """The arguments of `flow_policy_loss`, by its names.

    Attributes:
        velocity: [N, ...].
        velocity_old: [N, ...].
        noise: [N, ...], or int64 [N, 2].
        coeffs: [N] or [1].
        advantages: [N].
        velocity_ref: [N, ...], or None.
        mask: [N] bool, or None for all.
        policy_weights: [N], or None for ones.
        denominator: []; from a number, on the CPU; None for the number of active samples.
    """

    velocity: Tensor
    velocity_old: Tensor
    noise: Tensor
    coeffs: StepCoefficients
    advantages: Tensor
    velocity_ref: Tensor | None
    mask: Tensor | None
    policy_weights: Tensor | None
    denominator: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def latents(self) -> dict[str, Tensor | None]:
        """By name."""
        return {name: getattr(self, name) for name in LATENTS}

    def as_data(self) -> FlowInputs:
        """The same without a graph, and in the dtype of the result, but for the velocity."""
        dtype = widen(self.velocity).dtype

        def data(x: Tensor | None) -> Any:
            return None if x is None else checks.as_saved(x.detach().to(dtype))

        steps = {name: data(getattr(self.coeffs, name)) for name in ("c_v", "std", "dt")}
        names = "velocity_old", "velocity_ref", "advantages", "policy_weights", "denominator"
        found = {name: data(getattr(self, name)) for name in names}
        found["noise"] = as_noise(self.noise, dtype)
        return dataclasses.replace(self, **found, coeffs=dataclasses.replace(self.coeffs, **steps))

    def samples(self) -> dict[str, Tensor | None]:
        """What has one number per sample, by name."""
        return {name: getattr(self, name) for name in ("advantages", "mask", "policy_weights")}

    def check(self, op: str, *, divides_by_dt: bool) -> None:
        """Check coefficients and devices, and values where they may be read.

        Args:
            op: who asks, for the errors.
            divides_by_dt: whether a step of length 0 has no objective.

        Raises:
            ValueError: see `flow_policy_loss`.
        """
        check_coefficients(op, self.coeffs, len(self.velocity), self.mask)
        std = self.coeffs.std
        checks.check_same_device(op, **self.latents(), **self.samples(), coeffs=std)
        if not checks.check_values(std):
            return
        active = self._active()
        if self.denominator is not None:
            _check_denominator(op, float(self.denominator), int(active.sum()))
        pushes = active
        if self.policy_weights is not None:
            weights = self.policy_weights
            bad = active & ~(torch.isfinite(weights) & (weights >= 0))
            checks.refuse_first(op, "policy_weights", weights, bad, "a finite number >= 0")
            pushes = active & (weights > 0)
        bad = pushes & ~torch.isfinite(self.advantages)
        checks.refuse_first(op, "advantages", self.advantages, bad, "a finite number")
        self._refuse_step(op, "std", active, "is of a deterministic step", "log-probability")
        if divides_by_dt:
            self._refuse_step(op, "dt", pushes, "is of a step of no length", 'loss of "guard"')

    def refuse_non_finite(self, op: str) -> None:
        """Name the first active sample that holds NaN or inf, if there is one."""
        active = self._active()
        steps = {f"coeffs.{name}": getattr(self.coeffs, name) for name in ("c_v", "dt")}
        for name, tensor in (self.latents() | steps).items():
            if tensor is not None and tensor.numel():
                finite = torch.isfinite(tensor.detach()).reshape(len(tensor), -1).all(dim=1)
                bad = active & ~finite
                if bool(bad.any()):
                    at = int(bad.nonzero()[0])
                    raise ValueError(f"{op}: sample {at} of {name} holds NaN or inf")

    def _active(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(len(self.velocity), dtype=torch.bool, device=self.velocity.device)

    def _refuse_step(self, op: str, name: str, among: Tensor, what: str, missing: str) -> None:
        bad = among & (getattr(self.coeffs, name) == 0)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            t = float(self.coeffs.t.expand(len(bad))[at])
            raise ValueError(
                f"{op}: sample {at} {what} (coeffs.{name} is 0 at t = {t:.4g}), which has no "
                f"{missing}; leave it out or give it mask 0"
            )


def per_sample(op: str, name: str, value: Tensor | Sequence[float], velocity: Tensor) -> Tensor:
    """One number per sample, from a list or a tensor [N] or [N, 1], as [N]."""
    tensor = checks.as_tensor(op, name, value, velocity.device)
    if tensor.shape == (velocity.shape[0], 1):
        return tensor.reshape(-1)
    checks.check_shape(op, name, tensor, (velocity.shape[0],))
    return tensor


def as_denominator(op: str, denominator: Tensor | float | None) -> Tensor | None:
    """A tensor that holds one number; a traced number stays a variable of its graph."""
    if denominator is None:
        return None
    if not isinstance(denominator, Tensor):
        return numbers(denominator).reshape(())
    if denominator.numel() != 1:
        checks.check_shape(op, "denominator", denominator, ())
    return denominator.detach().reshape(())


def _check_denominator(op: str, denominator: float, active: int) -> None:
    if not 0 <= denominator < math.inf:
        raise ValueError(f"{op}: denominator is {denominator}, expected a finite number > 0")
    if denominator == 0 and active:
        raise ValueError(f"{op}: denominator is 0, but {active} samples count; expected > 0")
