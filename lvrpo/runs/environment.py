"""environment.json: what a run was made with, so that its numbers can be made again."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from lvrpo import info
from lvrpo.runs.files import write_atomically

ENVIRONMENT = "environment.json"
#: Beside lvrpo, Python and torch.
PACKAGES = ("numpy", "scikit-learn", "triton")


def environment(**facts: Any) -> dict[str, Any]:
    """Where and when a run began, with `lvrpo.info.environment`; never fails.

    Args:
        facts: whatever else decides the numbers: `seed`, `device`, `judge_accuracy`, ...

    Returns:
        "started", "command", "versions", "cores" that this process may use, what
        `lvrpo.info.environment` has beside versions, and the facts.
    """
    known = info.environment()
    versions = {name: known.pop(name) for name in ("lvrpo", "python", "torch")}
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # As it can be typed again: `python -m lvrpo` is `lvrpo`.
        "command": " ".join(
            [Path(sys.argv[0]).name.replace("__main__.py", "lvrpo"), *sys.argv[1:]]
        ),
        "versions": versions | _versions(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        **known,
        **facts,
    }


def write_environment(run_dir: str | Path, **facts: Any) -> Path:
    """Write `environment(**facts)` to the run directory; returns the file's path."""
    path = Path(run_dir) / ENVIRONMENT
    write_atomically(path, json.dumps(environment(**facts), indent=2).encode() + b"\n")
    return path


def read_environment(run_dir: str | Path) -> dict[str, Any]:
    """What `write_environment` wrote; {} when it did not."""
    path = Path(run_dir) / ENVIRONMENT
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
