"""A short run in a process of its own; prints the most bytes that torch had allocated in it.

Of the overrides it is given, `lvrpo.runs.plan` makes its forecast, too.
"""

from __future__ import annotations

import io
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from lvrpo.runs.journal import RunJournal
from lvrpo.runs.opening import open_run
from lvrpo.runs.progress import ProgressView
from lvrpo.runs.signals import Signals
from lvrpo.trainer.loop import train


def peak_of_run(directory: Path, overrides: list[str]) -> int:
    """Bytes; what the frozen parts take is fitted before, and not counted."""
    view = ProgressView(console=Console(file=io.StringIO()))
    with open_run(directory, None, overrides) as run:
        parts = run.setup.frozen_parts(directory)
        with (
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured,
            Signals() as signals,
            RunJournal(directory, run.config, parts.fingerprint, view) as journal,
        ):
            train(run.config, run.setup.task(parts), journal, signals)
    events = measured.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(peak_of_run(Path(scratch) / "run", sys.argv[1:]))
