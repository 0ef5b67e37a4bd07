"""Models that run on the ops."""

from lvrpo.info import require

require("einops", "numpy")
