"""One step of a flow-matching sampler and its log-prob: one pass over the latents each way.

The sums of the slices go to memory and are added in their order by a second launch, so that the
bits of a log-prob depend on the shape alone. Formulas: docs/ops/flow_step.md.
"""

import torch
import triton
import triton.language as tl

from lvrpo.kernels._latents import BLOCK_S, over_slices, sizes_of, slice_config, slice_of
from lvrpo.kernels._launch import LaunchConfig, cdiv, launch
from lvrpo.kernels._philox import noise_of, noise_pointers

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)
LOGPROB = LaunchConfig({"BLOCK_N": 32, "BLOCK_S": BLOCK_S}, num_warps=4, num_stages=1)
# What has a number for each sample, in whatever slice of a batch.
SMALL = ["c_x_ptr", "c_v_ptr", "std_ptr", "dlogprob_ptr", "streams_ptr"]


@triton.jit(do_not_specialize=["slices", "step_stride"], do_not_specialize_on_alignment=SMALL)
def _step_kernel(
    x_next_ptr,  # [N, D]
    parts_ptr,  # [N, slices] the sums of noise^2, or None without noise
    velocity_ptr,  # [N, D]
    x_t_ptr,  # [N, D]
    noise_ptr,  # [N, D], or None where it is drawn, or when every step is deterministic
    streams_ptr,  # [N, 2] int64 that it is drawn from, or None
    c_x_ptr,  # [N], or [1] with a step_stride of 0
    c_v_ptr,  # likewise
    std_ptr,  # likewise
    elements: tl.int64,
    slices,
    step_stride,
    BLOCK: tl.constexpr,
):
    sample, at, inside = slice_of(elements, slices, BLOCK)
    step = sample * step_stride
    x = tl.load(x_t_ptr + at, mask=inside, other=0.0)
    v = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(x.dtype)
    x_next = tl.load(c_x_ptr + step) * x + tl.load(c_v_ptr + step) * v
    if noise_ptr is not None or streams_ptr is not None:
        std = tl.load(std_ptr + step)
        # The noise of a deterministic step may be NaN, and so may be its std where nobody looked.
        stochastic = std > 0
        read = inside & stochastic
        z = noise_of(noise_ptr, streams_ptr, sample, at, read, slices, BLOCK).to(x.dtype)
        x_next += tl.where(stochastic, std, 0.0) * z
        z = z.to(tl.float64)
        tl.store(parts_ptr + tl.program_id(0), tl.sum(z * z, axis=0))
    tl.store(x_next_ptr + at, x_next, mask=inside)


@triton.jit(
    do_not_specialize=["samples", "slices", "step_stride"], do_not_specialize_on_alignment=SMALL
)
def _logprob_kernel(
    logprob_ptr,  # [N]
    parts_ptr,  # [N, slices]
    std_ptr,  # [N], or [1] with a step_stride of 0
    elements: tl.int64,
    samples,
    slices,
    step_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = sample < samples
    std = tl.load(std_ptr + sample * step_stride, mask=inside, other=0.0).to(tl.float64)
    stochastic = std > 0
    mean_square = over_slices(parts_ptr, sample, inside, slices, BLOCK_S) / elements.to(tl.float64)
    logprob = -0.5 * mean_square - tl.log(tl.where(stochastic, std, 1.0)) - HALF_LOG_2PI
    logprob = tl.where(stochastic, logprob, 0.0).to(logprob_ptr.dtype.element_ty)
    tl.store(logprob_ptr + sample, logprob, mask=inside)


@triton.jit(do_not_specialize=["slices", "step_stride"], do_not_specialize_on_alignment=SMALL)
def _gradient_kernel(
    dvelocity_ptr,  # [N, D]
    dx_t_ptr,  # [N, D]
    dx_next_ptr,  # [N, D]
    dlogprob_ptr,  # [N]
    noise_ptr,  # [N, D], or None where it is drawn, or when every step is deterministic
    streams_ptr,  # [N, 2] int64 that it is drawn from, or None
    c_x_ptr,  # [N], or [1] with a step_stride of 0
    c_v_ptr,  # likewise
    std_ptr,  # likewise
    elements: tl.int64,
    slices,
    step_stride,
    BLOCK: tl.constexpr,
):
    sample, at, inside = slice_of(elements, slices, BLOCK)
    step = sample * step_stride
    dmean = tl.load(dx_next_ptr + at, mask=inside, other=0.0)
    if noise_ptr is not None or streams_ptr is not None:
        std = tl.load(std_ptr + step)
        stochastic = std > 0
        # d log-prob / d mean = z / (std D)
        size = tl.where(stochastic, std, 1.0) * elements.to(dmean.dtype)
        factor = tl.where(stochastic, tl.load(dlogprob_ptr + sample) / size, 0.0)
        # Without a gradient of the log-prob the noise is not read: it may be NaN.
        read = inside & (factor != 0)
        z = noise_of(noise_ptr, streams_ptr, sample, at, read, slices, BLOCK).to(dmean.dtype)
        dmean += factor * z
    tl.store(dvelocity_ptr + at, tl.load(c_v_ptr + step) * dmean, mask=inside)
    tl.store(dx_t_ptr + at, tl.load(c_x_ptr + step) * dmean, mask=inside)


def flow_step_fwd(velocity, x_t, noise, c_x, c_v, std):
    """Launcher; contract in `lvrpo.ops.flow_step`."""
    config = slice_config(x_t.dtype, noise)
    samples, elements, slices = sizes_of(x_t, config.blocks["BLOCK"])
    x_next = x_t.new_empty(x_t.shape)
    logprob = x_t.new_zeros(samples) if noise is None else x_t.new_empty(samples)
    parts = None if noise is None else x_t.new_empty(samples, slices, dtype=torch.float64)
    steps = _steps(c_x, c_v, std)
    sizes = {"elements": elements, "slices": slices}
    launch(
        _step_kernel,
        (samples * slices,),
        config,
        x_next_ptr=x_next,
        parts_ptr=parts,
        velocity_ptr=velocity.contiguous(),
        x_t_ptr=x_t.contiguous(),
        **noise_pointers(noise),
        **steps,
        **sizes,
    )
    if noise is not None:
        launch(
            _logprob_kernel,
            (cdiv(samples, LOGPROB.blocks["BLOCK_N"]),),
            LOGPROB,
            logprob_ptr=logprob,
            parts_ptr=parts,
            std_ptr=steps["std_ptr"],
            step_stride=steps["step_stride"],
            samples=samples,
            **sizes,
        )
    return x_next, logprob


def flow_step_bwd(dx_next, dlogprob, noise, c_x, c_v, std):
    """Launcher; the gradients of velocity and x_t."""
    config = slice_config(dx_next.dtype, noise)
    samples, elements, slices = sizes_of(dx_next, config.blocks["BLOCK"])
    dvelocity, dx_t = dx_next.new_empty(dx_next.shape), dx_next.new_empty(dx_next.shape)
    launch(
        _gradient_kernel,
        (samples * slices,),
        config,
        dvelocity_ptr=dvelocity,
        dx_t_ptr=dx_t,
        dx_next_ptr=dx_next.contiguous(),
        dlogprob_ptr=dlogprob.contiguous(),
        **noise_pointers(noise),
        **_steps(c_x, c_v, std),
        elements=elements,
        slices=slices,
    )
    return dvelocity, dx_t


def _steps(c_x, c_v, std):
    """The coefficients, which all samples have of their own or share."""
    return {
        "c_x_ptr": c_x.contiguous(),
        "c_v_ptr": c_v.contiguous(),
        "std_ptr": std.contiguous(),
        "step_stride": int(len(std) > 1),
    }
