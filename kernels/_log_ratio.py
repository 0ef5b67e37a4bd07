"""Where log-ratios stop, for every kernel that has ratios."""

import triton
import triton.language as tl


@triton.jit
def saturate(log_ratio, limit):
    """The log-ratio to take an exponential of; an infinite limit is none, and a NaN stays a NaN."""
    return tl.where(log_ratio < -limit, -limit, tl.where(log_ratio > limit, limit, log_ratio))


@triton.jit
def is_saturated(log_ratio, limit):
    """Whether it is past the limit, where its gradient is 0."""
    return tl.abs(log_ratio) > limit
