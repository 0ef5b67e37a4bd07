"""Which figures a report has: from the keys of a run's log to charts.

A chart is left out when the log has none of its keys; a user's own names are read off the keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvrpo.data.example import SKILLS, Skill
from lvrpo.intervals import wilson_interval
from lvrpo.report.drawing import WIDTH, Chart, Line, Panel, Theme, duration, line_chart
from lvrpo.report.summary import in_phase, task_name
from lvrpo.runs.log import Row
from lvrpo.runs.results import FrontierPoint, Rate
from lvrpo.runs.scores import eval_scores
from lvrpo.trainer.measurement import AS_TRAINED, GREEDY, LOW_NOISE

MODALITIES = {"text": "Text tokens", "image": "Image flow steps"}
DIVERSITY: dict[Skill, str] = {
    "understand": "diversity: probability that two answers differ",
    "generate": "diversity: distance of two drawings",
}
_SHORT = {LOW_NOISE: "no noise", "ode": "ode noise 1"}


def training_charts(metrics: Sequence[Row], evals: Sequence[Row]) -> list[Chart]:
    """Every chart that the logs have data for, the most telling first."""
    rows = in_phase(metrics, "grpo")
    wanted = [
        _eval_chart(evals),
        _reward_chart(rows),
        _score_chart(rows),
        _share_chart(rows),
        _constant_chart(rows),
        _kl_chart(rows),
        _ratio_chart(rows),
        _optimiser_chart(rows),
        _supervised_chart("supervised", "Supervised continuation", metrics),
        _supervised_chart("warm_start", "Supervised warm start", metrics),
    ]
    return [chart for chart in wanted if chart]


def _supervised_chart(phase: str, title: str, metrics: Sequence[Row]) -> Chart | None:
    """The losses of a phase that imitates labels."""
    rows = in_phase(metrics, phase)
    headings = {
        "text": "Text: cross-entropy, nats per token",
        "image": "Image: squared error of the velocity",
    }
    panels = [
        Panel(heading, _lines(rows, {f"loss/{modality}": modality}, of=headings))
        for modality, heading in headings.items()
    ]
    reading = "Both should fall and flatten: what imitation cannot teach is left to rewards."
    return line_chart(phase.replace("_", "-"), title, reading, panels)


def _eval_chart(evals: Sequence[Row]) -> Chart | None:
    """The headline scores of every evaluation, when there are more than before and after."""
    if len(evals) < 3:
        return None
    headline = [
        {score.name: score for score in eval_scores(row) if score.total and not score.kind}
        for row in evals
    ]
    panels: dict[str, list[Line]] = {}
    for name in dict.fromkeys(name for scores in headline for name in scores):
        task, measure = name.rsplit("/", 1)
        found = [
            (row["step"], s[name]) for row, s in zip(evals, headline, strict=True) if name in s
        ]
        bounds = np.array([wilson_interval(s.successes, s.total) for _, s in found])
        panels.setdefault(task, []).append(
            Line(
                measure,
                steps=np.array([step for step, _ in found]),
                values=np.array([score.successes / score.total for _, score in found]),
                low=bounds[:, 0],
                high=bounds[:, 1],
                colour=len(panels[task]),
            )
        )
    return line_chart(
        "held-out",
        "Held-out scores during training",
        "Measured on data the training never saw, with 95 % intervals; a score that rises in "
        "training and not here is being memorised or cheated.",
        [Panel(task_name(task), found, percent=True) for task, found in panels.items()],
    )


def time_chart(metrics: Sequence[Row]) -> Chart | None:
    """The mean seconds of every stage of a step after the warm start; None when none was timed."""
    rows = in_phase(metrics, "grpo") or in_phase(metrics, "supervised")
    names = {key for row in rows for key in row if key.count("/") == 1 and key.startswith("time/")}
    means = {key.removeprefix("time/"): _mean(rows, key) for key in names}
    total = means.pop("total", 0.0) or sum(means.values())
    if not total:
        return None
    rest = total - sum(means.values())
    if means and rest > 0.01 * total:
        means["the rest"] = rest
    means = means or {"whole step": total}
    return stage_chart(sorted(means.items(), key=lambda stage: -stage[1]), total)


def change_chart(
    before: Sequence[Rate], after: Sequence[Rate], names: Sequence[str], groups: Sequence[str]
) -> Chart:
    """Every rate before and after with its 95 % interval, one row each.

    Args:
        before: rates of the first evaluation.
        after: the same of the last one, in the same order.
        names: the label of each row.
        groups: one colour for each that is named, such as a skill.
    """
    order = list(dict.fromkeys(groups))
    rates = [
        f"{n}: {b.value:.1%} to {a.value:.1%}" for n, b, a in zip(names, before, after, strict=True)
    ]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(2.1 * WIDTH, 0.6 + 0.4 * len(names)), layout="constrained")
        axes = figure.subplots()
        for row, (old, new) in enumerate(zip(before, after, strict=True)):
            colour = theme.line(order.index(groups[row]))
            _draw_rate(axes, old, row - 0.15, theme.muted, filled=False)
            _draw_rate(axes, new, row + 0.15, colour, filled=True)
        axes.set_yticks(range(len(names)), list(names))
        axes.set_ylim(len(names) - 0.45, -0.75)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
        axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axes.grid(visible=False, axis="y")
        axes.spines[["left", "bottom"]].set_visible(False)
        for offset, text, style in ((-0.15, "before", "muted"), (0.15, "after", "ink")):
            axes.annotate(
                text,
                ((before if text == "before" else after)[0].high, offset),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=getattr(theme, style),
            )
        return figure

    return Chart(
        "before-after",
        "Held-out scores before and after",
        "The dot is the measured rate, the bar its 95 % interval; if the bars of a pair do not "
        "overlap, the change is larger than chance explains.",
        "Held-out scores before and after. " + "; ".join(rates) + ".",
        draw,
    )


def frontier_chart(
    skill: Skill, before: Sequence[FrontierPoint], after: Sequence[FrontierPoint]
) -> Chart:
    """Accuracy against diversity of the warm start and of the trained policy, a line each.

    Args:
        skill: of the prompts.
        before: the warm start's points, by rising diversity.
        after: the trained policy's.
    """
    lines = {"warm start": before, "trained": after}
    room = 0.15 * max((point.diversity for line in lines.values() for point in line), default=0)
    said = "; ".join(
        f"{name}, {point.sampling}: {point.accuracy.value:.1%} right at diversity "
        f"{point.diversity:.3g}"
        for name, line in lines.items()
        for point in line
    )

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        for (name, line), colour, up in zip(
            lines.items(),
            (theme.muted, theme.line(SKILLS.index(skill))),
            (False, True),
            strict=True,
        ):
            _draw_frontier(axes, name, line, colour, above=up, room=room)
        axes.margins(x=0.14, y=0.16)
        axes.set_xlabel(DIVERSITY[skill])
        axes.set_ylabel("right")
        axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
        axes.legend(loc="best", frameon=False, labelcolor="linecolor")
        return figure

    title = f"{task_name(skill)}: accuracy against diversity"
    return Chart(
        f"frontier-{skill}",
        title,
        "Each point is one way of sampling, the diamond the mode (greedy answers, drawings from no "
        "noise), bars are 95 % intervals. A line above the other is learning; a move along one "
        "line is sharpening, which needs no training.",
        f"{title}. {said}.",
        draw,
    )


def stage_chart(stages: Sequence[tuple[str, float]], total: float) -> Chart:
    """Seconds per stage of a step as horizontal bars, in the order given."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 0.4 + 0.32 * len(stages)), layout="constrained")
        axes = figure.subplots()
        seconds = [value for _, value in stages]
        axes.barh(range(len(stages)), seconds, height=0.62, color=theme.lines[0])
        for row, value in enumerate(seconds):
            text = f" {duration(value)}  ({value / total:.0%})"
            axes.text(value, row, text, va="center", fontsize=9.5, color=theme.ink)
        axes.set_yticks(range(len(stages)), [name for name, _ in stages])
        axes.set_ylim(len(stages) - 0.45, -0.55)
        axes.set_xlim(0, max(seconds) * 1.25 or 1)
        axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        return figure

    said = ", ".join(f"{name} {duration(value)} ({value / total:.0%})" for name, value in stages)
    return Chart(
        "time-per-stage",
        "Where the time of a step goes",
        f"Mean over all steps, slowest stage first; one step takes {duration(total)}.",
        f"Where the time of a step goes. {said}.",
        draw,
    )


def _lines(
    rows: Sequence[Row], keys: Mapping[str, str], *, of: Iterable[str] = (), exact: bool = False
) -> list[Line]:
    """The lines of {key: name} that have a finite value.

    A name's place among those it is `of`, or else among these, is its colour: whoever gives all
    names of a kind gets one colour for each in every panel.
    """
    steps = np.array([row["step"] for row in rows])
    names = list(dict.fromkeys([*of, *keys.values()]))
    found = (
        Line(
            name,
            steps,
            np.array([_number(row.get(key)) for row in rows]),
            exact=exact,
            colour=names.index(name),
        )
        for key, name in keys.items()
    )
    return [line for line in found if np.isfinite(line.values).any()]


def _mean(rows: Sequence[Row], key: str) -> float:
    """The mean of `key` over all rows, 0 where a row lacks it, so that means of parts add up."""
    return sum(v for v in (_number(row.get(key)) for row in rows) if math.isfinite(v)) / len(rows)


def _number(value: Any) -> float:
    """The value of a log entry as a float, NaN when it is absent or no number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _by_task(rows: Sequence[Row], prefix: str) -> dict[str, dict[str, str]]:
    """{task: {key: name}} of the keys "<prefix>/<task>/<name>"; task "" for "<prefix>/<name>"."""
    found: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        head, _, rest = key.partition("/")
        if head == prefix and rest:
            task, slash, name = rest.partition("/")  # a user's reward may be named by a path
            found.setdefault(task if slash else "", {})[key] = (name or task).rpartition("/")[2]
    return found


def _names(by_task: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Every name that `_by_task` found, once."""
    return list(dict.fromkeys(name for keys in by_task.values() for name in keys.values()))


def _reward_chart(rows: Sequence[Row]) -> Chart | None:
    by_task = _by_task(rows, "reward")
    panels = [
        Panel(task_name(task), _lines(rows, keys, of=_names(by_task)))
        for task, keys in by_task.items()
    ]
    return line_chart(
        "rewards",
        "Rewards",
        "Mean reward of the sampled outputs: faint is each step, bold a running mean. Rising is "
        "what training optimises; held-out scores say whether it is real.",
        panels,
    )


def _score_chart(rows: Sequence[Row]) -> Chart | None:
    measures = ("strict", "partial", "gold")
    tasks = [task for each in measures for task in _names(_by_task(rows, each))]
    panels = [
        Panel(
            task_name(task),
            _lines(rows, {f"{each}/{task}": each for each in measures}),
            percent=True,
        )
        for task in dict.fromkeys(tasks)
    ]
    return line_chart(
        "scores",
        "Scores of the sampled outputs",
        "Strict: all of the request is right; partial: its share that is; gold: a judge that no "
        "reward comes from. If strict rises and gold does not, the reward is being gamed.",
        panels,
    )


def _share_chart(rows: Sequence[Row]) -> Chart | None:
    by_task = _by_task(rows, "share")
    panels = [
        Panel(
            task_name(task),
            _lines(
                [r for r in rows if any(_number(r.get(k)) > 0 for k in keys)],
                keys,
                of=_names(by_task),
            ),
            percent=True,
            stacked=True,
        )
        for task, keys in by_task.items()
    ]
    return line_chart(
        "reward-shares",
        "Each reward's share of the advantage variance",
        "The height of a band is how much that reward decides which outputs are reinforced; a "
        "reward with a thin band is drowned by the others. Steps without a signal are left out.",
        panels,
    )


def _constant_chart(rows: Sequence[Row]) -> Chart | None:
    groups = _lines(rows, _by_task(rows, "constant_groups").get("", {}))
    return line_chart(
        "constant-groups",
        "Groups without a signal",
        "Share of prompts whose outputs all earned the same reward and so teach nothing; near "
        "100 % the task is solved, or far too hard.",
        [Panel("Constant groups", groups, percent=True)],
    )


def _kl_chart(rows: Sequence[Row]) -> Chart | None:
    panels = [
        Panel(heading, _lines(rows, {f"kl/{modality}": modality}, of=MODALITIES))
        for modality, heading in MODALITIES.items()
    ]
    return line_chart(
        "kl",
        "Distance from the warm start (KL)",
        "How far the policy has moved from the model it started as; a slow rise is learning, a "
        "sudden jump is a run going wrong. The two scales differ and are not comparable.",
        panels,
    )


def _ratio_chart(rows: Sequence[Row]) -> Chart | None:
    panels = [
        Panel(
            f"{heading}: largest ratio, minus 1",
            [
                dataclasses.replace(each, values=each.values - 1)
                for each in _lines(rows, {f"ratio/{modality}/max": modality}, of=MODALITIES)
            ],
        )
        for modality, heading in MODALITIES.items()
    ]
    clips = _lines(rows, {f"clip/{modality}": modality for modality in MODALITIES})
    return line_chart(
        "ratio",
        "Ratio of new to old policy, and clipping",
        "Zero (a ratio of 1) means that the outputs were sampled by the very weights being "
        "updated; the clipped share is what the update ignores.",
        [*panels, Panel("Clipped share", clips, percent=True)],
    )


def _optimiser_chart(rows: Sequence[Row]) -> Chart | None:
    return line_chart(
        "optimiser",
        "Size of the updates",
        "Gradient norm before clipping, and learning rate; a norm of zero means that nothing is "
        "being learned, a spike is worth a look at that step.",
        [
            Panel("Gradient norm", _lines(rows, {"grad_norm": "norm"})),
            Panel("Learning rate", _lines(rows, {"lr": "rate"}, exact=True)),
        ],
    )


def _draw_rate(axes: Axes, rate: Rate, height: float, colour: str, *, filled: bool) -> None:
    axes.plot([rate.low, rate.high], [height, height], color=colour, linewidth=2.4, alpha=0.55)
    face = colour if filled else axes.get_facecolor()
    (dot,) = axes.plot(rate.value, height, "o", markersize=6, color=colour, markerfacecolor=face)
    dot.set_clip_on(False)  # whole at 0 % and 100 % too


def _draw_frontier(
    axes: Axes,
    name: str,
    line: Sequence[FrontierPoint],
    colour: str,
    *,
    above: bool,
    room: float,
) -> None:
    """One line with its points; of points nearer than `room` the more telling one is named."""
    named: list[float] = []
    diversity = [point.diversity for point in line]
    rates = [point.accuracy for point in line]
    axes.plot(diversity, [rate.value for rate in rates], color=colour, label=name)
    telling = sorted(line, key=lambda point: point.sampling not in (GREEDY, LOW_NOISE, AS_TRAINED))
    for point in telling:
        rate = point.accuracy
        axes.plot([point.diversity] * 2, [rate.low, rate.high], color=colour, alpha=0.35)
        is_mode = point.sampling in (GREEDY, LOW_NOISE)
        marker, size = ("D", 8) if is_mode else ("o", 5)
        axes.plot(point.diversity, rate.value, marker, color=colour, markersize=size)
        if any(abs(point.diversity - other) < room for other in named):
            continue
        named.append(point.diversity)
        axes.annotate(
            _SHORT.get(point.sampling, point.sampling.replace("temperature", "T")),
            (point.diversity, rate.value),
            xytext=(4, 9 if above else -9),
            textcoords="offset points",
            va="bottom" if above else "top",
            fontsize=8,
            fontweight="bold" if is_mode or point.sampling == AS_TRAINED else "normal",
            color=colour,
        )
