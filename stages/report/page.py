"""One HTML file with everything in it: no script, style, font or image is fetched from anywhere."""

import base64
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from softcache import __version__
from softcache.stages.cli.plot_style import Plot, render_svg

from .disagreements import Disagreement
from .text import COLUMNS, Cell, Row, column_title, is_better

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageImage:
    """A image in the page: as a file without its ending, as a data URL, what it shows for those who do not see it,
    and what stands below it."""

    name: str
    image: Plot
    url: str
    alt: str
    caption: str


@dataclass(frozen=True)
class ClassRow:
    """The figures of a class."""

    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class RunPart:
    """What the page has of one run. not_apart: why there are no images; open: whether it is unfolded."""

    name: str
    state: str
    open: bool
    split: str
    images: list[PageImage]
    notes: list[str]
    classes: list[ClassRow]
    apart: list[Disagreement]
    not_apart: str
    bill: str
    provenance: list[tuple[str, str]]
    command: str


@dataclass(frozen=True)
class GroupPart:
    """What the page has of runs that were measured on the same rows."""

    title: str
    split: str
    rows: int
    summary: list[str]
    table: list[Row]
    costs: PageImage | None
    runs: list[RunPart]


def make_page_image(name: str, image: Plot, alt: str, caption: str) -> PageImage:
    """A image as it stands in the page."""
    url = "data:image/svg+xml;base64," + base64.b64encode(render_svg(image).encode()).decode()
    return PageImage(name, image, url, alt, caption)


def render_page(title: str, groups: list[GroupPart], again: str) -> str:
    """The whole file. Every text is escaped; the one script that may run is named by its digest."""
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    columns: list[dict[str, Any]] = [{"name": n, "title": column_title(n), "better": is_better(n)} for n in COLUMNS]
    return environment.get_template("page.html").render(
        title=title,
        groups=groups,
        again=again,
        columns=columns,
        version=__version__,
        date=date.today().isoformat(),
        script=script,
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )
