"""What the parameters of every op have in common: choices from a list, and presets by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Params = TypeVar("Params")


def check_choices(params: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse parameters whose fields named in `choices` are none of the names there.

    Raises:
        ValueError: one is not.
    """
    for field, names in choices.items():
        value = getattr(params, field)
        if value not in names:
            raise ValueError(
                f"{type(params).__name__}: {field} is {value!r}, expected one of {', '.join(names)}"
            )


def from_preset(
    cls: type[Params], presets: Mapping[str, dict[str, Any]], name: str, changes: dict[str, Any]
) -> Params:
    """Parameters by the name of a preset, with single fields changed.

    Raises:
        ValueError: there is no such preset, or the parameters do not fit together.
    """
    if name not in presets:
        expected = ", ".join(presets)
        raise ValueError(f"{cls.__name__}: preset is {name!r}, expected one of {expected}")
    return cls(**presets[name] | changes)
