"""A study in three forms: study.html for people, table.md to copy, results.json for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvrpo.intervals import Change
from lvrpo.report.comparisons import verdict_of
from lvrpo.report.html import figure, page_environment
from lvrpo.runs.files import write_atomically
from lvrpo.runs.results import Pooled, Rate
from lvrpo.studies.charts import change_chart, share_chart
from lvrpo.studies.directory import StudyRun
from lvrpo.studies.outcomes import QUANTITIES, ArmOutcome, Outcome, outcomes_of
from lvrpo.studies.prediction import verdict_on_prediction
from lvrpo.studies.study import Study

FIGURES = (
    ("headlines", "What no decoding improves: greedy answers and low-noise drawings", (0, 1)),
    ("pass", "What sampling could find: pass@8", (2, 3)),
    ("as-trained", "Sampled as in training", (4, 5)),
)


def write_page(directory: Path, study: Study, runs: Sequence[StudyRun], made: int) -> Path:
    """Write study.html with its figures, table.md and results.json; returns the page's path.

    Args:
        directory: of the study.
        study: that it has.
        runs: the finished ones.
        made: how many there should be.

    Raises:
        ValueError: a log is damaged.
    """
    arms = outcomes_of(runs)
    folder = directory / "study"
    folder.mkdir(exist_ok=True)
    charts = [
        change_chart(arms, [QUANTITIES[i] for i in chosen], name, title)
        for name, title, chosen in FIGURES
    ]
    charts += [share_chart(arms, skill) for skill in ("generate", "understand")]
    predictions = [said for said in map(verdict_on_prediction, arms) if said is not None]
    environment = page_environment(Path(__file__).parent)
    environment.filters["verdict"] = verdict_of
    page = environment.get_template("study.html.jinja").render(
        study=study,
        arms=arms,
        quantities=[each for each in QUANTITIES if any(_of(arm, each.key) for arm in arms)],
        of=_of,
        predictions=predictions,
        figures=[figure(chart, folder) for chart in charts if chart is not None],
        finished=len(runs),
        made=made,
    )
    results = {
        "study": study.name,
        "finished": len(runs),
        "runs": made,
        "arms": {arm.arm.name: _arm_row(arm) for arm in arms},
        "predictions": predictions,
    }
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomically(directory / "results.json", text.encode() + b"\n")
    write_atomically(directory / "table.md", _table(arms).encode())
    path = directory / "study.html"
    write_atomically(path, page.encode())
    return path


def _of(arm: ArmOutcome, key: str) -> Outcome | None:
    return next((each for each in arm.outcomes if each.quantity.key == key), None)


def _table(arms: Sequence[ArmOutcome]) -> str:
    """Markdown: a row per arm, a column per quantity, in percent and percentage points."""
    quantities = [each for each in QUANTITIES if any(_of(arm, each.key) for arm in arms)]
    lines = [
        "| | " + " | ".join(each.title for each in quantities) + " |",
        "|---" * (len(quantities) + 1) + "|",
    ]
    if arms:
        before = [_of(arms[0], each.key) for each in quantities]
        cells = [_rate_in_words(each.before.result) if each else "" for each in before]
        lines.append("| " + " | ".join(["warm start", *cells]) + " |")
    for arm in arms:
        found = [_of(arm, each.key) for each in quantities]
        cells = [
            f"{100 * each.after.result.value:.1f} ({_change_in_words(each.change.result)})"
            if each
            else ""
            for each in found
        ]
        lines.append("| " + " | ".join([arm.arm.title, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _rate_in_words(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


def _change_in_words(change: Change) -> str:
    low, high = change.interval
    return f"{100 * change.difference:+.1f}: {100 * low:+.1f} to {100 * high:+.1f}"


def _arm_row(arm: ArmOutcome) -> dict[str, Any]:
    """Ready for JSON."""
    return {
        "title": arm.arm.title,
        "settings": list(arm.arm.settings),
        "seeds": list(arm.seeds),
        "results": {each.quantity.key: _outcome_row(each) for each in arm.outcomes},
        "shares": {
            f"{skill}/{reward}": {
                "value": share.value,
                "interval": list(share.interval) if share.interval else None,
                "seeds": list(share.runs),
            }
            for (skill, reward), share in arm.shares.items()
        },
    }


def _outcome_row(outcome: Outcome) -> dict[str, Any]:
    over_base = outcome.over_base
    return {
        "before": _rate_row(outcome.before),
        "after": _rate_row(outcome.after),
        "change": _change_row(outcome.change),
        "over_base": _change_row(over_base) if over_base is not None else None,
    }


def _rate_row(pooled: Pooled[Rate]) -> dict[str, Any]:
    rate = pooled.result
    return {
        "value": rate.value,
        "interval": [rate.low, rate.high],
        "prompts": rate.prompts,
        "seeds": list(pooled.runs),
    }


def _change_row(pooled: Pooled[Change]) -> dict[str, Any]:
    change = pooled.result
    return {
        "value": change.difference,
        "interval": list(change.interval),
        "apart": change.apart,
        "seeds": list(pooled.runs),
    }
