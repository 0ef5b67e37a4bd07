"""The report of a run: one HTML page."""

from lvrpo.info import packages_of, require

require(*packages_of("report"), extra="report")
