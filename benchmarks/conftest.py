"""Measures an op for every provider, side by side, after each result has passed the tolerance rule.

    pytest benchmarks --benchmark-only                small shapes, seconds; what CI runs
    pytest benchmarks --benchmark-only --size=full    shapes of real models, minutes
    pytest benchmarks --benchmark-only --size=gpu     shapes for a data-centre GPU
    benchmarks/gpu.sh                                 build, tests and these, on such a machine

One test is one op at one shape. Its providers take turns, round after round; the table at the end
has the median and the quartiles of each. `pip install -r benchmarks/requirements.txt` adds peers.
--results writes rows and header under benchmarks/results, for a clean checkout only;
--benchmark-json=FILE writes them for any. --time-wrong times providers that fail the rule, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import results
from harness.measure import Gate, Race, bandwidth, ceilings, peak_bytes, result_bytes, step
from harness.providers import DEVICE, Case

from lvrpo import info

DIRECTIONS = ("forward", "forward+backward")
#: For the rounds of one group.
SECONDS = {"small": 0.3, "full": 10.0, "gpu": 2.0}
ROWS = pytest.StashKey[list[dict[str, Any]]]()
CEILINGS = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=list(SECONDS), default="small", help="shapes of the benchmarks"
    )
    parser.addoption(
        "--results",
        nargs="?",
        type=Path,
        const=results.FOLDER,
        metavar="DIR",
        help="write DIR/<device>/<date>-<commit>.json (default DIR: benchmarks/results)",
    )
    parser.addoption(
        "--time-wrong",
        action="store_true",
        help="time providers that fail the tolerance rule, too, as correct: false",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--results") and (reason := results.why_not_publishable()):
        raise pytest.UsageError(f"--results: {reason}")
    config.stash[ROWS] = []
    # A benchmark of pytest-benchmark is here a round of all providers; our table has each.
    config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`shape` and `direction` as parameters; a module names its SHAPES."""
    shapes = getattr(metafunc.module, "SHAPES", {})
    size = metafunc.config.getoption("--size")
    choices = {
        "shape": dict(shapes.get(size) or shapes.get("full", {})),
        "direction": {name: name for name in DIRECTIONS},
    }
    for name, values in choices.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values.values(), ids=values.keys())


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Race]:
    """race(name, functions, before=...): all rounds of the functions, each timed on its own."""
    config = request.config

    def run(name: str, functions: Mapping[str, Callable[[], Any]], **options: Any) -> Race:
        torch.set_default_device(None)  # which is a layer under every call of torch
        seconds = SECONDS[config.getoption("--size")]
        found = Race(functions, **{"seconds": seconds} | options)
        benchmark.group = name
        benchmark.pedantic(found.round, rounds=found.rounds)
        return found

    return run


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Callable[..., None]:
    """publish(**fields): one row of the results; fields that are not given are None."""
    config = request.config

    def add(**facts: Any) -> None:
        row = dict.fromkeys(results.FIELDS) | facts
        ms = results.published(row)
        if ms and (row["bytes_moved"] or row["flops"]):
            found = _ceilings(config)
            ideal = (row["bytes_moved"] or 0) / bandwidth(found)
            rate = found.get(f"{row['dtype']}_tflop_per_s")
            if row["flops"] and rate:
                ideal = max(ideal, row["flops"] / rate / 1e12)
            row["fraction_of_ceiling"] = ideal / ms * 1e3
        config.stash[ROWS].append(row)

    return add


@pytest.fixture
def measure(request: pytest.FixtureRequest, race: Any, publish: Any) -> Callable[[Case, str], None]:
    """measure(case, direction): the gate, the clock and the memory of every provider."""
    size = request.config.getoption("--size")
    time_wrong = request.config.getoption("--time-wrong")

    def run(case: Case, direction: str) -> None:
        if direction == "forward+backward" and not case.differentiable:
            pytest.skip(f"{case.op} has no gradient")
        torch.set_default_device(None)
        gate = Gate(case, direction)
        steps, verdicts = {}, {}
        for provider, reason in case.providers(size).items():
            precision = None
            if not reason:
                precision, reason, function = _examine(case, provider, gate)
                if precision is None and provider not in case.peers and "torch" not in provider:
                    raise AssertionError(f"{case.op}, backend {provider}: {reason}")
                if function and (precision or time_wrong):
                    steps[provider] = step(function, case, direction)
            verdicts[provider] = (precision, reason)
        del gate
        dtype = str(case.dtype).removeprefix("torch.")
        # As many rounds as there are turns left, so that none is met twice.
        options = {"most": len(case.turns) - Race.WARM_UP} if case.turns else {}
        found = race(f"{case.op} {direction} {case.described} {dtype}", steps, **options)
        for provider, (precision, reason) in verdicts.items():
            timed = provider in steps
            publish(
                op=case.op,
                direction=direction,
                shape=case.described,
                dtype=dtype,
                provider=provider,
                provider_version=case.version(provider),
                bytes_moved=case.bytes_moved.get(direction),
                flops=case.flops.get(direction),
                correct=precision is not None if timed else None,
                precision=precision,
                why_no_number=reason or None,
                **({"rounds": found.rounds, **found.times[provider].facts()} if timed else {}),
                peak_bytes=peak_bytes(steps[provider]) if timed else None,
                # Part of the peak: what no implementation can do without, such as a gradient.
                result_bytes=result_bytes(steps[provider]) if timed else None,
            )

    return run


def _examine(case: Case, provider: str, gate: Gate) -> tuple[str | None, str, Any]:
    """Its precision or the reason that it has none, and its function if it runs at all."""
    try:
        function = case.bind(provider)
        precision, wrong = gate.grade(function)
    except Exception as error:
        if provider not in case.peers:
            raise
        # Whatever somebody else's code raises here is a sentence in the table.
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", None
    return precision, f"outside the tolerance rule: {wrong}" if wrong else "", function


def _ceilings(config: pytest.Config) -> dict[str, float]:
    if CEILINGS not in config.stash:
        config.stash[CEILINGS] = ceilings()
    return config.stash[CEILINGS]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["lvrpo"] = info.environment()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["header"] = results.header(_ceilings(config))
    output_json["rows"] = config.stash[ROWS]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    device = results.header(_ceilings(config))["device"]
    terminalreporter.section("median of the rounds [quartiles], times as fast as torch, memory")
    # Above 100 % where torch's matrix product is not the best that the machine can do.
    terminalreporter.write_line(
        f"{device}: {_describe(_ceilings(config))}; per cent of what torch reaches there"
    )
    for line in results.table(rows):
        terminalreporter.write_line(line)
    if folder := config.getoption("--results"):
        path = results.write(folder, results.header(_ceilings(config)), rows)
        terminalreporter.write_line(f"\nwritten: {path}")


def _describe(found: Mapping[str, float]) -> str:
    names = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s"}
    parts = []
    for name, value in found.items():
        what, _, unit = name.partition("_")
        parts.append(f"{what} {value:.3g} {names[unit]}")
    return ", ".join(parts)
