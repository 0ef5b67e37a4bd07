"""Parameters and results of the flow ops: steps as coefficients, the objective, its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from lvrpo.params._validate import check_choices
from lvrpo.params.log_ratio import LOG_RATIO_LIMIT
from lvrpo.params.metrics import Maximum, Mean, Metrics, Minimum, Total

Variant = Literal["ppo", "guard", "dppo"]
KlForm = Literal["velocity_mse", "gaussian", "no_dt", "dmu2"]
VARIANTS: tuple[str, ...] = get_args(Variant)
KL_FORMS: tuple[str, ...] = get_args(KlForm)
#: By parameter: the names that it has.
FLOW_CHOICES = {"variant": VARIANTS, "kl": KL_FORMS}
#: What kernels take as one tensor of numbers, in its order.
FLOW_NUMBERS = (
    *("clip_low", "clip_high", "adv_clip", "log_ratio_scale", "log_ratio_limit", "tau", "beta"),
)

Renorm = Literal["none", "global", "channel", "text_channel"]
RENORMS: tuple[str, ...] = get_args(Renorm)
GUIDANCE_CHOICES = {"renorm": RENORMS}
GUIDANCE_NUMBERS = ("text_scale", "image_scale", "renorm_min")


@dataclass(frozen=True)
class FlowLossParams:
    """The objective; element means over an image unless said otherwise.

    Attributes:
        variant: how the update is kept near the old policy.
            "ppo": max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)).
            "guard": the same with log rho = mean(z dmu), which has no bias and does not grow as the
            std shrinks, divided by |dt| (GRPO-Guard).
            "dppo": -A rho, dropped when KL(new, old) >= tau and rho has already moved in the
            direction of the advantage (Flow-DPPO).
        clip_low: clip range below 1. Compare it with `lvrpo.models.flow.noise_floor`.
        clip_high: clip range above 1.
        adv_clip: advantages are clamped to +- this; None for no clamp.
        log_ratio_scale: "mean" takes log rho as an element mean, the D-th root of the true ratio;
            a number kappa takes kappa times the true log-ratio of the image, so 1.0 is the sum over
            elements and 1 / D is "mean".
        log_ratio_limit: |log rho| saturates at this, with gradient 0 beyond; None for no limit,
            where a ratio may overflow.
        tau: KL threshold of "dppo", in nats per element (not scaled by `log_ratio_scale`).
        kl: which distance to the reference `beta` weighs, dv = velocity - velocity_ref.
            "velocity_mse": dv^2. "gaussian": (c_v dv)^2 / (2 std^2), the exact KL of the step.
            "no_dt": the exact KL times |dt|. "dmu2": (c_v dv)^2.
        beta: weight of that distance; > 0 needs `velocity_ref`.
    """

    variant: Variant = "ppo"
    clip_low: float = 1e-4
    clip_high: float = 1e-4
    adv_clip: float | None = 5.0
    log_ratio_scale: float | Literal["mean"] = "mean"
    log_ratio_limit: float | None = LOG_RATIO_LIMIT
    tau: float = 1e-5
    kl: KlForm = "velocity_mse"
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, FLOW_CHOICES)
        scale = self.log_ratio_scale
        scaled = scale == "mean" or (isinstance(scale, (int, float)) and 0 < scale < math.inf)
        limit = self.log_ratio_limit
        for name, fits, expected in (
            ("clip_low", 0 <= self.clip_low <= 1, "[0, 1]"),
            *((name, getattr(self, name) >= 0, ">= 0") for name in ("clip_high", "tau")),
            ("beta", 0 <= self.beta < math.inf, "finite and >= 0"),
            ("adv_clip", self.adv_clip is None or self.adv_clip > 0, "> 0, or None for no clamp"),
            ("log_ratio_scale", scaled, "'mean' or a finite number > 0"),
            ("log_ratio_limit", limit is None or limit > 0, "> 0, or None for no limit"),
        ):
            if not fits:
                value = getattr(self, name)
                raise ValueError(f"FlowLossParams: {name} is {value!r}, expected {expected}")

    def choices(self) -> dict[str, str]:
        """The parameters that are names."""
        return {name: getattr(self, name) for name in FLOW_CHOICES}

    def numbers(self) -> dict[str, float]:
        """The others, as kernels take them: no clamp and no limit as infinity, "mean" as 0."""
        named = {name: getattr(self, name) for name in FLOW_NUMBERS}
        for bound in ("adv_clip", "log_ratio_limit"):
            named[bound] = math.inf if named[bound] is None else named[bound]
        if self.log_ratio_scale == "mean":
            named["log_ratio_scale"] = 0.0
        return named


@dataclass(frozen=True)
class GuidanceParams:
    """How `guided_velocity` guides; the defaults are BAGEL's.

    Attributes:
        text_scale: how far the velocity goes from the one without the text, 1 being where it is.
        image_scale: how far it goes from the one without the image, after that.
        renorm: over what the norm is brought back to that of the unguided velocity.
            "none": nowhere. "global": the whole sample. "channel": each row of the last dimension.
            "text_channel": each row, after the text's push and before the image's.
        renorm_min: the smallest factor that brings it back; the largest is 1.
    """

    text_scale: float = 4.0
    image_scale: float = 1.5
    renorm: Renorm = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, GUIDANCE_CHOICES)
        for name, fits, expected in (
            ("text_scale", 0 <= self.text_scale < math.inf, "finite and >= 0"),
            ("image_scale", 0 <= self.image_scale < math.inf, "finite and >= 0"),
            ("renorm_min", 0 <= self.renorm_min <= 1, "[0, 1]"),
        ):
            if not fits:
                value = getattr(self, name)
                raise ValueError(f"GuidanceParams: {name} is {value!r}, expected {expected}")

    def choices(self) -> dict[str, str]:
        """The parameters that are names."""
        return {name: getattr(self, name) for name in GUIDANCE_CHOICES}

    def numbers(self) -> dict[str, float]:
        """The others."""
        return {name: getattr(self, name) for name in GUIDANCE_NUMBERS}


@dataclass(frozen=True)
class StepCoefficients:
    """x_next = c_x x + c_v v + std z, one entry per image: fp32 or fp64 [n].

    `lvrpo.models.flow.FlowSchedule` makes them for every known dynamics.

    Attributes:
        c_x: factor of the latent.
        c_v: factor of the velocity, in units of time (negative: time runs from 1 to 0).
        std: standard deviation of the noise; 0 marks a deterministic step.
        t: time before the step, 1 is noise and 0 is data.
        dt: length of the step, negative.
    """

    c_x: Tensor
    c_v: Tensor
    std: Tensor
    t: Tensor
    dt: Tensor

    def __len__(self) -> int:
        return len(self.std)

    def to(self, *args: Any, **kwargs: Any) -> StepCoefficients:
        """As `Tensor.to`."""
        return StepCoefficients(*(c.to(*args, **kwargs) for c in self._tensors()))

    def select(self, index: Tensor | slice) -> StepCoefficients:
        """The entries at `index`: int64 positions (repeats allowed), a bool mask or a slice."""
        return StepCoefficients(*(c[index] for c in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


class FlowLossMetrics(Metrics):
    """Detached fp32 scalars over the active samples, whatever weights and denominator are.

    Those of micro-batches or ranks become those of the whole by `FlowLossMetrics.merge(parts)` and
    `metrics.all_reduce()`. Each is finite where the inputs are. With no active sample means are 0
    and the ratio extremes 1.

    Attributes:
        policy_loss: mean of the policy term times its weight.
        kl_velocity_mse, kl_gaussian, kl_no_dt, kl_dmu2: mean distances to the reference, that
            `FlowLossParams.kl` names; 0 without one.
        kl_old: exact KL to the sampling policy, mean (c_v (v - v_old))^2 / (2 std^2).
        ratio_mean: of rho.
        abs_log_ratio: mean |log rho|, before it saturates.
        clip_fraction_low: share with A < 0 whose ratio is where the policy gradient is cut.
        clip_fraction_high: share with A > 0 whose ratio is where the policy gradient is cut.
        active_samples: how many samples count.
        ratio_min, ratio_max: over the active samples.
    """

    policy_loss = Mean("active_samples")
    kl_velocity_mse = Mean("active_samples")
    kl_gaussian = Mean("active_samples")
    kl_no_dt = Mean("active_samples")
    kl_dmu2 = Mean("active_samples")
    kl_old = Mean("active_samples")
    ratio_mean = Mean("active_samples")
    abs_log_ratio = Mean("active_samples")
    clip_fraction_low = Mean("active_samples")
    clip_fraction_high = Mean("active_samples")
    active_samples = Total()
    ratio_min = Minimum(otherwise=1.0)
    ratio_max = Maximum(otherwise=1.0)


class FlowPolicyLoss(NamedTuple):
    """Result of `flow_policy_loss`: a scalar to call backward on, and what the pass measured."""

    loss: Tensor
    metrics: FlowLossMetrics
