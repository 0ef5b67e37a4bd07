"""Policy loss of flow-matching steps, its metrics and its gradient.

Three sums over the elements of a sample carry everything the loss needs: a pass over the latents
forms them by slices, one program adds the slices, forms the terms of the samples and adds those.
The gradient is one more pass. All of it is in fp64, which takes less time than the bytes. Formulas:
docs/ops/flow_policy_loss.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._latents import (
    BLOCK_S,
    contiguous,
    over_slices,
    sizes_of,
    slice_config,
    slice_of,
)
from lvrpo.kernels._launch import LaunchConfig, launch
from lvrpo.kernels._log_ratio import is_saturated, saturate
from lvrpo.kernels._philox import noise_of, noise_pointers
from lvrpo.kernels._primitives import as_scalar, clamp, is_finite, positions
from lvrpo.params.flow import FLOW_NUMBERS, FlowLossMetrics

# The names that these kernels have arithmetic for, by the parameter of `FlowLossParams`.
CHOICES = {
    "variant": ("ppo", "guard", "dppo"),
    "kl": ("velocity_mse", "gaussian", "no_dt", "dmu2"),
}
# Where FlowLossMetrics has its sums.
AT_POLICY_LOSS, AT_KL_OLD, AT_RATIO, AT_LOG_RATIO = positions(
    FlowLossMetrics.SUMS, "policy_loss", "kl_old", "ratio_mean", "abs_log_ratio"
)
AT_VELOCITY_MSE, AT_GAUSSIAN, AT_NO_DT, AT_DMU2 = positions(
    FlowLossMetrics.SUMS, *(f"kl_{form}" for form in ("velocity_mse", "gaussian", "no_dt", "dmu2"))
)
AT_LOWS, AT_HIGHS, AT_ACTIVE = positions(
    FlowLossMetrics.SUMS, "clip_fraction_low", "clip_fraction_high", "active_samples"
)
AT_RATIO_MIN, AT_RATIO_MAX = positions(FlowLossMetrics.EXTREMES, "ratio_min", "ratio_max")
LARGEST = tl.constexpr(1.7976931348623157e308)
# Of one program, which has all samples: a thread has one at a time, and 16 lanes add its slices.
TERMS = LaunchConfig({"BLOCK_N": 32, "BLOCK_S": BLOCK_S}, num_warps=16, num_stages=1)
# What has a number for each sample, in whatever slice of a batch.
SMALL = [
    *("c_v_ptr", "std_ptr", "dt_ptr", "advantages_ptr", "mask_ptr", "policy_weights_ptr"),
    *("denominator_ptr", "dloss_ptr", "streams_ptr"),
]


@triton.jit
def _is_active(mask_ptr, std_ptr, step_stride, sample, inside):
    """A deterministic step has no density, and does not count where nobody could refuse it."""
    std = tl.load(std_ptr + sample * step_stride, mask=inside, other=0.0)
    active = inside & (std > 0) & (std < float("inf"))
    if mask_ptr is not None:
        active &= tl.load(mask_ptr + sample, mask=inside, other=0) != 0
    return active


@triton.jit(do_not_specialize=["slices", "step_stride"], do_not_specialize_on_alignment=SMALL)
def _sums_kernel(
    parts_ptr,  # [3, N, slices] z (v - v_old), (v - v_old)^2, (v - v_ref)^2
    velocity_ptr,  # [N, D]
    velocity_old_ptr,  # [N, D]
    noise_ptr,  # [N, D], or None where it is drawn
    streams_ptr,  # [N, 2] int64 that it is drawn from, or None
    velocity_ref_ptr,  # [N, D] or None
    std_ptr,  # [N], or [1] with a step_stride of 0
    mask_ptr,  # [N] bool or None
    elements: tl.int64,
    slices,
    step_stride,
    BLOCK: tl.constexpr,
):
    sample, at, inside = slice_of(elements, slices, BLOCK)
    inside &= _is_active(mask_ptr, std_ptr, step_stride, sample, sample >= 0)
    v = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(tl.float64)
    d = v - tl.load(velocity_old_ptr + at, mask=inside, other=0.0).to(tl.float64)
    z = noise_of(noise_ptr, streams_ptr, sample, at, inside, slices, BLOCK).to(tl.float64)
    part_ptr, parts = parts_ptr + tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tl.store(part_ptr, tl.sum(z * d, axis=0))
    tl.store(part_ptr + parts, tl.sum(d * d, axis=0))
    if velocity_ref_ptr is not None:
        d = v - tl.load(velocity_ref_ptr + at, mask=inside, other=0.0).to(tl.float64)
        tl.store(part_ptr + 2 * parts, tl.sum(d * d, axis=0))


@triton.jit
def _finite(x):
    """The nearest finite number: infinity times the 0 of two equal velocities would be NaN."""
    return clamp(x, -LARGEST, LARGEST)


@triton.jit
def _in_units_of_std(c_v, std):
    """c_v and std over a power of two next to the std, of which no square is 0 or infinite."""
    bits = std.to(tl.int64, bitcast=True)
    exponent = tl.maximum((bits >> 52) & 0x7FF, 1) - 1022
    # 2^-exponent, which is no subnormal number.
    unit = ((1023 - tl.minimum(exponent, 1022)) << 52).to(tl.float64, bitcast=True)
    return clamp(c_v * unit, -1e150, 1e150), std * unit


@triton.jit
def _slopes(scale, c_v, c, s, elements, VARIANT: tl.constexpr):
    """(a, b) of log rho = a sum z (v - v_old) + b / 2 sum (v - v_old)^2."""
    if VARIANT == "guard":
        return scale * c_v / elements, tl.zeros_like(c_v)
    else:
        return scale * c / (s * elements), -scale * c * c / (s * s * elements)


@triton.jit
def _policy_term(ratio, a, kl_old, clip_low, clip_high, tau, VARIANT: tl.constexpr):
    """Its value for a weight of 1, and where the gradient is cut, at A < 0 and at A > 0."""
    if VARIANT == "dppo":
        diverged = kl_old >= tau
        low, high = diverged & (a < 0) & (ratio < 1), diverged & (a > 0) & (ratio > 1)
        held = tl.where(low | high, 0.0, ratio)
    else:
        tl.static_assert(VARIANT == "ppo" or VARIANT == "guard", "this variant has no formula")
        at_low, at_high = 1.0 - clip_low, 1.0 + clip_high
        low, high = (a < 0) & (ratio < at_low), (a > 0) & (ratio > at_high)
        held = tl.where(low, at_low, tl.where(high, at_high, ratio))
    return -a * held, low, high


@triton.jit
def _pushing_weight(weight, advantage, a, abs_dt, VARIANT: tl.constexpr):
    """The weight of the policy term; 0 where that is dropped, not multiplied: the advantage may be
    NaN, and without a limit the ratio infinite.
    """
    pushes = (weight > 0) & (weight < float("inf")) & is_finite(advantage) & (a != 0)
    if VARIANT == "guard":
        pushes &= abs_dt > 0
        weight /= tl.where(abs_dt > 0, abs_dt, 1.0)
    return tl.where(pushes, weight, 0.0)


@triton.jit
def _kl_factors(c_v, c, s, abs_dt):
    """What the forms of the distance multiply the mean of (v - v_ref)^2 by."""
    gaussian = c * c / (2.0 * s * s)
    return tl.full(c.shape, 1.0, tl.float64), gaussian, gaussian * abs_dt, c_v * c_v


@triton.jit
def _kl_factor(factors, KL: tl.constexpr):
    if KL == "velocity_mse":
        return factors[0]
    elif KL == "gaussian":
        return factors[1]
    elif KL == "no_dt":
        return factors[2]
    else:
        tl.static_assert(KL == "dmu2", "this distance has no formula")
        return factors[3]


@triton.jit
def _load_sample(ptr, stride, sample, active):
    """[BLOCK_N] one number for each sample that counts, else 1."""
    return tl.load(ptr + sample * stride, mask=active, other=1.0).to(tl.float64)


@triton.jit
def _share_of(denominator_ptr, denominator, active_samples):
    """1 over the denominator: on the device, a number, or, below 0, how many samples count."""
    if denominator_ptr is not None:
        total = tl.load(denominator_ptr).to(tl.float64)
    else:
        total = tl.where(denominator < 0, active_samples, as_scalar(denominator, tl.float64))
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def _count(mask_ptr, std_ptr, step_stride, samples, BLOCK_N: tl.constexpr):
    """How many samples count."""
    count = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, samples, BLOCK_N):
        sample = first + tl.arange(0, BLOCK_N).to(tl.int64)
        active = _is_active(mask_ptr, std_ptr, step_stride, sample, sample < samples)
        count += active.to(tl.float64)
    return tl.sum(count, axis=0)


@triton.jit
def _accumulate(total, x, active):
    return total + tl.where(active, x, 0.0)


@triton.jit
def _store_policy(sums_ptr, policy_loss, kl_old, ratios, log_ratios, lows, highs):
    tl.store(sums_ptr + AT_POLICY_LOSS, tl.sum(policy_loss, axis=0))
    tl.store(sums_ptr + AT_KL_OLD, tl.sum(kl_old, axis=0))
    tl.store(sums_ptr + AT_RATIO, tl.sum(ratios, axis=0))
    tl.store(sums_ptr + AT_LOG_RATIO, tl.sum(log_ratios, axis=0))
    tl.store(sums_ptr + AT_LOWS, tl.sum(lows, axis=0))
    tl.store(sums_ptr + AT_HIGHS, tl.sum(highs, axis=0))


@triton.jit
def _store_distances(sums_ptr, mse, gaussian, no_dt, dmu2):
    tl.store(sums_ptr + AT_VELOCITY_MSE, tl.sum(mse, axis=0))
    tl.store(sums_ptr + AT_GAUSSIAN, tl.sum(gaussian, axis=0))
    tl.store(sums_ptr + AT_NO_DT, tl.sum(no_dt, axis=0))
    tl.store(sums_ptr + AT_DMU2, tl.sum(dmu2, axis=0))


@triton.jit(
    do_not_specialize=["samples", "slices", "step_stride"], do_not_specialize_on_alignment=SMALL
)
def _terms_kernel(
    loss_ptr,  # []
    sums_ptr,  # [FlowLossMetrics.SUMS]
    extremes_ptr,  # [FlowLossMetrics.EXTREMES]
    directions_ptr,  # [N, 3] factors of z, v - v_old, v - v_ref in d loss / d v
    parts_ptr,  # [3, N, slices] of _sums_kernel
    c_v_ptr,  # [N], or [1] with a step_stride of 0
    std_ptr,  # likewise
    dt_ptr,  # likewise
    advantages_ptr,  # [N]
    mask_ptr,  # [N] bool or None
    policy_weights_ptr,  # [N] or None
    denominator_ptr,  # [] or None
    elements: tl.int64,
    samples,
    slices,
    step_stride,
    denominator: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    adv_clip: tl.float64,
    log_ratio_scale: tl.float64,
    log_ratio_limit: tl.float64,
    tau: tl.float64,
    beta: tl.float64,
    VARIANT: tl.constexpr,
    KL: tl.constexpr,
    HAS_REF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    active_samples = _count(mask_ptr, std_ptr, step_stride, samples, BLOCK_N)
    share = _share_of(denominator_ptr, denominator, active_samples)
    size, parts = elements.to(tl.float64), samples.to(tl.int64) * slices
    adv_clip, limit = as_scalar(adv_clip, tl.float64), as_scalar(log_ratio_limit, tl.float64)
    scale = as_scalar(log_ratio_scale, tl.float64)
    scale = tl.where(scale > 0, scale * size, 1.0)
    zero = tl.zeros([BLOCK_N], tl.float64)
    loss, policy_loss, kl_old_sum, ratios, log_ratios = zero, zero, zero, zero, zero
    mse, gaussian, no_dt, dmu2, lows, highs = zero, zero, zero, zero, zero, zero
    smallest, largest = zero + float("inf"), zero - float("inf")
    for first in range(0, samples, BLOCK_N):
        sample = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = sample < samples
        active = _is_active(mask_ptr, std_ptr, step_stride, sample, inside)
        c_v = _load_sample(c_v_ptr, step_stride, sample, active)
        c, s = _in_units_of_std(c_v, _load_sample(std_ptr, step_stride, sample, active))
        abs_dt = tl.abs(_load_sample(dt_ptr, step_stride, sample, active))
        advantage = _load_sample(advantages_ptr, 1, sample, active)
        weight = zero + 1.0
        if policy_weights_ptr is not None:
            weight = _load_sample(policy_weights_ptr, 1, sample, active)
        of_noise = over_slices(parts_ptr, sample, active, slices, BLOCK_S)
        of_old = over_slices(parts_ptr + parts, sample, active, slices, BLOCK_S)

        noise, old = _slopes(scale, c_v, c, s, size, VARIANT)
        kl_old = c * c * of_old / (2.0 * s * s * size)
        log_ratio = noise * of_noise + old * of_old / 2.0
        ratio = tl.exp(saturate(log_ratio, limit))
        a = clamp(advantage, -adv_clip, adv_clip)
        value, low, high = _policy_term(ratio, a, kl_old, clip_low, clip_high, tau, VARIANT)
        weight = _pushing_weight(weight, advantage, a, abs_dt, VARIANT)
        policy = tl.where(weight > 0, value * weight, 0.0)
        free = (weight > 0) & ((low | high | is_saturated(log_ratio, limit)) == 0)
        dlog_ratio = tl.where(free, -a * ratio * weight, 0.0)
        term, dref = policy, zero
        if HAS_REF:
            of_ref = over_slices(parts_ptr + 2 * parts, sample, active, slices, BLOCK_S) / size
            factors = _kl_factors(c_v, c, s, abs_dt)
            factor = _kl_factor(factors, KL)
            term = tl.where(beta > 0, policy + beta * (factor * of_ref), policy)
            dref = beta * 2.0 * factor / size
            mse = _accumulate(mse, factors[0] * of_ref, active)
            gaussian = _accumulate(gaussian, factors[1] * of_ref, active)
            no_dt = _accumulate(no_dt, factors[2] * of_ref, active)
            dmu2 = _accumulate(dmu2, factors[3] * of_ref, active)
        to = directions_ptr + 3 * sample
        tl.store(to, tl.where(active, _finite(share * (dlog_ratio * noise)), 0.0), mask=inside)
        tl.store(to + 1, tl.where(active, _finite(share * (dlog_ratio * old)), 0.0), mask=inside)
        tl.store(to + 2, tl.where(active, _finite(share * dref), 0.0), mask=inside)
        ratio = _finite(ratio)
        smallest = tl.minimum(smallest, tl.where(active, ratio, float("inf")))
        largest = tl.maximum(largest, tl.where(active, ratio, float("-inf")))
        loss = _accumulate(loss, share * term, active)
        policy_loss = _accumulate(policy_loss, policy, active)
        kl_old_sum = _accumulate(kl_old_sum, kl_old, active)
        ratios = _accumulate(ratios, ratio, active)
        log_ratios = _accumulate(log_ratios, tl.abs(log_ratio), active)
        lows = _accumulate(lows, low.to(tl.float64), active)
        highs = _accumulate(highs, high.to(tl.float64), active)

    tl.store(loss_ptr, tl.sum(loss, axis=0).to(loss_ptr.dtype.element_ty))
    tl.store(extremes_ptr + AT_RATIO_MIN, -tl.min(smallest, axis=0))
    tl.store(extremes_ptr + AT_RATIO_MAX, tl.max(largest, axis=0))
    _store_policy(sums_ptr, policy_loss, kl_old_sum, ratios, log_ratios, lows, highs)
    _store_distances(sums_ptr, mse, gaussian, no_dt, dmu2)
    tl.store(sums_ptr + AT_ACTIVE, active_samples)


@triton.jit(do_not_specialize=["slices"], do_not_specialize_on_alignment=SMALL)
def _gradient_kernel(
    dvelocity_ptr,  # [N, D]
    dloss_ptr,  # []
    directions_ptr,  # [N, 3] of _terms_kernel
    velocity_ptr,  # [N, D]
    velocity_old_ptr,  # [N, D]
    noise_ptr,  # [N, D], or None where it is drawn
    streams_ptr,  # [N, 2] int64 that it is drawn from, or None
    velocity_ref_ptr,  # [N, D] or None
    elements: tl.int64,
    slices,
    BLOCK: tl.constexpr,
):
    sample, at, inside = slice_of(elements, slices, BLOCK)
    dloss, direction_ptr = tl.load(dloss_ptr).to(tl.float64), directions_ptr + 3 * sample
    # Of a small std the factors are past an fp32 number, and the gradient need not be.
    of_noise = _finite(dloss * tl.load(direction_ptr))
    of_old = _finite(dloss * tl.load(direction_ptr + 1))
    of_ref = _finite(dloss * tl.load(direction_ptr + 2))
    # Without weight it may hold NaN.
    read = inside & ((of_noise != 0) | (of_old != 0) | (of_ref != 0))
    v = tl.load(velocity_ptr + at, mask=read, other=0.0).to(tl.float64)
    old = tl.load(velocity_old_ptr + at, mask=read, other=0.0).to(tl.float64)
    z = noise_of(noise_ptr, streams_ptr, sample, at, read, slices, BLOCK).to(tl.float64)
    dv = of_noise * z + of_old * (v - old)
    if velocity_ref_ptr is not None:
        ref = tl.load(velocity_ref_ptr + at, mask=read, other=0.0).to(tl.float64)
        dv += of_ref * (v - ref)
    # By way of fp32, from which alone Triton's interpreter rounds to bf16.
    dv = dv.to(velocity_old_ptr.dtype.element_ty).to(dvelocity_ptr.dtype.element_ty)
    tl.store(dvelocity_ptr + at, dv, mask=inside)


def flow_policy_loss_fwd(
    velocity,
    velocity_old,
    noise,
    velocity_ref,
    c_v,
    std,
    dt,
    advantages,
    mask,
    policy_weights,
    denominator,
    numbers,
    variant,
    kl,
):
    """Launcher; contract in `lvrpo.ops.flow_policy_loss`."""
    config = slice_config(velocity_old.dtype, noise)
    samples, elements, slices = sizes_of(velocity, config.blocks["BLOCK"])

    def doubles(*shape):
        return velocity.new_empty(shape, dtype=torch.float64)

    parts, directions = doubles(3, samples, slices), doubles(samples, 3)
    loss = velocity_old.new_empty(())
    sums, extremes = doubles(len(FlowLossMetrics.SUMS)), doubles(len(FlowLossMetrics.EXTREMES))
    shared = {
        "parts_ptr": parts,
        "std_ptr": std.contiguous(),
        "mask_ptr": contiguous(mask),
        "elements": elements,
        "slices": slices,
        "step_stride": int(len(std) > 1),
    }
    launch(
        _sums_kernel,
        (samples * slices,),
        config,
        velocity_ptr=velocity.contiguous(),
        velocity_old_ptr=velocity_old.contiguous(),
        **noise_pointers(noise),
        velocity_ref_ptr=contiguous(velocity_ref),
        **shared,
    )
    launch(
        _terms_kernel,
        (1,),
        TERMS,
        loss_ptr=loss,
        sums_ptr=sums,
        extremes_ptr=extremes,
        directions_ptr=directions,
        c_v_ptr=c_v.contiguous(),
        dt_ptr=dt.contiguous(),
        advantages_ptr=advantages.contiguous(),
        policy_weights_ptr=contiguous(policy_weights),
        samples=samples,
        VARIANT=variant,
        KL=kl,
        HAS_REF=velocity_ref is not None,
        **_denominator(denominator, velocity.device),
        **dict(zip(FLOW_NUMBERS, numbers.tolist(), strict=True)),
        **shared,
    )
    return loss, sums, extremes, directions


def _denominator(tensor, device):
    """Read where that waits for no device; a number below 0 asks for the count of samples."""
    if tensor is not None and tensor.device == device:
        return {"denominator_ptr": tensor, "denominator": -1.0}
    number = -1.0 if tensor is None else max(float(tensor), 0.0)
    return {"denominator_ptr": None, "denominator": number}


def flow_policy_loss_bwd(dloss, velocity, velocity_old, noise, velocity_ref, directions):
    """Launcher; the gradient of the velocity."""
    config = slice_config(velocity_old.dtype, noise)
    samples, elements, slices = sizes_of(velocity, config.blocks["BLOCK"])
    dvelocity = velocity.new_empty(velocity.shape)
    launch(
        _gradient_kernel,
        (samples * slices,),
        config,
        dvelocity_ptr=dvelocity,
        dloss_ptr=dloss,
        directions_ptr=directions,
        velocity_ptr=velocity.contiguous(),
        velocity_old_ptr=velocity_old.contiguous(),
        **noise_pointers(noise),
        velocity_ref_ptr=contiguous(velocity_ref),
        elements=elements,
        slices=slices,
    )
    return dvelocity
