"""How many supervised steps cost what the policy phase of another run did."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.log import read_metrics
from lvrpo.trainer.config import TrainConfig


def equal_compute_steps(origin: Path, config: TrainConfig) -> tuple[int, str]:
    """Reckon by the clock of the run itself: rollouts, rewards and updates, without evaluations.

    What a supervised step costs is that of the warm start; without one there is a step for each.

    Args:
        origin: a run that has finished its policy phase.
        config: of it.

    Returns:
        The steps, one at least, and a line that says how they were found.

    Raises:
        RunDirectoryError: the run has not finished, or its policy phase has no steps.
    """
    rows = read_metrics(origin)
    supervised, policy = (
        [row["time/total"] for row in rows if row["phase"] == phase]
        for phase in ("warm_start", "grpo")
    )
    last = rows[-1]["step"] if rows else 0
    wanted = config.warm_start.steps + config.run.steps
    if last < wanted:
        raise RunDirectoryError(
            f"{origin} is after step {last} of {wanted}, so the compute of its policy phase is not "
            f"known: finish it by lvrpo train {origin}, or give --steps"
        )
    if not policy:
        raise RunDirectoryError(
            f"{origin} has no policy steps, whose compute a supervised run could match: give "
            "--steps"
        )
    if not supervised:
        return len(policy), (
            f"run.steps is {len(policy)}, as in {origin}: it has no warm start by which to tell "
            "how many supervised steps cost as much"
        )
    each = median(supervised)
    steps = max(1, round(sum(policy) / each))
    return steps, (
        f"run.steps is {steps}: {sum(policy):.0f} s, the {len(policy)} policy steps of {origin}, "
        f"at {each:.2g} s for a supervised step"
    )
