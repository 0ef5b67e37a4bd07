"""The tables of `lvrpo plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

UNITS = ("", "k", "M", "G", "T", "P", "E")


def to_json(found: Mapping[str, Any]) -> str:
    """The same for programs."""
    return json.dumps(found, indent=2)


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `RunPlan.to_dict` tells, a table per question.

    Args:
        found: see there.
        console: to write to; None is standard output.
    """
    console = console or Console(highlight=False)
    parameters, rows, peak = found["parameters"], found["rows"], found["peak"]
    console.print(
        f"{amount(parameters['trained'])} trained parameters, {amount(parameters['frozen'])} "
        f"frozen; {found['ranks']} rank(s). A forecast from formulas, rewards not counted."
    )
    largest = f"{rows['buffers']} buffers, the largest of {rows['largest buffer']:,} rows"
    console.print(f"A step: {rows['rollout']:,} rows sampled, {rows['pass']:,} trained: {largest}")
    activations = found["activations"]
    memory = _table("bytes of a rank", "")
    _add(memory, found["state"], "B")
    memory.add_section()
    _add(memory, {f"rollout: {name}": size for name, size in found["rollout"].items()}, "B")
    memory.add_section()
    _add(memory, {f"update: {name}": size for name, size in found["update"].items()}, "B")
    memory.add_row("update: activations, checkpointed", amount(activations["checkpointed"], "B"))
    memory.add_section()
    _add(memory, {f"peak of the {name}": size for name, size in peak.items()}, "B")
    _add(memory, {f"logits, {name}": size for name, size in found["logits"].items()}, "B")
    console.print(memory)
    seconds = found.get("seconds", {})
    for title, kind, unit in (
        ("FLOPs of a step", "flops", "FLOP"),
        ("bytes received", "wire", "B"),
    ):
        table = _table(title, "", *(["seconds"] if seconds else []))
        for name, count in found[kind].items():
            time = [f"{seconds[kind][name]:.3g}"] if seconds else []
            table.add_row(name, amount(count, unit), *time)
        console.print(table)
    for line in found["notes"]:
        console.print(line, soft_wrap=True, markup=False)


def amount(count: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1.23 GB."""
    for prefix in UNITS:
        if abs(count) < 999.5 or prefix == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}".strip()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=len(columns) > 1)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _add(table: Table, sizes: Mapping[str, int], unit: str) -> None:
    for name, size in sizes.items():
        table.add_row(name, amount(size, unit))
