"""A results file as a Markdown table, and as a figure with --figure FILE (which needs matplotlib).

python benchmarks/plot.py benchmarks/results/<device>/<date>-<commit>.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.results import grouped, published, reasons, tflop_per_s, title

from lvrpo import backends

#: Backends with kernels; the references are what they are compared with.
OURS = {backend.name for backend in backends.ALL if backend.device}


def markdown(content: Mapping[str, Any]) -> str:
    """One table; the device and the versions under it."""
    lines = [
        "| op | provider | ms | TFLOP/s | peak MiB | of the ceiling | precision |",
        "|---|---|---|---|---|---|---|",
    ]
    absent = reasons(content["rows"])
    rows = [row for row in content["rows"] if row["provider"] not in absent]
    for name, members in grouped(rows, title).items():
        for row in sorted(members, key=lambda row: published(row) or float("inf")):
            ms, peak, part = published(row), row["peak_bytes"], row["fraction_of_ceiling"]
            cells = (
                name,
                f"{row['provider']} {row['provider_version'] or ''}".strip(),
                "-" if ms is None else f"{ms:.3g}",
                "-" if (rate := tflop_per_s(row)) is None else f"{rate:.3g}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
                "-" if part is None else f"{part:.0%}",
                row["why_no_number"] or row["precision"] or "-",
            )
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    head = content["header"]
    lines += ["", ", ".join(f"{k} {head[k]}" for k in ("device", "torch", "python", "commit"))]
    lines += [f"No number for {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def figure(content: Mapping[str, Any], path: Path) -> None:
    """A row of bars per group, milliseconds."""
    import matplotlib.pyplot as plt

    groups = {
        name: [row for row in rows if published(row) is not None]
        for name, rows in grouped(content["rows"], title).items()
    }
    groups = {name: rows for name, rows in groups.items() if rows}
    heights = [len(rows) for rows in groups.values()]
    drawing, axes = plt.subplots(
        len(groups),
        figsize=(9, sum(0.28 * height + 0.75 for height in heights)),
        height_ratios=[height + 1 for height in heights],
        squeeze=False,
    )
    for (name, rows), axis in zip(groups.items(), axes[:, 0], strict=True):
        names = [row["provider"] for row in rows]
        ours = [name in OURS for name in names]
        low = [max((published(row) or 0) - row["quartile_low_ms"], 0) for row in rows]
        high = [max(row["quartile_high_ms"] - (published(row) or 0), 0) for row in rows]
        axis.barh(
            names,
            [published(row) for row in rows],
            xerr=[low, high],
            color=["#2f6db5" if mine else "#b9bec6" for mine in ours],
            ecolor="#444444",
        )
        axis.invert_yaxis()
        axis.set_title(name, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"ms, median and quartiles, {content['header']['device']}", fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--figure", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    content = json.loads(arguments.file.read_text(encoding="utf-8"))
    print(markdown(content))
    if arguments.figure:
        figure(content, arguments.figure)


if __name__ == "__main__":
    main()
