"""Where log-ratios stop, for every loss that has ratios."""

from __future__ import annotations

#: The default: e^20 = 4.9e8 is past any clip range, and finite in every dtype of a loss.
LOG_RATIO_LIMIT = 20.0
