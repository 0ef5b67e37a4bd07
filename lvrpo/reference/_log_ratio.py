"""Where log-ratios stop, for every loss that has ratios."""

from __future__ import annotations

from torch import Tensor

from lvrpo.dtypes import number


def saturate(log_ratio: Tensor, limit: float | None) -> Tensor:
    """`log_ratio` within +-`limit`, with gradient 0 outside; None for no limit.

    Take exponentials of the result, never of `log_ratio`: where it is cut, autograd passes back
    0 times e^limit, which is 0, and not 0 times infinity.
    """
    if limit is None:
        return log_ratio
    bound = number(limit, log_ratio)
    return log_ratio.clamp(-bound, bound)
