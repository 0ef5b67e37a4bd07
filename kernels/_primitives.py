"""Device functions that several kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def positions(names, *wanted):
    """Where the wanted names are in a list, as constants of kernels."""
    return [tl.constexpr(names.index(name)) for name in wanted]


@triton.jit
def as_scalar(x, dtype: tl.constexpr):
    """A kernel's float argument in the dtype it computes in; arguments are passed as fp64."""
    return tl.full([], x, dtype)


@triton.jit
def is_finite(x):
    """False for NaN and for what is infinite."""
    return x - x == 0


@triton.jit
def clamp(x, low, high):
    """x between bounds; a NaN stays a NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def tanh(x):
    """tanh with an absolute error of an ulp of 1; Triton has none of its own."""
    t = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def capped_logit(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), or x itself."""
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def capped_logit_derivative(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """Its derivative by x."""
    if HAS_SOFTCAP:
        t = tanh(x / softcap)
        return (1.0 - t) * (1.0 + t)
    else:
        return tl.full(x.shape, 1.0, x.dtype)
