"""How it is measured: the correctness gate, the interleaved clock, peak memory, the ceilings."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness.providers import DEVICE, Case
from torch import Tensor

from lvrpo.testing import DEFAULT_ULPS, check_against_plain


class Gate:
    """Whether a provider's results are right, by the rule of `lvrpo.testing`.

    The plain implementation runs once in fp64, which is the truth, and once in fp32, whose error a
    provider may have twice. A provider that fails may still be as good as plain PyTorch is in the
    dtype of the inputs, bf16 say, where those are narrower.
    """

    def __init__(self, case: Case, direction: str) -> None:
        self.case = case
        self.names = case.differentiable if direction == "forward+backward" else ()
        self.upstream: list[Tensor] = []
        base = case.bind("torch")
        self.gold = self._run(base, torch.float64)
        # Plain PyTorch by dtype, widest first.
        dtypes = [torch.float32] + [case.dtype] * (case.dtype not in (torch.float32, torch.float64))
        self.plain = {dtype: self._run(base, dtype) for dtype in dtypes}

    def grade(self, function: Callable[..., Any]) -> tuple[str | None, str]:
        """The dtype whose precision the results have, or None and what is wrong with them."""
        ours = self._run(function, None)
        wrong = ""
        for dtype in self.plain:
            try:
                for name in ours:
                    self._check(name, ours[name], dtype)
            except AssertionError as error:
                wrong = str(error)
            else:
                return str(dtype).removeprefix("torch."), ""
        return None, wrong

    def _check(self, name: str, ours: Tensor, dtype: torch.dtype) -> None:
        gold, plain = self.gold[name], self.plain[dtype][name].to(ours.dtype)
        scale, ulps = self.case.scales.get(name), DEFAULT_ULPS
        if dtype != torch.float32:
            # Four roundings to the narrow dtype, in the size of the element or of all of them.
            ulps = 4 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
            scale = gold.abs() + gold.square().mean().sqrt()
        check_against_plain(ours, gold, plain, scale=scale, ulps=ulps, name=name)

    def _run(self, function: Callable[..., Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
        arguments = dict(self.case.gate or self.case.inputs)
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                wide = value.detach() if dtype is None else value.detach().to(dtype)
                arguments[name] = wide.requires_grad_(name in self.names)
        outputs = _as_tuple(function(**arguments))
        results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
        if self.names:
            if not self.upstream:  # of order 1 / size, as after a mean; exact in every dtype
                self.upstream = [
                    (torch.randn_like(out.detach()) / out.numel()).bfloat16() for out in outputs
                ]
            live = [i for i, out in enumerate(outputs) if out.requires_grad]
            leaves = [arguments[name] for name in self.names]
            gradients = torch.autograd.grad(
                [outputs[i] for i in live],
                leaves,
                [self.upstream[i].to(outputs[i]) for i in live],
                allow_unused=True,
            )
            for name, leaf, gradient in zip(self.names, leaves, gradients, strict=True):
                results[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        return results


def step(
    function: Callable[..., Any],
    case: Case,
    direction: str,
    outputs_of: Callable[..., Any] | None = None,
) -> Callable[[], Any]:
    """What is timed: one call without a graph, or one call and its gradients.

    Args:
        outputs_of: whose outputs tell which upstream gradients there are; None means `function`.
    """
    if case.turns:
        # Not by calling `function`, for which every turn is to be new when it is timed.
        plain = case.bind("torch")
        cases = [replace(case, inputs=inputs, turns=()) for inputs in case.turns]
        steps = itertools.cycle([step(function, turn, direction, plain) for turn in cases])
        return lambda: next(steps)()
    if direction != "forward+backward":

        def forward() -> Any:
            with torch.no_grad():
                return function(**case.inputs)

        return forward
    leaves = [case.inputs[name].detach().requires_grad_() for name in case.differentiable]
    inputs = {**case.inputs, **dict(zip(case.differentiable, leaves, strict=True))}
    upstream = [torch.randn_like(out) for out in _live_outputs((outputs_of or function)(**inputs))]

    def forward_and_backward() -> Any:
        return torch.autograd.grad(_live_outputs(function(**inputs)), leaves, upstream)

    return forward_and_backward


@dataclass
class Times:
    """Seconds of every round: by the host's clock, and where there is a device, on it.

    `host` is what a call takes on the host, until it returns and before anybody waits for the
    device; without a device that is `wall`, and `host` is empty.
    """

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    first_call: float = 0.0

    @property
    def published(self) -> list[float]:
        return self.device or self.wall

    def facts(self) -> dict[str, float | None]:
        """Medians, and the quartiles and minimum of what is published, in milliseconds."""
        low, high = quartiles(self.published)
        return {
            "device_ms": 1e3 * statistics.median(self.device) if self.device else None,
            "wall_ms": 1e3 * statistics.median(self.wall),
            "host_ms": 1e3 * statistics.median(self.host) if self.host else None,
            "quartile_low_ms": 1e3 * low,
            "quartile_high_ms": 1e3 * high,
            "min_ms": 1e3 * min(self.published),
            "first_call_ms": 1e3 * self.first_call,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class Race:
    """Functions timed one after the other, round after round, each round starting with another one.

    Whatever else the machine does meets all of them alike, and so does what each leaves behind.
    """

    WARM_UP = 3  # calls of each before the first round

    def __init__(
        self,
        functions: Mapping[str, Callable[[], Any]],
        *,
        seconds: float,
        before: Callable[[str], Any] = lambda name: None,
        most: int = 200,
    ) -> None:
        self.functions = dict(functions)
        self.before = before
        self.times = {name: Times() for name in functions}
        once = 0.0
        for name in functions:
            calls = [self._time(name)["wall"] for _ in range(self.WARM_UP)]
            self.times[name].first_call = calls[0]
            once += calls[-1]
        self.rounds = max(3 if once > seconds else 5, min(most, int(seconds / max(once, 1e-9))))
        self._begun = 0

    def round(self) -> None:
        names = list(self.functions)
        turn = self._begun % len(names)
        self._begun += 1
        gc.disable()
        try:
            for name in names[turn:] + names[:turn]:
                for clock, seconds in self._time(name).items():
                    getattr(self.times[name], clock).append(seconds)
        finally:
            gc.enable()

    def _time(self, name: str) -> dict[str, float]:
        """Seconds by clock, as in `Times`."""
        function = self.functions[name]
        self.before(name)
        if DEVICE == "cpu":
            began = time.perf_counter()
            function()
            return {"wall": time.perf_counter() - began}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The device is still at it when the first kernel is launched: what the host needs until
        # then is no time of the device. The wall clock has the rest of the flush in it.
        _flush_cache()
        began = time.perf_counter()
        start.record()
        function()
        host = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
        return {"wall": wall, "device": start.elapsed_time(end) / 1e3, "host": host}


def _flush_cache() -> None:
    """Nobody finds the inputs in the L2 cache because somebody else has just read them."""
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """Memory of one call above what is there before it; None where it cannot be measured.

    On a CPU by the kernel's high-water mark of resident memory, which sees every allocator, C++
    vectors as well as tensors; exact to some 100 KiB, or to a few MiB where other pages of the
    process become resident meanwhile. Linux with glibc only.
    """
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return None
    libc = ctypes.CDLL(None)
    # Every block above 64 KiB then comes from the kernel and goes back when it is freed; otherwise
    # the mark shows what malloc kept for later.
    libc.mallopt(_MMAP_THRESHOLD, 64 * 1024)
    try:
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
        before = _status_bytes("VmRSS")
        function()
        return max(_status_bytes("VmHWM") - before, 0)
    except OSError:
        return None
    finally:
        # What glibc's own thresholds grow to in a process that frees large tensors.
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)


def result_bytes(function: Callable[[], Any]) -> int:
    """Of the tensors that a call returns."""
    return sum(out.nbytes for out in _as_tuple(function()))


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def ceilings() -> dict[str, float]:
    """What this machine can do at best: memory bandwidth in GB/s, matrix products in TFLOP/s."""
    big = 2**30 if DEVICE == "cuda" else 2**27
    buffer = torch.ones(big, device=DEVICE)
    read = _best(buffer.sum)
    result = {"read_gb_per_s": buffer.nbytes / read / 1e9}
    if DEVICE == "cuda":
        result["copy_gb_per_s"] = 2 * buffer.nbytes / _best(buffer.clone) / 1e9
    del buffer
    n = 8192 if DEVICE == "cuda" else 1536
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=DEVICE).to(dtype)
        product = _best(lambda a=a: a @ a)
        result[f"{str(dtype).removeprefix('torch.')}_tflop_per_s"] = 2 * n**3 / product / 1e12
    return result


def bandwidth(found: Mapping[str, float]) -> float:
    """Bytes per second that memory reaches at best."""
    return max(v for name, v in found.items() if name.endswith("gb_per_s")) * 1e9


def _best(function: Callable[[], Any], rounds: int = 5) -> float:
    race = Race({"": function}, seconds=0.0)
    for _ in range(rounds):
        race.round()
    return min(race.times[""].published)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _live_outputs(outputs: Any) -> list[Tensor]:
    return [out for out in _as_tuple(outputs) if out.requires_grad]
