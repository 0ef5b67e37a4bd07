"""The releases of verl that the integration is tested with."""

from __future__ import annotations

from lvrpo.integrations import versions


def require_verl() -> None:
    """See that a tested release is installed.

    Raises:
        ImportError: there is none; says the range, and what to install.
    """
    versions.require("verl", "verl", "0.9", "0.10")
