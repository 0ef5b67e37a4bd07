"""What many runs, or finished ones, are asked beyond a run's own report: `lvrpo study`."""

from lvrpo.info import packages_of, require

require(*packages_of("train"))
