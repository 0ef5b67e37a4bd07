"""One self-contained HTML page about a run: what changed, by how much, and what to look at.

`write_report` loads the run's logs, and each section below turns a part of them into plain values
that page.html.jinja lays out. A part that the run lacks is said on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from lvrpo.intervals import wilson_interval
from lvrpo.report import charts
from lvrpo.report.drawing import duration
from lvrpo.report.html import data_uri, figure, page_environment
from lvrpo.report.summary import (
    Comparison,
    Run,
    collect_alarms,
    compare_rewards,
    compare_scores,
    in_phase,
    load_run,
    pair_gallery,
    task_name,
)
from lvrpo.runs.files import write_atomically
from lvrpo.runs.gallery import to_png
from lvrpo.runs.log import PHASES
from lvrpo.runs.scores import eval_rewards, eval_scores

GALLERY_LIMIT = 24  # pairs of one task on the page; the folder keeps all


def write_report(
    run_dir: str | Path, *, compare: Sequence[str | Path] = (), output: str | Path | None = None
) -> Path:
    """Write the page, and its figures as PNGs into a folder of its name; returns the page's path.

    Args:
        run_dir: a run directory, finished or not; only read where `output` lies elsewhere.
        compare: further runs, such as other seeds or the control, for a table side by side.
        output: the page; None for <run_dir>/report.html, whose figures are <run_dir>/report/*.png.

    Raises:
        ValueError: one of them is not a run directory, has no rows yet, or has a damaged log.
    """
    run = load_run(run_dir)
    others = [load_run(other) for other in compare]
    path = Path(output) if output is not None else run.path / "report.html"
    folder = path.with_suffix("")
    if folder == path:
        raise ValueError(f"the page is {path}, expected a name with an ending, such as {path}.html")
    folder.mkdir(exist_ok=True)
    time = charts.time_chart(run.metrics)
    page = _template().render(
        run=run,
        facts=_facts(run),
        alarms=collect_alarms(run.metrics),
        **_results(run, folder),
        **_judge(run),
        gallery=pair_gallery(run),
        gallery_limit=GALLERY_LIMIT,
        training=[
            figure(chart, folder) for chart in charts.training_charts(run.metrics, run.evals)
        ],
        time_figure=figure(time, folder) if time else None,
        **_side_by_side([run, *others] if others else []),
    )
    write_atomically(path, page.encode())
    return path


def _template() -> jinja2.Template:
    environment = page_environment()
    environment.filters |= {
        "picture": lambda item: data_uri(to_png(item)),
        "task_name": task_name,
    }
    environment.globals["wilson"] = lambda score: wilson_interval(score.successes, score.total)
    return environment.get_template("page.html.jinja")


def _results(run: Run, folder: Path) -> dict[str, Any]:
    before, after = run.before_after()
    comparisons = compare_scores(before, after)
    tasks: dict[str, list[Comparison]] = {}
    for each in comparisons:
        tasks.setdefault(each.after.task, []).append(each)
    return {
        "before": before,
        "after": after,
        "tasks": tasks,
        "rewards": compare_rewards(before, after),
        "only_rewards": eval_rewards(before or {}),
        "headlines": [each for each in comparisons if not each.after.kind],
        "only": [score for score in eval_scores(before or {}) if score.total],
        "results_figure": _results_figure(comparisons, folder),
    }


def _judge(run: Run) -> dict[str, Any]:
    """The accuracy of the pictures' judge, and its interval when the count is known."""
    accuracy, total = (run.environment.get(f"judge_{name}") for name in ("accuracy", "total"))
    interval = wilson_interval(accuracy * total, total) if accuracy is not None and total else None
    # Pictures of the user's own have no judge of ours.
    judged = any("gold" in key or "strict" in key for row in run.evals for key in row)
    return {
        "judge": accuracy,
        "judge_total": total,
        "judge_interval": interval,
        "judged": judged or not run.evals,
    }


def _side_by_side(runs: Sequence[Run]) -> dict[str, Any]:
    scores = [
        {c.after.name: c for c in compare_scores(*run.before_after()) if not c.after.kind}
        for run in runs
    ]
    heads = {
        name: f"{task_name(each.after.task)}: {each.title}"
        for run_scores in scores
        for name, each in run_scores.items()
    }
    return {"runs": list(zip(runs, scores, strict=True)), "run_scores": heads}


def _results_figure(comparisons: Sequence[Comparison], folder: Path) -> dict[str, str] | None:
    """Before and after of the headline scores, and of each kind's main one."""
    main: dict[tuple[str, str], Comparison] = {}
    for each in comparisons:
        main.setdefault((each.after.task, each.after.kind or each.after.measure), each)
    if not main:
        return None
    chosen = list(main.values())
    names = [f"{task_name(c.after.task)}: {c.after.kind or c.title}" for c in chosen]
    chart = charts.change_chart([c.before for c in chosen], [c.after for c in chosen], names)
    return figure(chart, folder)


def _facts(run: Run) -> dict[str, str]:
    """The run's identity in a few short words each; what is unknown is left out."""
    known = run.environment
    steps = {phase: len(in_phase(run.metrics, phase)) for phase in PHASES}
    commit = known.get("commit")
    if commit:
        commit = commit.replace("-dirty", " and local changes")
    facts = {
        "Seed": run.seed,
        "Steps": f"{steps['warm_start'] + steps['supervised']} supervised and "
        f"{steps['grpo']} GRPO steps",
        "Time in steps": duration(run.seconds) if run.seconds else None,
        "Started": known.get("started"),
        "Device": ", ".join(known[key] for key in ("device", "dtype") if key in known) or None,
        "CPU": f"{known['cpu']}, {known.get('threads')} threads" if known.get("cpu") else None,
        "Commit": commit,
        "Versions": ", ".join(f"{k} {v}" for k, v in known.get("versions", {}).items()) or None,
        "Command": known.get("command"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}
