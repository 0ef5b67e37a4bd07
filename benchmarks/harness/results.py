"""What is written: rows under a header, as a file and as a table."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.providers import DEVICE

from lvrpo import info

Row = Mapping[str, Any]
FOLDER = Path(__file__).parent / "results"
#: Of every row, in this order; None where a fact does not apply.
FIELDS = (
    *("op", "direction", "shape", "dtype", "provider", "provider_version"),
    *("device_ms", "wall_ms", "host_ms"),
    *("quartile_low_ms", "quartile_high_ms", "min_ms", "first_call_ms"),
    *("rounds", "peak_bytes", "result_bytes", "bytes_moved", "flops", "fraction_of_ceiling"),
    *("correct", "precision", "why_no_number"),
)


def header(ceilings: Mapping[str, float]) -> dict[str, Any]:
    """What every number of a file must be read with."""
    commit = info.commit() or ""
    facts = info.environment()
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else facts["cpu"],
        "driver": _driver(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": facts["python"],
        "commit": commit.removesuffix("-dirty") or None,
        "dirty": commit.endswith("-dirty") if commit else None,
        "ceilings": dict(ceilings),
    }


def why_not_publishable() -> str:
    """The reason that results of this checkout may not be published, or ""."""
    commit = info.commit()
    if commit is None:
        return "lvrpo does not run from a git checkout, so that the results have no commit"
    if commit.endswith("-dirty"):
        return "the checkout has uncommitted changes, so that the results have no commit"
    return ""


def write(folder: Path, head: Mapping[str, Any], rows: Iterable[Row]) -> Path:
    """<folder>/<device>/<date>-<commit>.json, added to if it is there."""
    device = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = folder / device / f"{date}-{head['commit'][:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    merged: dict[tuple[Any, ...], Row] = {}
    if path.exists():
        merged = {key(row): row for row in json.loads(path.read_text("utf-8"))["rows"]}
    merged |= {key(row): row for row in rows}
    text = json.dumps({"header": head, "rows": list(merged.values())}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def key(row: Row) -> tuple[Any, ...]:
    """What tells one measurement from another."""
    return tuple(row[name] for name in FIELDS[:5])


def title(row: Row) -> str:
    return " ".join(str(row[name]) for name in FIELDS[:4] if row[name])


def table(rows: Sequence[Row]) -> list[str]:
    """A line per row, under a line per group; ratios are to provider "torch" of the group.

    Who has a number nowhere is named once, at the end.
    """
    lines: list[str] = []
    absent = reasons(rows)
    width = max([14, *(len(row["provider"]) for row in rows)])
    for name, members in grouped(rows, title).items():
        base = next((published(r) for r in members if r["provider"] == "torch"), None)
        lines += ["", name]
        for row in members:
            if row["provider"] not in absent:
                line = f"  {row['provider']:{width}} {_line(row, base)}"
                lines.append(line + _backward(row, rows))
    lines += [""] * bool(absent)
    return lines + [f"NO NUMBER for {name}: {reason}" for name, reason in absent.items()]


def reasons(rows: Sequence[Row]) -> dict[str, str]:
    """Why, for every provider that has no number in any row."""
    return {
        name: "; ".join(dict.fromkeys(str(row["why_no_number"]) for row in found))
        for name, found in grouped(rows, lambda row: row["provider"]).items()
        if all(published(row) is None for row in found)
    }


def grouped(rows: Iterable[Row], by: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def published(row: Row) -> float | None:
    """Milliseconds: on the device where there is one."""
    return row["wall_ms"] if row["device_ms"] is None else row["device_ms"]


def tflop_per_s(row: Row) -> float | None:
    ms = published(row)
    return row["flops"] / ms / 1e9 if ms and row["flops"] else None


def _backward(row: Row, rows: Sequence[Row]) -> str:
    """The backward by itself: what forward and backward take beyond the forward of this run."""
    if row["direction"] != "forward+backward" or not tflop_per_s(row):
        return ""
    wanted = key({**row, "direction": "forward"})
    forward = next((found for found in rows if key(found) == wanted and published(found)), None)
    if forward is None or (ms := published(row) - published(forward)) <= 0:
        return ""
    rate = (row["flops"] - forward["flops"]) / ms / 1e9
    return f"  backward {ms:.3f} ms, {rate:.3g} TFLOP/s"


def _line(row: Row, base: float | None) -> str:
    ms = published(row)
    if ms is None:
        return f"NO NUMBER: {row['why_no_number']}"
    spread = f"[{row['quartile_low_ms']:.3f}, {row['quartile_high_ms']:.3f}]"
    parts = [f"{ms:10.3f} ms {spread:22}"]
    parts.append(f"{base / ms:7.2f}x" if base else " " * 8)
    peak, fraction = row["peak_bytes"], row["fraction_of_ceiling"]
    parts.append("            " if peak is None else f"{peak / 2**20:8.1f} MiB")
    parts.append("     " if fraction is None else f"{fraction:5.0%}")
    if rate := tflop_per_s(row):
        parts.append(f"{rate:8.3g} TFLOP/s")
    if row["host_ms"]:
        parts.append(f"  host {row['host_ms']:.3f} ms")
    if (row["first_call_ms"] or 0) > max(1e3, 20 * ms):  # a compiler's
        parts.append(f"  first call {row['first_call_ms'] / 1e3:.1f} s")
    if not row["correct"]:
        parts.append(f"  NOT CORRECT: {row['why_no_number']}")
    elif row["precision"] not in (None, "float32"):
        parts.append(f"  as precise as plain {row['precision']}")
    return " ".join(parts).rstrip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if DEVICE != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0]
