"""Prompts of both kinds, from anywhere: what one is, and a user's own JSONL files."""

from lvrpo.info import require

require("numpy")
