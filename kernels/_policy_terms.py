"""Formulas of the policy losses at one token, for every kernel that forms such a loss.

A surrogate returns, for a weight of one: its value; its derivative by the log of the ratio at its
level, or by the log-prob where that is what the advantage multiplies; and whether the lower bound,
the upper bound and the cap hold the token. Derivations: docs/ops/grpo_loss.md.
"""

import math

import triton
import triton.language as tl

from lvrpo.kernels._log_ratio import is_saturated, saturate
from lvrpo.kernels._primitives import clamp

# The names that this file has arithmetic for, by the parameter of `LossParams`.
TERM_CHOICES = {
    "ratio": ("none", "token", "seq_mean", "seq_mean_token", "seq_sum"),
    "surrogate": (
        *("clip", "detached", "sigmoid", "gamma"),
        *("total_variation", "binary_kl", "log_clip"),
    ),
    "kl": ("k1", "k2", "k3", "abs"),
    "kl_factor": ("none", "ratio", "detached_ratio", "sequence_ratio"),
    "kl_gradient": ("own", "k2"),
}

# Where statistics stop log-ratios, and so do the losses that are published so; the log of VESPO's
# smallest ratio of a sequence.
LOG_RATIO_LIMIT = tl.constexpr(20.0)
RATIO_LIMIT = tl.constexpr(math.exp(20.0))
RATIO_FLOOR = tl.constexpr(math.exp(-20.0))
K3_SEEN = tl.constexpr(math.exp(20.0) - 21.0)
LOG_GAMMA_FLOOR = tl.constexpr(math.log(1e-8))


@triton.jit
def exp_excess(x):
    """e^x - 1 - x without the cancellation that leaves nothing of x^2 / 2."""
    terms: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    series = tl.full(x.shape, 1.0, x.dtype)
    for n in tl.static_range(terms, 2, -1):
        series = 1.0 + x * (1.0 / n) * series
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def ratio_limits(advantage, clip_low, clip_high, SURROGATE: tl.constexpr):
    """Bounds of a token's log-ratio inside the sum over its sequence."""
    low, high = float("-inf"), float("inf")
    if SURROGATE == "gamma":
        low, high = -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT
    if SURROGATE == "log_clip":
        low = tl.where(advantage > 0, low, -clip_low)
        high = tl.where(advantage > 0, clip_high, high)
    return low, high


@triton.jit
def bounds_of(numbers, dtype: tl.constexpr, SURROGATE: tl.constexpr):
    """What holds a ratio, and the gates, in the dtype of tokens.

    `numbers` is (clip_low, clip_high, ratio_cap, gate_pos, gate_neg) in fp64. 1 - clip_low and
    1 + clip_high are formed there where they bound: of a clip_high next to -1 little would be left.
    """
    low, high = numbers[0], numbers[1]
    if SURROGATE == "clip" or SURROGATE == "detached":
        low, high = 1.0 - low, 1.0 + high
    return (
        tl.full([], low, dtype),
        tl.full([], high, dtype),
        tl.full([], numbers[2], dtype),
        tl.full([], numbers[3], dtype),
        tl.full([], numbers[4], dtype),
    )


@triton.jit
def _never(x):
    return tl.zeros(x.shape, tl.int1)


@triton.jit
def clip_term(ratio, advantage, low, high, cap):
    """max(-rho A, -clip(rho) A): the sign of A picks the one side of the clip that can bind."""
    is_low = (advantage < 0) & (ratio < low)
    is_high = (advantage > 0) & (ratio > high)
    is_cap = (advantage < 0) & (ratio > cap)
    upper = tl.where(advantage < 0, cap, high)
    value = -advantage * tl.where(is_low, low, tl.where(ratio > upper, upper, ratio))
    return value, tl.where(is_low | is_high | is_cap, 0.0, value), is_low, is_high, is_cap


@triton.jit
def score_term(logp, advantage):
    """-A log pi, which nothing holds."""
    return -advantage * logp, -advantage, _never(logp), _never(logp), _never(logp)


@triton.jit
def detached_term(logp, ratio, advantage, low, high):
    """-sg(clip(rho)) A log pi."""
    slope = -advantage * clamp(ratio, low, high)
    return slope * logp, slope, ratio < low, ratio > high, _never(ratio)


@triton.jit
def sigmoid_term(ratio, advantage, gate_pos, gate_neg):
    """-(4 / tau) sigmoid(tau (rho - 1)) A."""
    tau = tl.where(advantage > 0, gate_pos, gate_neg)
    # Past the limit the gate is open and flat; infinity would make 0 times infinity of its slope.
    rho = tl.where(ratio > RATIO_LIMIT, RATIO_LIMIT, ratio)
    at = tau * (rho - 1.0)
    # sigma and sigma (1 - sigma) from e^-|x|, which neither overflows nor cancels.
    e = tl.exp(-tl.abs(at))
    inverse = 1.0 / (1.0 + e)
    value = -4.0 / tau * tl.where(at < 0, e * inverse, inverse) * advantage
    slope = -4.0 * e * inverse * inverse * rho * advantage
    return value, slope, _never(ratio), _never(ratio), _never(ratio)


@triton.jit
def gamma_weight(log_w, k, rate):
    """VESPO's e^l w^k e^(-l w), which is 1 at w = 1."""
    return tl.exp(rate + k * log_w - rate * tl.exp(log_w))


@triton.jit
def gamma_term(logp, of_weight, advantage):
    """-sg(phi(w)) A log pi; `of_weight` is phi of the sequence's ratio."""
    slope = -advantage * of_weight
    return slope * logp, slope, _never(logp), _never(logp), _never(logp)


@triton.jit
def log_clip_term(log_ratio, of_weight, advantage, clip_low, clip_high):
    """-rho A; `of_weight` is the sequence's ratio after the clip of its tokens."""
    value = -advantage * of_weight
    is_low = (advantage < 0) & (log_ratio < -clip_low)
    is_high = (advantage > 0) & (log_ratio > clip_high)
    return value, value, is_low, is_high, _never(log_ratio)


@triton.jit
def trust_region_term(
    logp, log_ratio, ratio, advantage, clip_low, clip_high, cap, SURROGATE: tl.constexpr
):
    """-sg(min(rho, cap)) A log pi inside the trust region, 0 outside."""
    old = logp - log_ratio
    change = tl.exp(logp) - tl.exp(old)
    up = advantage > 0
    if SURROGATE == "total_variation":
        inside = tl.where(up, change <= clip_high, change >= -clip_low)
    else:
        tl.static_assert(SURROGATE == "binary_kl", "this trust region has no formula")
        # 1 - p without cancellation; 1e-8 as in the published code, for a probability of 1.
        rest, rest_old = -(exp_excess(logp) + logp), -(exp_excess(old) + old)
        quotient = (tl.maximum(rest_old, 0.0) + 1e-8) / (tl.maximum(rest, 0.0) + 1e-8)
        divergence = -tl.exp(old) * log_ratio + rest_old * tl.log(quotient)
        back = tl.where(up, change <= 0, change >= 0)
        inside = (divergence <= tl.where(up, clip_high, clip_low)) | back
    slope = -advantage * tl.where(inside, tl.where(ratio > cap, cap, ratio), 0.0)
    is_low, is_high = (advantage < 0) & (inside == 0), up & (inside == 0)
    return slope * logp, slope, is_low, is_high, inside & (ratio > cap)


@triton.jit
def surrogate_term(token, bounds, RATIO: tl.constexpr, SURROGATE: tl.constexpr):
    """The term that a loss is made of.

    `token` is (logp, log_ratio, ratio at its level, weight of the sequence, advantage, whether the
    log of that ratio is past its limit, where a ratio that is differentiated, and not a constant
    weight of the log-prob, has no slope), `bounds` what `bounds_of` returns. Both the value and the
    slope of an advantage of 0 are 0, whatever the ratio.
    """
    logp, log_ratio, ratio, of_weight, advantage, past = token
    low_bound, high_bound, cap, own_pos, own_neg = bounds
    if RATIO == "none":
        value, slope, low, high, is_cap = score_term(logp, advantage)
    elif SURROGATE == "clip":
        value, slope, low, high, is_cap = clip_term(ratio, advantage, low_bound, high_bound, cap)
        slope = tl.where(past, 0.0, slope)
    elif SURROGATE == "detached":
        value, slope, low, high, is_cap = detached_term(
            logp, ratio, advantage, low_bound, high_bound
        )
    elif SURROGATE == "sigmoid":
        value, slope, low, high, is_cap = sigmoid_term(ratio, advantage, own_pos, own_neg)
        slope = tl.where(past, 0.0, slope)
    elif SURROGATE == "gamma":
        value, slope, low, high, is_cap = gamma_term(logp, of_weight, advantage)
    elif SURROGATE == "log_clip":
        value, slope, low, high, is_cap = log_clip_term(
            log_ratio, of_weight, advantage, low_bound, high_bound
        )
        slope = tl.where(past, 0.0, slope)
    else:
        # It refuses a name that it does not know.
        value, slope, low, high, is_cap = trust_region_term(
            logp, log_ratio, ratio, advantage, low_bound, high_bound, cap, SURROGATE
        )
    return (
        tl.where(advantage != 0, value, 0.0),
        tl.where(advantage != 0, slope, 0.0),
        low,
        high,
        is_cap,
    )


@triton.jit
def kl_term(
    d,
    log_ratio,
    ratio_limit,
    log_ratio_limit,
    limit,
    KL: tl.constexpr,
    KL_FACTOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
):
    """The KL estimator at d = ref - logp, times its factor: as statistics have it; as the loss sums
    it; and the derivative of the latter by logp. `ratio_limit` is that of exponentials. The
    derivative through a factor that a sequence shares, whose log is `log_ratio`, is not part of it.
    """
    x = clamp(d, -log_ratio_limit, log_ratio_limit)
    flat = tl.abs(d) > log_ratio_limit
    if KL == "k1":
        value, slope = -x, tl.full(x.shape, 1.0, x.dtype)
    elif KL == "k2":
        value, slope = 0.5 * x * x, -x
    elif KL == "k3":
        # Above alone: a log-ratio far below 0 is no danger to an exponential.
        flat |= x > ratio_limit
        x = tl.where(x > ratio_limit, ratio_limit, x)
        value = exp_excess(x)
        slope = -(value + x)
    else:
        tl.static_assert(KL == "abs", "this KL has no estimate")
        value = tl.abs(x)
        slope = tl.where(x < 0, 1.0, tl.where(x > 0, -1.0, 0.0)).to(x.dtype)
    flat |= tl.abs(value) > limit
    value = clamp(value, -limit, limit)
    slope = tl.where(flat, 0.0, slope)
    if KL_GRADIENT == "k2":
        slope = -d
    else:
        tl.static_assert(KL_GRADIENT == "own", "this gradient of the KL has no formula")
    seen = value
    if KL == "k3":
        seen = tl.where(value > K3_SEEN, K3_SEEN, value)
    term = value
    if KL_FACTOR != "none":
        ratio = tl.exp(saturate(log_ratio, ratio_limit))
        term, slope = ratio * value, ratio * slope
        seen = tl.where(ratio > RATIO_LIMIT, RATIO_LIMIT, ratio) * seen
        if KL_FACTOR == "ratio":
            slope += tl.where(is_saturated(log_ratio, ratio_limit), 0.0, term)
        else:
            tl.static_assert(
                KL_FACTOR == "detached_ratio" or KL_FACTOR == "sequence_ratio",
                "this factor of the KL has no formula",
            )
    return seen, term, slope
