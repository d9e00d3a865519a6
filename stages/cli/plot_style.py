"""How every image looks: colours that colour-blind eyes tell apart, no window, no state that outlives a figure."""

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

# Okabe and Ito 2008, "Color universal design"; each at least 3 to 1 against white and against _DARK_PAPER.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA6699", "#808080"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)
MARKERS = "os^Dv"
_NAMED = 40  # classes of a matrix that are named along its sides
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
    """What is drawn, and on how many inches."""

    size: tuple[float, float]
    draw: Callable[[Figure], None]


def plot_text(name: object, most: int = 28) -> str:
    """A name as it may stand in a figure: on one line, cut in the middle, and no formula."""
    name = make_printable(name)
    short = name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"
    return short.replace("$", r"\$")


def label_classes(axes: Axes, names: Sequence[str], most: int) -> None:
    """Name the rows and columns of a matrix of classes, where they are few enough to be read. most: letters of one."""
    if len(names) > _NAMED:
        return
    labels, places = [plot_text(name, most) for name in names], range(len(names))
    axes.set_xticks(places, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set_yticks(places, labels)


def save_png(path: Path, image: Plot) -> None:
    """Publish a image as a PNG on white."""
    with _styled_figure(image) as figure:
        FigureCanvasAgg(figure)
        publish(path, lambda temporary: figure.savefig(temporary, format="png"))


def render_svg(image: Plot) -> str:
    """A image as SVG with a paper that is transparent and an ink that is light on a dark page.

    Equal images give equal text.
    """
    with _styled_figure(image) as figure:
        FigureCanvasSVG(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _add_dark_mode(file.getvalue())


@contextmanager
def _styled_figure(image: Plot) -> Iterator[Figure]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script the font lacks
        figure = Figure(image.size, dpi=120, layout="constrained")
        image.draw(figure)
        yield figure


def _add_dark_mode(image: str) -> str:
    """The image with other colours for ink and grid where the page around it is dark; never on paper."""
    rules = "".join(
        f'[style*="{what}: {light.lower()}"]{{{what}:{dark}!important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media screen and (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + style, image, count=1)
