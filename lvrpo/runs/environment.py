"""environment.json: what a run was made with, so that its numbers can be made again."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from lvrpo import __version__, info
from lvrpo.runs.files import write_atomically

ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "numpy", "scikit-learn", "triton")


def environment(**facts: Any) -> dict[str, Any]:
    """Versions, commit and machine, and the caller's own facts beside them; never fails.

    Args:
        facts: whatever else decides the numbers: `seed`, `judge_accuracy`, `judge_total`, ...

    Returns:
        "started", "command", "versions", "commit" (None outside a checkout, ending in "-dirty" with
        changes on top), "cpu", "cores", "threads", "device", and the facts.
    """
    import torch

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": _versions(),
        "commit": info.commit(),
        "platform": platform.platform(),
        "cpu": info.cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",  # whatever else the machine has: the trainer uses nothing else
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
    versions = {"lvrpo": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
