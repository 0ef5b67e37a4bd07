"""How the figures of a report are drawn: themes, line charts, PNGs. Which there are: charts.py.

Every chart names its axes in words, labels its lines where they end instead of in a legend, keeps
one colour per quantity in all its figures, and draws raw values faintly behind a smoothed line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 5.2  # inches of a half-width figure: its 9.5 pt then read like the page's small print


@dataclass(frozen=True)
class Theme:
    """Colours of one rendering; `lines` are told apart by colour-blind readers too.

    Names are written in them, so each has a contrast of 4.5 to the surface (WCAG 2 AA).
    """

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    lines: tuple[str, ...]

    def line(self, number: int) -> str:
        """The colour of a line; from the eighth on they come again."""
        return self.lines[number % len(self.lines)]


LIGHT = Theme(
    "light",
    surface="#ffffff",
    ink="#1c2430",
    muted="#667085",
    grid="#e4e7ec",
    lines=("#2563c9", "#c24e08", "#0c7d55", "#8b46c1", "#8f6800", "#c02661", "#487684"),
)
DARK = Theme(
    "dark",
    surface="#171c24",
    ink="#e6e9ee",
    muted="#98a2b3",
    grid="#2c3440",
    lines=("#6ea3f7", "#f5915a", "#43c596", "#c193ea", "#dfb445", "#ee7ba6", "#8dbccb"),
)


@dataclass(frozen=True)
class Line:
    """One quantity over the steps of a run, [N] each; NaN where it was not measured.

    `low` and `high` are its interval, if it has one. What is `exact` is set and not measured: it
    has no noise to smooth away. `colour` counts within its kind: of rewards, measures, modalities.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    exact: bool = False
    colour: int = 0


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its heading, its lines, and how its values are written."""

    heading: str
    lines: list[Line]
    percent: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Chart:
    """One figure of the page.

    Attributes:
        name: stem of its PNG.
        title: what it shows.
        reading: one sentence on how to read it.
        alt: the same facts in words and numbers, for those who do not see it.
        draw: builds it in a theme.
    """

    name: str
    title: str
    reading: str
    alt: str
    draw: Callable[[Theme], Figure]


def render(chart: Chart, theme: Theme) -> bytes:
    """The chart as a PNG."""
    buffer = BytesIO()
    with _style(theme):
        figure = chart.draw(theme)
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def line_chart(name: str, title: str, reading: str, panels: Sequence[Panel]) -> Chart | None:
    """A chart of panels above each other over a shared step axis; None when all are empty."""
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return None
    said = "; ".join(_in_words(panel, line) for panel in panels for line in panel.lines)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 0.45 + 1.55 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, theme)
        axes[-1].set_xlabel("training step")
        return figure

    return Chart(name, title, reading, f"{title}. {said}.", draw)


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over about a twelfth of the values, NaN left out; [N] -> [N]."""
    reach = max(2, len(values) // 24)
    if len(values) < 10:
        return values
    weights = np.ones(2 * reach + 1)
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), weights, "same")
    counts = np.convolve(known.astype(np.float64), weights, "same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def duration(seconds: float) -> str:
    """Seconds for people: 3.2 ms, 1.25 s, 4 min 10 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _draw_panel(axes: Axes, panel: Panel, theme: Theme) -> None:
    axes.set_title(panel.heading)
    colours = [theme.line(each.colour) for each in panel.lines]
    ends = _stack(axes, panel, colours) if panel.stacked else _plot(axes, panel, colours)
    axes.margins(x=0)
    axes.locator_params(axis="x", integer=True, nbins=7)
    _scale(axes, panel)
    _label_ends(axes, ends)


def _scale(axes: Axes, panel: Panel) -> None:
    low, high = axes.get_ylim()
    if panel.stacked:
        low, high = 0.0, 1.0
    elif panel.percent:  # no less than 20 points high, lest noise look like a trend
        centre = min(max((low + high) / 2, 0.1), 0.9)
        reach = max((high - low) / 2, 0.1)
        low, high = max(centre - reach, -0.01), min(centre + reach, 1.01)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: _written(value, panel.percent, 6))


def _plot(axes: Axes, panel: Panel, colours: Sequence[str]) -> list[tuple[float, str, str]]:
    ends = []
    for each, colour in zip(panel.lines, colours, strict=True):
        smoothed = each.values if each.exact else smooth(each.values)
        marker = "o" if len(each.steps) < 10 else ""
        axes.plot(each.steps, each.values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(each.steps, smoothed, color=colour, marker=marker, markersize=3.5)
        if each.low is not None and each.high is not None:
            axes.fill_between(
                each.steps, each.low, each.high, color=colour, alpha=0.15, linewidth=0
            )
        last = float(smoothed[np.isfinite(smoothed)][-1])
        ends.append((last, f"{each.name}  {_written(last, panel.percent)}", colour))
    return ends


def _stack(axes: Axes, panel: Panel, colours: Sequence[str]) -> list[tuple[float, str, str]]:
    heights = np.nan_to_num(np.stack([smooth(each.values) for each in panel.lines]))
    axes.stackplot(panel.lines[0].steps, heights, colors=list(colours), alpha=0.85, linewidth=0)
    tops = heights[:, -1].cumsum()
    return [
        (float(top - height / 2), f"{each.name}  {_written(float(height), True)}", colour)
        for top, height, each, colour in zip(
            tops, heights[:, -1], panel.lines, colours, strict=True
        )
    ]


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.12) -> None:
    """Write each line's name at its right end, pushed apart where two would touch."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    wanted = sorted(
        (float(to_fraction.transform((right, value))[1]), text, colour)
        for value, text, colour in ends
    )
    heights: list[float] = []
    for height, _, _ in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else max(height, 0.02))
    excess = heights[-1] - 1.0
    for i in range(len(heights) - 1, -1, -1):
        ceiling = 1.0 if i == len(heights) - 1 else heights[i + 1] - gap
        if excess > 0:
            heights[i] = min(heights[i], ceiling)
    for height, (_, text, colour) in zip(heights, wanted, strict=True):
        axes.text(
            1.015, height, text, color=colour, transform=axes.transAxes, va="center", fontsize=9.5
        )


def _in_words(panel: Panel, each: Line) -> str:
    known = each.values[np.isfinite(each.values)]
    first, last = (_written(float(known[i]), panel.percent) for i in (0, -1))
    return f"{panel.heading}, {each.name}: {first} at first, {last} at last"


def _written(value: float, percent: bool, digits: int = 3) -> str:
    if percent:
        return f"{value:.0%}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    with mpl.rc_context(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 9.5,
            "text.color": theme.ink,
            "figure.facecolor": theme.surface,
            "savefig.facecolor": theme.surface,
            "axes.facecolor": theme.surface,
            "axes.edgecolor": theme.grid,
            "axes.labelcolor": theme.muted,
            "axes.titlesize": 9.5,
            "axes.titlelocation": "left",
            "axes.titlecolor": theme.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.grid,
            "grid.linewidth": 0.7,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
        }
    ):
        yield
