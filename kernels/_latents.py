"""Passes over latents [N, D], for the flow ops: a program takes a slice of one sample.

Slices begin at the sample's own first element, so that the order of a sum depends on the shape
alone. Where D is a multiple of 16 loads are of 16 bytes.
"""

import math

import torch
import triton
import triton.language as tl

from lvrpo.kernels._launch import LaunchConfig, cdiv

# A thread has 16 elements of each array, all of them asked for at once: with three arrays of fp32
# and eight programs on an SM 196 KB are in flight, where 3.4 TB/s need 25.
SLICE = {
    torch.float32: LaunchConfig({"BLOCK": 2048}, num_warps=4, num_stages=1),
    torch.float64: LaunchConfig({"BLOCK": 1024}, num_warps=4, num_stages=1),
}
# With noise that is drawn a thread has 8: the numbers of a counter, in fp64, take its registers.
SLICE_DRAWN = {
    dtype: LaunchConfig(config.blocks, num_warps=8, num_stages=1) for dtype, config in SLICE.items()
}
# Slices of a sample that are added side by side.
BLOCK_S = 16


def sizes_of(latents, block):
    """Samples, elements of each, and slices of each."""
    samples, elements = latents.shape[0], math.prod(latents.shape[1:])
    return samples, elements, cdiv(elements, block)


def slice_config(dtype, noise):
    """Of a pass over latents of this dtype with this noise."""
    drawn = noise is not None and not noise.is_floating_point()
    return (SLICE_DRAWN if drawn else SLICE)[dtype]


def wide(dtype):
    """What sums and results of latents of this dtype are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def contiguous(tensor):
    """The same next to each other, or None."""
    return None if tensor is None else tensor.contiguous()


@triton.jit
def slice_of(elements, slices, BLOCK: tl.constexpr):
    """The sample [1] of this program; where its elements are, and which of them there are."""
    sample = (tl.program_id(0) // slices).to(tl.int64)
    first = (tl.program_id(0) % slices).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    at = sample * elements + first + lane
    return tl.full([1], sample, tl.int64), at, lane < elements - first


@triton.jit
def over_slices(parts_ptr, sample, inside, slices, BLOCK_S: tl.constexpr):
    """[samples] what parts [N, slices] of a sample add up to."""
    sums = tl.zeros([sample.shape[0], BLOCK_S], tl.float64)
    for first in range(0, slices, BLOCK_S):
        at = first + tl.arange(0, BLOCK_S)[None, :]
        mask = inside[:, None] & (at < slices)
        sums += tl.load(parts_ptr + sample[:, None] * slices + at, mask=mask, other=0.0)
    return tl.sum(sums, axis=1)
