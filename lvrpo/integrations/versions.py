"""Whether the package that an integration is for is there, in a release it is tested with."""

from __future__ import annotations

import importlib.metadata
import re


def require(package: str, extra: str, first: str, below: str) -> None:
    """See that a package is installed in a tested release, without importing it.

    Args:
        package: by the name that pip knows.
        extra: of `pip install 'lvrpo[...]'` that has it.
        first: the first tested release, as "5.24".
        below: the first release after the tested ones.

    Raises:
        ModuleNotFoundError: it is not installed; says what to install.
        ImportError: its release is outside the range; names both.
    """
    install = f"pip install 'lvrpo[{extra}]'"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"not installed: {package}; {install}", name=package) from None
    if not _numbers(first) <= _numbers(found) < _numbers(below):
        raise ImportError(
            f"{package} is {found}, lvrpo is tested with >={first},<{below}: {install}",
            name=package,
        )


def _numbers(release: str) -> tuple[int, ...]:
    """The leading numbers of a release; of "5.24.0rc1" they are (5, 24, 0)."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", release)[0].split(".") if part)  # type: ignore[index]
