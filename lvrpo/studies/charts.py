"""The figures of a study: what every arm changed, seed by seed, and how its rewards shared."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvrpo.report.drawing import WIDTH, Chart, Theme
from lvrpo.studies.outcomes import ArmOutcome, Outcome, Quantity


def change_chart(
    arms: Sequence[ArmOutcome], quantities: Sequence[Quantity], name: str, title: str
) -> Chart | None:
    """The change from the warm start by arm, a panel per quantity; None where none was measured.

    Args:
        arms: one row each.
        quantities: side by side.
        name: stem of the PNG.
        title: of the figure.
    """
    found = {
        quantity: {
            arm.arm.title: outcome
            for arm in arms
            for outcome in arm.outcomes
            if outcome.quantity == quantity
        }
        for quantity in quantities
    }
    panels = {quantity: rows for quantity, rows in found.items() if rows}
    if not panels:
        return None
    titles = [arm.arm.title for arm in arms]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(2.1 * WIDTH, 0.9 + 0.4 * len(arms)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for colour, (axis, (quantity, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
            axis.set_title(quantity.title)
            axis.axvline(0, color=theme.muted, linewidth=0.8)
            for title, outcome in rows.items():
                _draw_change(axis, titles.index(title), outcome, theme.line(colour))
            axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(_points))
            axis.set_xlabel("change from the warm start, percentage points")
        _rows(axes[0], titles, theme)
        return figure

    said = "; ".join(
        f"{quantity.title}, {title}: {100 * outcome.change.result.difference:+.1f} points"
        for quantity, rows in panels.items()
        for title, outcome in rows.items()
    )
    return Chart(
        name,
        title,
        "Large dot: mean change over the seeds, by pairs of the same held-out prompt; bar: its "
        "95 % interval for other prompts; small dots: each seed.",
        f"{title}. {said}.",
        draw,
    )


def share_chart(arms: Sequence[ArmOutcome], skill: str) -> Chart | None:
    """Each reward's share of the advantage variance by arm; None where a skill has one reward."""
    rewards = list(dict.fromkeys(r for arm in arms for s, r in arm.shares if s == skill))
    if len(rewards) < 2:
        return None
    titles = [arm.arm.title for arm in arms]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(2.1 * WIDTH, 0.9 + 0.4 * len(arms)), layout="constrained")
        axes = figure.subplots()
        for row, arm in enumerate(arms):
            left = 0.0
            for colour, reward in enumerate(rewards):
                share = arm.shares.get((skill, reward))
                if share is not None:
                    axes.barh(row, share.value, left=left, height=0.6, color=theme.line(colour))
                    left += share.value
        handles = [mpl.patches.Patch(color=theme.line(i)) for i in range(len(rewards))]
        figure.legend(handles, rewards, loc="outside upper center", ncols=9, frameon=False)
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
        _rows(axes, titles, theme)
        return figure

    said = "; ".join(
        f"{arm.arm.title}: "
        + ", ".join(f"{r} {share.value:.1%}" for (s, r), share in arm.shares.items() if s == skill)
        for arm in arms
    )
    title = f"Each reward's share of the advantage variance ({skill})"
    return Chart(
        f"shares-{skill}",
        title,
        "How much a reward decides which samples are reinforced: mean over the steps that had a "
        "signal, and over the seeds.",
        f"{title}. {said}.",
        draw,
    )


def _points(value: float, position: int) -> str:
    text = f"{100 * value:+.3g}" if value else "0"
    return text.replace("-", "\N{MINUS SIGN}")


def _draw_change(axes: Axes, row: int, outcome: Outcome, colour: str) -> None:
    change = outcome.change
    axes.plot(change.result.interval, [row, row], color=colour, linewidth=2.4, alpha=0.55)
    axes.plot(change.result.difference, row, "o", markersize=6, color=colour)
    above = [row - 0.25] * len(change.runs)
    axes.plot(change.runs, above, "o", markersize=3, color=colour, alpha=0.6)


def _rows(axes: Axes, titles: Sequence[str], theme: Theme) -> None:
    axes.set_yticks(range(len(titles)), list(titles))
    axes.set_ylim(len(titles) - 0.5, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axes.grid(visible=False, axis="y")
