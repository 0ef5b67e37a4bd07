"""An op bound to a backend and to its choices, which calls that differ in numbers only share."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lvrpo import backends
from lvrpo.backends.backend import Backend, Function
from lvrpo.kept import kept


class Params(Hashable, Protocol):
    """Parameters of an op."""

    def choices(self) -> dict[str, str]:
        """Those that are names."""


class Bound(NamedTuple):
    """An op on a backend, as one of two things.

    Attributes:
        functional: the whole op, of the reference's arguments; None where there are kernels.
        kernels: of the op's one pass, with every choice made.
        backend: that it is on.
    """

    functional: Function | None
    kernels: Function
    backend: Backend


def bind(
    names: tuple[str, str],
    reference: Function,
    params: Params,
    like: Tensor,
    backend: str | None,
) -> Bound:
    """As `resolve`, for tensors that are all on one device and of dtypes that `like` decides.

    Calls that differ in nothing but numbers ask once.

    Args:
        names: of the op, and of its pass as `Backend.op` takes it.
        reference: what has its definition.
        params: whose choices are made.
        like: the tensor.
        backend: as `resolve` takes it.
    """
    name = backend or os.environ.get("LVRPO_BACKEND") or None
    return _bind(names, reference, params, like.device, like.dtype, name, backends.ALL)


@kept
def _bind(
    names: tuple[str, str],
    reference: Function,
    params: Params,
    device: torch.device,
    dtype: torch.dtype,
    name: str | None,
    _: tuple[Backend, ...],
) -> Bound:
    op, kernels = names
    like, choices = torch.empty(0, device=device, dtype=dtype), params.choices()
    backend = backends.resolve(op, (like,), name, choices=choices)
    functional = backend.functional(op, reference)
    return Bound(functional, functional or backend.chosen(kernels, choices), backend)
