"""The LVRPO training loop and what it needs."""

from lvrpo.info import packages_of, require

require(*packages_of("train"))
