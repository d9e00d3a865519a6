"""The style of every plot: colours for colour-blind readers, no window, no global state of matplotlib."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from softcache.base.errors import make_printable
from softcache.base.files import publish

# Okabe and Ito 2008, "Color universal design"; each with a contrast of at least 3 to 1 against white and against a
# dark page.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA6699", "#808080"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)
MARKERS = "os^Dv"
_MAX_NAMED = 40  # classes of a matrix whose names are written along its sides
INK, GRID = "#1F2328", "#C8CDD3"
_DARK = {INK: "#E6EDF3", GRID: "#4A525C"}
_STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "font.size": 10,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "softcache",
    "font.family": ["DejaVu Sans", "sans-serif"],
}


class Plot(NamedTuple):
    """A plot: its width and height in inches, and the function that draws it."""

    size: tuple[float, float]
    draw: Callable[[Figure], None]


def plot_text(name: object, most: int = 28) -> str:
    """Return a name for a plot: on one line, shortened in the middle to `most` characters, never read as a formula."""
    text = make_printable(name)
    short = text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
    return short.replace("$", r"\$")


def label_classes(axes: Axes, names: Sequence[str], most: int) -> None:
    """Write the names of classes along the sides of a matrix, where they are few enough to be read.

    Args:
        axes: of the matrix.
        names: of its rows and columns.
        most: characters of a name.
    """
    if len(names) > _MAX_NAMED:
        return
    labels, ticks = [plot_text(name, most) for name in names], range(len(names))
    axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set_yticks(ticks, labels)


def save_png(path: Path, plot: Plot) -> None:
    """Publish a plot as a PNG on white."""
    with _styled_figure(plot) as figure:
        FigureCanvasAgg(figure)
        publish(path, lambda temporary: figure.savefig(temporary, format="png"))


def render_svg(plot: Plot) -> str:
    """Return a plot as SVG text with a transparent background; on a dark page its text and axes are light.

    Equal plots give equal text.
    """
    with _styled_figure(plot) as figure:
        FigureCanvasSVG(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _add_dark_mode(file.getvalue())


@contextmanager
def _styled_figure(plot: Plot) -> Iterator[Figure]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script the font lacks
        figure = Figure(plot.size, dpi=120, layout="constrained")
        plot.draw(figure)
        yield figure


def _add_dark_mode(svg: str) -> str:
    """Return the SVG with other colours for text and grid where the page around it is dark; never in print."""
    rules = "".join(
        f'[style*="{attribute}: {light.lower()}"]{{{attribute}:{dark}!important}}'
        for light, dark in _DARK.items()
        for attribute in ("fill", "stroke")
    )
    style = f"<style>@media screen and (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(r"(<svg [^>]*>)", lambda match: match[1] + style, svg, count=1)
