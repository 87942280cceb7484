"""How figures of a report are drawn: by matplotlib as inline SVG in a light and in a dark colour scheme."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvlatent.evaluation.config import NEAR_ONLY

_T = TypeVar("_T")

PALETTES = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1d2430",
        "muted": "#5d6877",
        "line": "#dfe3e8",
        "wash": "#f5f6f8",
        "teacher": "#8d98a7",
        "student": "#23639f",
        "other": "#b86a1f",
        "caution": "#a1340f",
    },
    "dark": {
        "paper": "#14181f",
        "ink": "#e4e8ee",
        "muted": "#9aa5b4",
        "line": "#2f3743",
        "wash": "#1c222b",
        "teacher": "#7f8b9b",
        "student": "#62a4e2",
        "other": "#dd9a52",
        "caution": "#f09468",
    },
}
"""Colours of page and figures by the reader's colour scheme; a figure is drawn once in each."""
TEACHER, STUDENT, OTHER, INK, MUTED = (f"C{number}" for number in range(5))
"""Colours of a figure, as matplotlib names those of the current style's cycle."""


def _style(scheme: str) -> Any:
    colours = PALETTES[scheme]
    cycle = [colours[name] for name in ("teacher", "student", "other", "ink", "muted")]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": scheme,  # so that both drawings of a figure can be on one page
        "font.size": 9,
        "text.color": colours["ink"],
        "axes.edgecolor": colours["muted"],
        "axes.labelcolor": colours["ink"],
        "axes.linewidth": 0.6,
        "axes.prop_cycle": cycler(color=cycle),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["line"],
        "grid.linewidth": 0.6,
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.labelcolor": colours["ink"],
        "ytick.labelcolor": colours["ink"],
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.5,
        "text.parse_math": False,
    }


class Picture(NamedTuple):
    """A figure as inline SVG, one for each of `PALETTES`, with its texts."""

    title: str
    caption: str
    svg: Markup


def picture(title: str, caption: str, draw: Callable[[Axes], None]) -> Picture:
    """Draw a figure in both colour schemes."""
    return Picture(title, caption, Markup("\n").join(_drawn(title, draw, scheme) for scheme in PALETTES))


def _drawn(title: str, draw: Callable[[Axes], None], scheme: str) -> Markup:
    """The figure in one colour scheme, which its class names."""
    with matplotlib.rc_context(_style(scheme)):
        figure = Figure(figsize=(4.8, 3.1), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1, … would repeat within the page
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    return Markup(  # matplotlib has escaped the texts it drew
        f'<svg class="{scheme}" {view[0]} role="img" aria-label="{escape(title)}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{svg[svg.index(">") + 1 :]}'
    )


def colour_of(model: str) -> str:
    """The colour of a model, by what results call it."""
    return TEACHER if model in ("teacher", NEAR_ONLY) else OTHER if model.startswith("paper") else STUDENT


def short(text: str, width: int = 26) -> str:
    """The beginning of a text that may be long."""
    return text if len(text) <= width else text[: width - 1] + "…"


def thin(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def plain_axis(axis: Any) -> None:
    """Write an axis's numbers out, also where it is logarithmic."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def wide(values: Iterable[float], times: float) -> bool:
    """Whether values are so far apart that only a logarithmic axis shows them all."""
    values = list(values)
    return min(values) > 0 and max(values) / min(values) > times
