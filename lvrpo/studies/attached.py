"""`python -m lvrpo.studies.attached ARGUMENTS`: the lvrpo command, tied to who started it.

Standard input is a pipe that nobody writes to. The kernel closes it however its other end ends, by
`kill -9` too, and then this process and all that it started get SIGTERM: a run saves its last step.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def main() -> None:
    """Run the command."""
    threading.Thread(target=_end_with_the_other_end, daemon=True).start()
    sys.argv[0] = "lvrpo"
    runpy.run_module("lvrpo", run_name="__main__", alter_sys=True)


def _end_with_the_other_end() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)  # the group is ours alone: see `start_new_session` in runner.py


if __name__ == "__main__":
    main()
