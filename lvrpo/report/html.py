"""What pages have in common: how numbers are written, and how a figure gets onto a page.

The style is style.css.jinja, a figure figure.html.jinja. A page is self-contained: no script, no
link, every picture inlined.
"""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2

from lvrpo.report.drawing import DARK, LIGHT, Chart, render

NO_BREAK, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"


def page_environment(*folders: Path) -> jinja2.Environment:
    """Where templates are found, and the filters that write numbers in them.

    Args:
        folders: with templates of one's own, beside those of the report.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": lambda value: f"{value:.3g}".replace("-", MINUS),
        "signed": lambda value: f"{value:+.3g}".replace("-", MINUS),
        "points": points,
    }
    return environment


def percent(rate: float) -> str:
    """A rate in [0, 1]: 28.1 %."""
    return f"{100 * rate:.1f}{NO_BREAK}%"


def points(difference: float) -> str:
    """A difference of two rates in percentage points: +14.1."""
    return f"{100 * difference:+.1f}".replace("-", MINUS)


def figure(chart: Chart, folder: Path) -> dict[str, str]:
    """Draw a chart for light and dark pages, and leave the light PNG in `folder`."""
    light = render(chart, LIGHT)
    (folder / f"{chart.name}.png").write_bytes(light)
    return {
        "title": chart.title,
        "reading": chart.reading,
        "alt": chart.alt,
        "light": data_uri(light),
        "dark": data_uri(render(chart, DARK)),
    }


def data_uri(png: bytes) -> str:
    """A picture inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
