"""One self-contained HTML page about a run: what changed, by how much, and what to look at.

`write_report` loads the run's logs, and each section below turns a part of them into plain values
that page.html.jinja lays out. A part that the run lacks is said on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from lvrpo.data.example import SKILLS
from lvrpo.intervals import Change, wilson_interval
from lvrpo.report import charts
from lvrpo.report.comparisons import Comparison, compare, compare_rewards, rate_of, verdict_of
from lvrpo.report.drawing import duration
from lvrpo.report.findings import findings, hacking_alarms, limits
from lvrpo.report.html import data_uri, figure, page_environment
from lvrpo.report.summary import (
    AFTER,
    BEFORE,
    Run,
    collect_alarms,
    in_phase,
    load_run,
    pair_gallery,
    task_name,
)
from lvrpo.runs.files import write_atomically
from lvrpo.runs.gallery import to_png
from lvrpo.runs.log import PHASES
from lvrpo.runs.results import Pooled, frontier, pooled_change
from lvrpo.runs.scores import eval_rewards, eval_scores
from lvrpo.trainer.journal import GalleryItem

GALLERY_LIMIT = 24  # pairs of one task on the page; the folder keeps all
SAMPLED_STEPS = 6  # on the page, from the first to the last; likewise


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
        alarms=collect_alarms(run.metrics) + hacking_alarms(run),
        **_results(run, others, folder),
        **_judge(run),
        gallery=pair_gallery(run),
        gallery_limit=GALLERY_LIMIT,
        **_samples(run),
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
        "picture": lambda item: data_uri(to_png(item.image, item.uid)),
        "shown": lambda item: data_uri(to_png(_shown(item), item.uid)),
        "task_name": task_name,
    }
    environment.tests["shown"] = lambda item: _shown(item) is not None
    environment.globals |= {"rate_of": rate_of, "verdict_of": verdict_of}
    return environment.get_template("page.html.jinja")


def _shown(item: GalleryItem) -> Any:
    """The picture that a prompt has, if any."""
    return item.image if item.task == "understand" else item.source


def _samples(run: Run) -> dict[str, Any]:
    """Some of the steps whose samples were kept, by prompt."""
    steps = list(run.samples)
    count = min(SAMPLED_STEPS, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    prompts = {
        step: [list(alike) for _, alike in groupby(run.samples[step], lambda item: item.uid)]
        for step in chosen
    }
    return {"samples": prompts, "samples_left_out": len(steps) - count}


def _results(run: Run, others: Sequence[Run], folder: Path) -> dict[str, Any]:
    before, after = run.before_after()
    comparisons = compare(run)
    tasks: dict[str, list[Comparison]] = {}
    for each in comparisons:
        tasks.setdefault(each.task, []).append(each)
    return {
        "before": before,
        "after": after,
        "tasks": tasks,
        "rewards": compare_rewards(run),
        "only_rewards": eval_rewards(before or {}),
        "headlines": [each for each in comparisons if each.headline],
        "only": [score for score in eval_scores(before or {}) if score.total],
        "results_figure": _results_figure(comparisons, folder),
        "frontiers": _frontiers(run, folder),
        "findings": findings(run),
        "limits": limits(run, others, comparisons),
    }


def _frontiers(run: Run, folder: Path) -> list[dict[str, str]]:
    found = []
    for skill in SKILLS:
        before, after = (frontier(run.measurements, label, skill) for label in (BEFORE, AFTER))
        if len(before) > 1 and len(after) > 1:
            found.append(figure(charts.frontier_chart(skill, before, after), folder))
    return found


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
    """Each run's main scores, then the means of those that differ in their seed alone."""
    rows = [(run, {each.name: each for each in compare(run) if each.main}) for run in runs]
    heads = {
        name: f"{task_name(each.task)}: {each.title}"
        for _, scores in rows
        for name, each in scores.items()
    }
    signals: dict[str, list[dict[str, Comparison]]] = {}
    for run, scores in rows:
        signals.setdefault(run.signal, []).append(scores)
    means = {
        (signal, len(alike)): {
            name: pooled
            for name in heads
            if (pooled := _pooled([scores[name] for scores in alike if name in scores]))
        }
        for signal, alike in signals.items()
        if len(alike) > 1
    }
    return {"runs": rows, "run_scores": heads, "run_means": means}


def _pooled(alike: Sequence[Comparison]) -> Pooled[Change] | None:
    prompts = [each.prompts for each in alike if each.prompts is not None]
    return pooled_change(prompts) if len(prompts) > 1 else None


def _results_figure(comparisons: Sequence[Comparison], folder: Path) -> dict[str, str] | None:
    """Before and after of the main scores, and of each kind's first one."""
    shown: dict[tuple[str, str], Comparison] = {}
    for each in comparisons:
        if each.main or each.kind:
            shown.setdefault((each.task, each.kind or each.measure), each)
    if not shown:
        return None
    chosen = list(shown.values())
    chart = charts.change_chart(
        [each.before for each in chosen],
        [each.after for each in chosen],
        [f"{task_name(each.task)}: {each.kind or each.title}" for each in chosen],
        [each.task for each in chosen],
    )
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
