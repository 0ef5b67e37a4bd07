"""Noise that is drawn where it is needed: standard normals of a counter-based stream.

Philox 4x32-10, which is Triton's own, and Box-Muller in fp64, so that what rounding leaves in fp32
does not depend on who computes it. Counter and key are cuRAND's: the key is a seed, the counter
(element // 4, subsequence).
"""

import triton
import triton.language as tl

from lvrpo.kernels._latents import contiguous

TWO_PI = tl.constexpr(6.283185307179586)


def noise_pointers(noise):
    """Noise [N, D], or streams int64 [N, 2], by the parameters of kernels; one is None, or both."""
    drawn = noise is not None and not noise.is_floating_point()
    given = contiguous(noise)
    return {"noise_ptr": None if drawn else given, "streams_ptr": given if drawn else None}


@triton.jit
def noise_of(noise_ptr, streams_ptr, sample, at, read, slices, BLOCK: tl.constexpr):
    """[BLOCK] of this program's slice, 0 where it is not to be read."""
    if streams_ptr is None:
        return tl.load(noise_ptr + at, mask=read, other=0.0)
    else:
        first = (tl.program_id(0) % slices).to(tl.int64) * (BLOCK // 4)
        drawn = _standard_normal(
            tl.load(streams_ptr + 2 * sample), tl.load(streams_ptr + 2 * sample + 1), first, BLOCK
        )
        return tl.where(read, drawn, 0.0)


@triton.jit
def _standard_normal(seed, subsequence, first, BLOCK: tl.constexpr):
    """[BLOCK] fp32 numbers of a stream from element 4 first on."""
    index = first + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.philox(seed, *_words(index), *_words(subsequence))
    one, two = _box_muller(a, b)
    three, four = _box_muller(c, d)
    return tl.reshape(tl.join(tl.join(one, three), tl.join(two, four)), [BLOCK])


@triton.jit
def _words(x):
    """The lower and the upper half of an int64."""
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _box_muller(one, two):
    u = (one.to(tl.float64) + 0.5) / 4294967296.0
    cos, sin = _cos_and_sin(TWO_PI * ((two.to(tl.float64) + 0.5) / 4294967296.0))
    radius = tl.sqrt(-2.0 * tl.log(u))
    return (radius * cos).to(tl.float32), (radius * sin).to(tl.float32)


@triton.jit
def _cos_and_sin(angle):
    """Of an angle in [0, 2 pi], to an ulp: those of Triton have code for any, which takes a stack.

    The polynomials are fdlibm's.
    """
    n = tl.floor(angle * 0.6366197723675814 + 0.5)
    quarter = n.to(tl.int32)
    # pi / 2 in three parts, of which the first two have so few digits that their products with n
    # are exact.
    x = angle - n * 1.5707963267341256
    x = x - n * 6.07710050630396597660e-11
    x = x - n * 2.02226624879595063154e-21
    z = x * x
    c = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09
    c = z * c - 2.75573143513906633035e-07
    c = z * c + 2.48015872894767294178e-05
    c = z * c - 1.38888888888741095749e-03
    c = z * c + 4.16666666666666019037e-02
    c = 1.0 - (0.5 * z - z * z * c)
    s = z * 1.58969099521155010221e-10 - 2.50507602534068634195e-08
    s = z * s + 2.75573137070700676789e-06
    s = z * s - 1.98412698298579493134e-04
    s = z * s + 8.33333333332248946124e-03
    s = z * s - 1.66666666666666324348e-01
    s = x + x * z * s
    swapped = (quarter & 1) != 0
    cos, sin = tl.where(swapped, s, c), tl.where(swapped, c, s)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    return cos, tl.where((quarter & 2) != 0, -sin, sin)
