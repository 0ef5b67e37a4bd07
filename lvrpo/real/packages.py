"""Files of packages that results were published with: found, and told by their SHA-256."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path


def missing(modules: Sequence[str], install: str) -> str:
    """What to install where one of these modules is not there, or ""."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}; {install}" if absent else ""


def folder_of(module: str) -> Path:
    """Where the files of an installed package are; it is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def check_sha256(path: Path, expected: str) -> None:
    """See that a file is the one that results were published with.

    Args:
        path: of the file.
        expected: its SHA-256, in hexadecimal digits.

    Raises:
        ValueError: it is another.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise ValueError(f"{path} has the SHA-256 {digest}, expected {expected}")
