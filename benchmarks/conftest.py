"""Measures an op for every provider, after its result has passed the tolerance rule.

    pytest benchmarks --benchmark-only                small shapes, seconds; what CI runs
    pytest benchmarks --benchmark-only --size=full    shapes of real models, minutes

With --benchmark-json=FILE the file also holds `rows`, one per measurement, and under `machine_info`
the device, the versions and the memory bandwidth that a number must be read with.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _providers import PROVIDERS, Case, version

from lvrpo import info
from lvrpo.ops import _library
from lvrpo.testing import check_op

DIRECTIONS = ("forward", "forward+backward")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=["small", "full"], default="small", help="shapes of the benchmarks"
    )


def pytest_configure(config: pytest.Config) -> None:
    untouched = str(getattr(config.option, "benchmark_max_time", "")) == "1.0"
    if config.getoption("--size") == "small" and untouched:
        config.option.benchmark_max_time = 0.1
        config.option.benchmark_min_rounds = max(config.option.benchmark_min_rounds, 20)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`shape`, `direction` and `provider` as parameters; a module names its SHAPES and PEERS."""
    size = metafunc.config.getoption("--size")
    shapes = getattr(metafunc.module, "SHAPES", {}).get(size, {})
    choices = {
        "shape": dict(shapes),
        "direction": {name: name for name in DIRECTIONS},
        "provider": {
            name: name for name in (*PROVIDERS[size], *getattr(metafunc.module, "PEERS", ()))
        },
    }
    for name, values in choices.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values.values(), ids=values.keys())


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Case, str, str], None]:
    """measure(case, provider, direction): the gate, then the clock."""

    def run(case: Case, provider: str, direction: str) -> None:
        if provider == "cpp" and _library.MISSING:
            pytest.skip(f"cpp: {_library.MISSING}")
        function = case.bind(provider)
        backward = direction == "forward+backward"
        if backward and not case.differentiable:
            pytest.skip(f"{case.op} has no gradient")
        try:
            check_op(
                function,
                case.bind("torch"),
                case.inputs,
                differentiable=case.differentiable if backward else (),
                scales=case.scales,
            )
        except AssertionError as error:
            if provider in case.peers:
                pytest.skip(f"{provider} fails the tolerance rule here and gets no number: {error}")
            raise
        benchmark.group = f"{case.op} {direction} {_describe(case)}"
        benchmark.extra_info.update(
            op=case.op,
            direction=direction,
            shape=_describe(case),
            provider=provider,
            provider_version=version(provider),
            bytes_moved=case.bytes_moved.get(direction),
            flops=case.flops.get(direction),
            correct=True,
        )
        benchmark(_step(function, case, backward))

    return run


def _step(function: Callable[..., Any], case: Case, backward: bool) -> Callable[[], Any]:
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(**case.inputs)

        return forward
    leaves = [case.inputs[name].detach().requires_grad_() for name in case.differentiable]
    inputs = {**case.inputs, **dict(zip(case.differentiable, leaves, strict=True))}

    def first(outputs: Any) -> torch.Tensor:
        return outputs[0] if isinstance(outputs, tuple) else outputs

    upstream = torch.randn_like(first(function(**inputs)).detach())

    def forward_and_backward() -> Any:
        return torch.autograd.grad(first(function(**inputs)), leaves, upstream)

    return forward_and_backward


def _describe(case: Case) -> str:
    """Shape and dtype of the op's first argument."""
    tensor = next(value for value in case.inputs.values() if isinstance(value, torch.Tensor))
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


def read_bandwidth_gbps(megabytes: int = 512) -> float:
    """Of this machine's memory with torch's threads: the best of five sums over a large buffer."""
    buffer = torch.ones(megabytes * 1024 * 1024 // 4)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    return buffer.nbytes / min(seconds) / 1e9


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["lvrpo"] = info.environment()
    machine_info["read_bandwidth_gbps"] = read_bandwidth_gbps()


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict) -> None:
    ceiling = output_json["machine_info"]["read_bandwidth_gbps"] * 1e9
    output_json["rows"] = rows = []
    for result in output_json["benchmarks"]:
        facts, seconds = result["extra_info"], result["stats"]["median"]
        if "provider" not in facts:
            continue
        moved = facts["bytes_moved"]
        rows.append(
            {
                **facts,
                "wall_ms": seconds * 1e3,
                "fraction_of_ceiling": moved / seconds / ceiling if moved else None,
            }
        )


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many times as fast as the torch backend each provider was, by its fastest round.

    The fastest round is what others on the machine disturb least; files hold fastest and quartiles.
    """
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for result in getattr(session, "benchmarks", []):
        if "provider" in result.extra_info and result.stats.data:
            groups[result.group][result.extra_info["provider"]] = result.stats.min
    if not groups:
        return
    terminalreporter.section("times as fast as backend torch")
    width = max(map(len, groups))
    for group, fastest in groups.items():
        base = fastest.get("torch")
        for provider, seconds in fastest.items():
            if base is not None and provider != "torch":
                ratio = f"{base * 1e3:9.3f} ms -> {seconds * 1e3:9.3f} ms  {base / seconds:6.2f}x"
                terminalreporter.write_line(f"{group:{width}}  {provider:13} {ratio}")
