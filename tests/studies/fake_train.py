"""Stands for `lvrpo train` in the tests of a study: makes steps, in no time, and tells of itself.

Files beside the run directories decide: `hold` makes every step wait, `fail-<run>` ends that run.
Every step that is made is a line of `made`, every moment's number of processes one of `active`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

STEPS = 3


def main() -> None:
    words = sys.argv[1:]
    assert words[0] == "train"
    assert "--no-report" in words
    run = Path(words[1])
    study, name = run.parents[1], f"{run.parent.name}/{run.name}"
    with (study / "began").open("a") as began:
        began.write(json.dumps([name, words]) + "\n")
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(f"[run]\nsteps = {STEPS}\n[warm_start]\nsteps = 0\n")
    log = run / "metrics.jsonl"
    log.touch()
    for step in range(len(log.read_text().splitlines()) + 1, STEPS + 1):
        while (study / "hold").exists():
            time.sleep(0.01)
        if (study / f"fail-{run.parent.name}-{run.name}").exists():
            print("some words\nlvrpo: the reason\n", flush=True)
            sys.exit(2)
        with (study / "made").open("a") as made:
            made.write(f"{name} {step}\n")
        with log.open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    with (run / "evals.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS, "label": "after"}) + "\n")


main()
