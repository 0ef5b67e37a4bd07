"""The flash attentions that may be installed, as one function over packed sequences.

Their arguments and limits are those of flash-attn 2.8.3, flash-attn 3 (3.0.0), flash-attn-4
4.0.0b36 and torch 2.11 to 2.13.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Varlen(Protocol):
    """Attention of B sequences; sequence b is the rows cu[b]:cu[b + 1] of each tensor.

    Query head h reads key head h // (Hq / Hkv). A causal query sees the keys up to its own
    position when the last query is aligned with the last key ("bottom right"), and otherwise it
    sees all keys of its sequence; with a window, of either those alone that are less than `window`
    before that position. Differentiable in q, k and v.
    """

    def __call__(
        self,
        q: Tensor,  # [Tq, Hq, D]
        k: Tensor,  # [Tk, Hkv, D]
        v: Tensor,  # [Tk, Hkv, D]
        cu_q: Tensor,  # [B + 1] int32
        cu_k: Tensor,  # [B + 1] int32
        max_q: int,
        max_k: int,
        causal: bool,
        scale: float,
        softcap: float,
        window: int | None,
    ) -> Tensor:
        """[Tq, Hq, D]: the attention of every query."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Where a flash attention is, and what it takes; all take fp16 and bf16.

    Attributes:
        name: for messages.
        package: the distribution that it comes with.
        since: the first version that has the arguments used here.
        modules: where its function is; the first that can be imported.
        function: its name there.
        majors: compute capabilities, without the minor number, whose backward pass can be
            deterministic.
        widest: the widest head whose backward pass is deterministic on all of `majors`.
        softcap: whether it has one.
        by_flag: its backward pass is deterministic under torch's own flag only.
        call: the function and the arguments of `Varlen`, to the result.
    """

    name: str
    package: str
    since: tuple[int, int]
    modules: tuple[str, ...]
    function: str
    majors: tuple[int, ...]
    widest: int
    softcap: bool
    by_flag: bool
    call: Callable[..., Tensor]

    def version(self) -> str | None:
        """The installed version; None if it is missing or too old."""
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        return version if numbers >= self.since else None

    def why_not(self, major: int, width: int, softcap: float, backward: bool) -> str:
        """Why it does not take heads of this width on this device; empty when it does."""
        if major not in self.majors:
            return f"{self.name} is not for compute capability {major}.x"
        if width > self.widest:
            return f"{self.name} has heads up to {self.widest} wide, got {width}"
        if softcap and not self.softcap:
            return f"{self.name} has no softcap"
        if self.by_flag and backward and not _torch_is_deterministic():
            return (
                f"the backward pass of {self.name} is deterministic only after "
                "torch.use_deterministic_algorithms(True)"
            )
        return ""

    def load(self) -> Varlen:
        """Import it.

        Raises:
            ImportError: it is installed and does not load, as when it was built for another torch.
        """
        *others, last = self.modules
        for name in others:
            try:
                return functools.partial(self.call, getattr(_import(name), self.function))
            except ModuleNotFoundError:
                continue
        return functools.partial(self.call, getattr(_import(last), self.function))


def call_flash_attn(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """`flash_attn_varlen_func` of flash-attn 2, 3 and 4: by name, for their orders differ."""
    local = {} if window is None else {"window_size": _window_size(window, causal, max_k)}
    result = function(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap,
        deterministic=True,
        **local,
    )
    # Version 4, and early builds of 3, return the log-sum-exp with it.
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def call_torch(
    function: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`."""
    assert softcap == 0.0
    # Before it had the argument (2.12) it took fewer key heads unasked.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}
    size = (-1, 0) if causal else (-1, -1)
    if window is not None:
        size = _window_size(window, causal, max_k)
    return function(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=size, **grouped)


def _window_size(window: int, causal: bool, max_k: int) -> tuple[int, int]:
    """Keys before and after a query's own. Not -1 for all: flash-attn 4 takes that as a number."""
    return window - 1, 0 if causal else max_k


_FLASH_ATTN: dict[str, Any] = {
    "function": "flash_attn_varlen_func",
    "softcap": True,
    "by_flag": False,
    "call": call_flash_attn,
}

#: In order of preference.
IMPLEMENTATIONS = (
    # Capability 12.x has no deterministic backward, 8.x none at all, and 10.x takes 256 but not
    # what is between.
    Implementation(
        name="flash-attn 4",
        package="flash-attn-4",
        since=(4, 0),
        modules=("flash_attn.cute",),
        majors=(9, 10, 11),
        widest=128,
        **_FLASH_ATTN,
    ),
    # Builds from before September 2025 accept `deterministic` and ignore it (pull request 1893 of
    # Dao-AILab/flash-attention); for heads of 256 it is in doubt still.
    Implementation(
        name="flash-attn 3",
        package="flash-attn-3",
        since=(3, 0),
        modules=("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        majors=(9,),
        widest=192,
        **_FLASH_ATTN,
    ),
    Implementation(
        name="flash-attn 2",
        package="flash-attn",
        since=(2, 6),
        modules=("flash_attn",),
        majors=(8, 9, 10, 11, 12),
        widest=256,
        **_FLASH_ATTN,
    ),
    # 2.10 has neither scale nor window.
    Implementation(
        name="torch's varlen_attn",
        package="torch",
        since=(2, 11),
        modules=("torch.nn.attention.varlen",),
        function="varlen_attn",
        majors=(8, 9, 10, 11, 12),
        widest=256,
        softcap=False,
        by_flag=True,
        call=call_torch,
    ),
)


@functools.cache
def installed() -> dict[Implementation, str]:
    """Those of this environment with their versions, in order of preference; imports none."""
    versions = {found: found.version() for found in IMPLEMENTATIONS}
    return {found: version for found, version in versions.items() if version is not None}


def why_unavailable() -> str:
    """Why no flash attention can run here; empty when one can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if not installed():
        return "no flash attention is installed (pip install lvrpo[flash], or torch >= 2.11)"
    return ""


def choose(
    major: int, width: int, softcap: float, backward: bool
) -> tuple[Implementation | None, str]:
    """The first installed one that takes these inputs; or None and why none of them does.

    Args:
        major: compute capability of the device, without the minor number.
        width: of the heads.
        softcap: 0 for none.
        backward: whether gradients will be asked for.
    """
    reasons = []
    for implementation in installed():
        reason = implementation.why_not(major, width, softcap, backward)
        if not reason:
            return implementation, ""
        reasons.append(reason)
    return None, "; ".join(reasons)


def _torch_is_deterministic() -> bool:
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warns


@functools.cache
def _import(name: str) -> Any:
    return importlib.import_module(name)
