"""The published criticism of the paper's sum, that r_ins drowns r_sem, put to the test."""

from __future__ import annotations

from lvrpo.intervals import Interval
from lvrpo.studies.outcomes import ArmOutcome

#: Of r_sem in a sum with a binary reward that is right with probability p, if its spread in a group
#: is s = 0.02, as that of a cosine of SigLIP 2: s² / (s² + p (1 - p)) for p from 0.5 to 0.02.
PREDICTED = Interval(0.0016, 0.02)


def verdict_on_prediction(arm: ArmOutcome) -> str | None:
    """Whether r_sem has the share of the advantage variance that was predicted for the paper's sum.

    None where the arm does not add several rewards up as the paper does.
    """
    share = arm.shares.get(("generate", "r_sem"))
    drawing = [reward for skill, reward in arm.shares if skill == "generate"]
    if arm.advantage != "paper" or share is None or len(drawing) < 2:
        return None
    told = f"{arm.arm.title}: r_sem has {_percent(share.value)} of the variance"
    predicted = f"{_percent(PREDICTED.low)} to {_percent(PREDICTED.high)}"
    if share.interval is None:
        return f"{told} in one seed, which is too few to judge the prediction of {predicted}."
    low, high = share.interval
    told += f" ({_percent(low)} to {_percent(high)} over {len(share.runs)} seeds)"
    return f"{told}; the prediction of {predicted} is {_verdict(share.interval)}."


def _verdict(interval: Interval) -> str:
    if PREDICTED.low <= interval.low and interval.high <= PREDICTED.high:
        return "confirmed"
    if not interval.overlaps(PREDICTED):
        return f"refuted: it has {'more' if interval.low > PREDICTED.high else 'less'}"
    return "neither confirmed nor refuted: the interval reaches beyond it"


def _percent(value: float) -> str:
    text = f"{100 * value:.0f}" if abs(value) >= 0.1 else f"{100 * value:.2g}"
    return f"{text} %"
