"""Classifier-free guidance and its renormalisation, forward and backward.

Over rows a program has some of them whole, in one launch. Over samples there are two: the sums of
slices, and the pass, whose programs add the slices themselves. Without an upstream gradient a
kernel is the forward's, with one the backward's. Formulas: docs/ops/guided_velocity.md.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from lvrpo.kernels._latents import BLOCK_S, SLICE, contiguous, over_slices, sizes_of, slice_of, wide
from lvrpo.kernels._launch import cdiv, launch
from lvrpo.kernels._primitives import as_scalar, clamp
from lvrpo.params.flow import GUIDANCE_NUMBERS

# The names that these kernels have arithmetic for, by the parameter of `GuidanceParams`.
CHOICES = {"renorm": ("none", "global", "channel", "text_channel")}
# Keeps the quotient of two norms finite; BAGEL's.
EPS = tl.constexpr(1e-8)
# Channels of a row that a program has at once; and what part of a slice its rows have, whose
# registers hold sums for every element.
MOST_CHANNELS = 256
ROWS_SHARE = 2


@triton.jit
def _is_guided(guided_ptr, sample, inside):
    if guided_ptr is None:
        return inside
    else:
        return inside & (tl.load(guided_ptr + sample, mask=inside, other=0) != 0)


@triton.jit
def _load_branches(pointers, at, inside, guided, dtype: tl.constexpr):
    """The velocities; 0 for a branch of a sample that is not guided, which may hold NaN."""
    velocity_ptr, without_text_ptr, without_image_ptr = pointers
    v = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(dtype)
    no_text = tl.load(without_text_ptr + at, mask=inside & guided, other=0.0).to(dtype)
    no_image = v  # without a branch its push is 0
    if without_image_ptr is not None:
        no_image = tl.load(without_image_ptr + at, mask=inside & guided, other=0.0).to(dtype)
    return v, no_text, no_image


@triton.jit
def _push(branches, pushes, RENORM: tl.constexpr):
    """What the renormalisation multiplies; `pushes` are the scales of text and image less 1."""
    v, no_text, no_image = branches
    by_text = v + pushes[0] * (v - no_text)
    if RENORM == "text_channel":
        return by_text
    else:
        return by_text + pushes[1] * (by_text - no_image)


@triton.jit
def _guide(branches, pushes, renorm, RENORM: tl.constexpr):
    """The result."""
    renormed = _push(branches, pushes, RENORM)
    if RENORM != "none":
        renormed *= renorm
    if RENORM == "text_channel":
        renormed += pushes[1] * (renormed - branches[2])
    return renormed


@triton.jit
def _upstream(dout, pushes, RENORM: tl.constexpr):
    """The gradient of what is renormalised."""
    if RENORM == "text_channel":
        return dout + pushes[1] * dout
    else:
        return dout


@triton.jit
def _gradients(branches, pushes, factors, dout, RENORM: tl.constexpr):
    """Of the velocity and of the branches."""
    v, _, _ = branches
    renorm, slope, of_given, of_pushed = factors
    dpushed = _upstream(dout, pushes, RENORM)
    dv = tl.zeros_like(dout)
    if RENORM != "none":
        along = _push(branches, pushes, RENORM) * of_pushed
        dpushed = renorm * dpushed - renorm * slope * along
        dv = slope * (v * of_given)
    dby_text, dno_image = dpushed, -pushes[1] * dout
    if RENORM != "text_channel":
        dby_text, dno_image = dpushed + pushes[1] * dpushed, -pushes[1] * dpushed
    return dby_text + pushes[0] * dby_text + dv, -pushes[0] * dby_text, dno_image


@triton.jit
def _inverse_of(norm, dtype: tl.constexpr):
    """1 / norm; 0 for a norm of 0, whose gradient is 0 then."""
    largest: tl.constexpr = 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38
    inverse = 1.0 / tl.where(norm > 0, norm, 1.0)
    return tl.where(norm > 0, tl.where(inverse > largest, largest, inverse), 0.0).to(dtype)


@triton.jit
def _factors_of(given, pushed, along, renorm_min, dtype: tl.constexpr):
    """|v| / (|pushed| + EPS) between its bounds; d loss / d |v|, 0 where they hold it; the inverse
    norms, apart because their product may be past an fp32 number.

    `given`, `pushed` and `along` are sums of v^2, pushed^2 and pushed times its upstream gradient.
    """
    given, pushed = tl.sqrt(given), tl.sqrt(pushed)
    quotient = given / (pushed + EPS)
    renorm = clamp(quotient, renorm_min, 1.0)
    slope = tl.where(renorm == quotient, along / (pushed + EPS), 0.0)
    return renorm.to(dtype), slope.to(dtype), _inverse_of(given, dtype), _inverse_of(pushed, dtype)


@triton.jit
def _sums_of(branches, pushes, dout_ptr, at, inside, RENORM: tl.constexpr):
    """By element v^2, pushed^2 and pushed times its upstream gradient, of which norms are made."""
    v, pushed = branches[0].to(tl.float64), _push(branches, pushes, RENORM).to(tl.float64)
    along = tl.zeros_like(v)
    if dout_ptr is not None:
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
        along = pushed * _upstream(dout, pushes, RENORM).to(tl.float64)
    return v * v, pushed * pushed, along


@triton.jit
def _write(branches, pushes, factors, dout_ptr, outputs, at, inside, guided, RENORM: tl.constexpr):
    """A sample that is not guided keeps its velocity, and its gradient."""
    out_ptr, dno_text_ptr, dno_image_ptr = outputs
    out_dtype = out_ptr.dtype.element_ty
    if dout_ptr is None:
        out = tl.where(guided, _guide(branches, pushes, factors[0], RENORM), branches[0])
        tl.store(out_ptr + at, out, mask=inside)
    else:
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
        dv, dno_text, dno_image = _gradients(branches, pushes, factors, dout, RENORM)
        tl.store(out_ptr + at, tl.where(guided, dv, dout).to(out_dtype), mask=inside)
        if dno_text_ptr is not None:
            dno_text = tl.where(guided, dno_text, 0.0).to(out_dtype)
            tl.store(dno_text_ptr + at, dno_text, mask=inside)
        if dno_image_ptr is not None:
            dno_image = tl.where(guided, dno_image, 0.0).to(out_dtype)
            tl.store(dno_image_ptr + at, dno_image, mask=inside)


@triton.jit(do_not_specialize=["slices"], do_not_specialize_on_alignment=["guided_ptr"])
def _sums_kernel(
    parts_ptr,  # [3, N, slices] v^2, pushed^2, pushed times its upstream gradient
    velocity_ptr,  # [N, D]
    without_text_ptr,  # [N, D]
    without_image_ptr,  # [N, D] or None
    guided_ptr,  # [N] bool or None
    dout_ptr,  # [N, D] or None
    elements: tl.int64,
    slices,
    text_push: tl.float64,
    image_push: tl.float64,
    DTYPE: tl.constexpr,
    RENORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, at, inside = slice_of(elements, slices, BLOCK)
    inside &= _is_guided(guided_ptr, sample, sample >= 0)
    pushes = as_scalar(text_push, DTYPE), as_scalar(image_push, DTYPE)
    pointers = velocity_ptr, without_text_ptr, without_image_ptr
    branches = _load_branches(pointers, at, inside, inside, DTYPE)
    given, pushed, along = _sums_of(branches, pushes, dout_ptr, at, inside, RENORM)
    part_ptr, parts = parts_ptr + tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tl.store(part_ptr, tl.sum(given, axis=0))
    tl.store(part_ptr + parts, tl.sum(pushed, axis=0))
    tl.store(part_ptr + 2 * parts, tl.sum(along, axis=0))


@triton.jit(do_not_specialize=["slices"], do_not_specialize_on_alignment=["guided_ptr"])
def _sample_kernel(
    out_ptr,  # [N, D], or the velocity's gradient
    dno_text_ptr,  # [N, D] or None
    dno_image_ptr,  # [N, D] or None
    parts_ptr,  # [3, N, slices] of _sums_kernel; None where nothing is renormalised
    velocity_ptr,  # [N, D]
    without_text_ptr,  # [N, D]
    without_image_ptr,  # [N, D] or None
    guided_ptr,  # [N] bool or None
    dout_ptr,  # [N, D] or None
    elements: tl.int64,
    slices,
    text_push: tl.float64,
    image_push: tl.float64,
    renorm_min: tl.float64,
    DTYPE: tl.constexpr,
    RENORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    sample, at, inside = slice_of(elements, slices, BLOCK)
    guided = _is_guided(guided_ptr, sample, sample >= 0)
    pushes = as_scalar(text_push, DTYPE), as_scalar(image_push, DTYPE)
    pointers = velocity_ptr, without_text_ptr, without_image_ptr
    branches = _load_branches(pointers, at, inside, guided, DTYPE)
    factors = 1.0, 0.0, 0.0, 0.0
    if parts_ptr is not None:
        parts = tl.num_programs(0).to(tl.int64)
        factors = _factors_of(
            over_slices(parts_ptr, sample, sample >= 0, slices, BLOCK_S),
            over_slices(parts_ptr + parts, sample, sample >= 0, slices, BLOCK_S),
            over_slices(parts_ptr + 2 * parts, sample, sample >= 0, slices, BLOCK_S),
            as_scalar(renorm_min, tl.float64),
            DTYPE,
        )
    outputs = out_ptr, dno_text_ptr, dno_image_ptr
    _write(branches, pushes, factors, dout_ptr, outputs, at, inside, guided, RENORM)


@triton.jit
def _chunk_of_row(row, first, rows, channels, BLOCK_C: tl.constexpr):
    """Where the next channels of rows are, and which of them there are."""
    channel = first + tl.arange(0, BLOCK_C)[None, :]
    return row[:, None] * channels + channel, (row < rows)[:, None] & (channel < channels)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["guided_ptr"])
def _row_kernel(
    out_ptr,  # [rows, C], or the velocity's gradient
    dno_text_ptr,  # [rows, C] or None
    dno_image_ptr,  # [rows, C] or None
    velocity_ptr,  # [rows, C]
    without_text_ptr,  # [rows, C]
    without_image_ptr,  # [rows, C] or None
    guided_ptr,  # [N] bool or None
    dout_ptr,  # [rows, C] or None
    channels: tl.int64,
    rows,
    rows_of_sample: tl.int64,
    text_push: tl.float64,
    image_push: tl.float64,
    renorm_min: tl.float64,
    DTYPE: tl.constexpr,
    RENORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    guided = _is_guided(guided_ptr, row // rows_of_sample, row < rows)[:, None]
    pushes = as_scalar(text_push, DTYPE), as_scalar(image_push, DTYPE)
    pointers = velocity_ptr, without_text_ptr, without_image_ptr
    given = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    pushed, along = given, given
    for first in range(0, channels, BLOCK_C):
        at, inside = _chunk_of_row(row, first, rows, channels, BLOCK_C)
        branches = _load_branches(pointers, at, inside, guided, DTYPE)
        sums = _sums_of(branches, pushes, dout_ptr, at, inside, RENORM)
        given, pushed, along = given + sums[0], pushed + sums[1], along + sums[2]
    factors = _factors_of(
        tl.sum(given, axis=1)[:, None],
        tl.sum(pushed, axis=1)[:, None],
        tl.sum(along, axis=1)[:, None],
        as_scalar(renorm_min, tl.float64),
        DTYPE,
    )
    outputs = out_ptr, dno_text_ptr, dno_image_ptr
    # A second time, from the cache.
    for first in range(0, channels, BLOCK_C):
        at, inside = _chunk_of_row(row, first, rows, channels, BLOCK_C)
        branches = _load_branches(pointers, at, inside, guided, DTYPE)
        _write(branches, pushes, factors, dout_ptr, outputs, at, inside, guided, RENORM)


def guided_velocity_fwd(velocity, without_text, without_image, guided, numbers, renorm):
    """Launcher; contract in `lvrpo.ops.guided_velocity`."""
    out = velocity.new_empty(velocity.shape, dtype=wide(velocity.dtype))
    branches = velocity, without_text, without_image
    _run((out, None, None), branches, guided, None, numbers, renorm)
    return out


def guided_velocity_bwd(
    dout, velocity, without_text, without_image, guided, numbers, with_branches, renorm
):
    """Launcher; a gradient that nobody wants is empty."""
    branches = velocity, without_text, without_image
    wanted = True, with_branches, with_branches and without_image is not None
    made = [velocity.new_empty(velocity.shape if is_wanted else 0) for is_wanted in wanted]
    outputs = [x if is_wanted else None for x, is_wanted in zip(made, wanted, strict=True)]
    _run(outputs, branches, guided, dout, numbers, renorm)
    return tuple(made)


def _run(outputs, branches, guided, dout, numbers, renorm):
    velocity, without_text, without_image = map(contiguous, branches)
    dtype = wide(velocity.dtype)
    config = SLICE[dtype]
    samples, elements, slices = sizes_of(velocity, config.blocks["BLOCK"])
    named = dict(zip(GUIDANCE_NUMBERS, numbers.tolist(), strict=True))
    inputs = {
        "velocity_ptr": velocity,
        "without_text_ptr": without_text,
        "without_image_ptr": without_image,
        "guided_ptr": contiguous(guided),
        "dout_ptr": contiguous(dout),
        "text_push": named["text_scale"] - 1.0,
        "image_push": 0.0 if without_image is None else named["image_scale"] - 1.0,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "RENORM": renorm,
    }
    names = "out_ptr", "dno_text_ptr", "dno_image_ptr"
    results = dict(zip(names, outputs, strict=True)) | {"renorm_min": named["renorm_min"]}
    if renorm in ("channel", "text_channel"):
        channels = max(1, velocity.shape[-1])
        rows = velocity.numel() // channels
        rows_config = _row_config(dtype, channels)
        launch(
            _row_kernel,
            (cdiv(rows, rows_config.blocks["BLOCK_R"]),),
            rows_config,
            **inputs,
            **results,
            channels=channels,
            rows=rows,
            rows_of_sample=elements // channels,
        )
        return
    inputs |= {"elements": elements, "slices": slices}
    parts = None
    if renorm == "global":
        parts = velocity.new_empty(3, samples, slices, dtype=torch.float64)
        launch(_sums_kernel, (samples * slices,), config, parts_ptr=parts, **inputs)
    launch(
        *(_sample_kernel, (samples * slices,), config),
        **(inputs | results),
        parts_ptr=parts,
        BLOCK_S=BLOCK_S,
    )


@functools.cache
def _row_config(dtype, channels):
    block_c = min(triton.next_power_of_2(channels), MOST_CHANNELS)
    block_r = SLICE[dtype].blocks["BLOCK"] // ROWS_SHARE // block_c
    return dataclasses.replace(SLICE[dtype], blocks={"BLOCK_R": block_r, "BLOCK_C": block_c})
