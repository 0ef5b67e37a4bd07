"""Runs on disk: their directories, configuration, logs, checkpoints and commands."""

from lvrpo.info import packages_of, require

require(*packages_of("train"))
