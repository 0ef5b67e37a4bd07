"""The releases of transformers that the integration is tested with."""

from __future__ import annotations

from lvrpo.integrations import versions

#: What errors of the attention begin with.
NAME = "attn_implementation='lvrpo'"


def require_transformers() -> None:
    """See that a tested release is installed.

    Raises:
        ImportError: there is none; says the range, and what to install.
    """
    versions.require("transformers", "transformers", "5.24", "5.25")
