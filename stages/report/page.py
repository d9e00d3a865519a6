"""report.html: the sections of the page as records, and the template that is filled in with them.

The page is one file: no script, style, font or image is loaded from elsewhere. Its parts are made in

- summary.py: the sentences at the top of a group of runs;
- table.py: the table of students, baselines and teachers;
- sections.py: the section of each run, and the plot of a group's costs;
- plots.py: the plots, and disagreements.py: the images, in those sections;
- page.html, page.css and page.js: how all of it is laid out.
"""

import base64
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from softcache import __version__
from softcache.base.errors import make_printable
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.stages.cli.plot_style import Plot, render_svg

from .disagreements import Disagreement
from .table import Cell, Group, Row, describe_direction, format_column_title

CLASS_TITLES = ("rows", "precision", "recall", "F1", "F1 of the teacher", "difference")
OUTPUT_TITLES = ("RMSE", "MAE", "R²", "Spearman", "RMSE of the teacher", "difference")
_TABLES = {  # heading, kind of a row, and caption of the table of a run
    CLASSES: ("Classes", "class", "Metrics of each class in %, the lowest F1 first."),
    LABELS: ("Labels", "label", "Metrics of each label in %, the lowest F1 first."),
    NUMBERS: ("Outputs", "output", "Metrics of each output in the units of the data, the largest RMSE first."),
    EMBEDDING: ("", "", ""),
}
_TEMPLATE_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class PageImage:
    """A plot in the page.

    Attributes:
        name: Of its PNG file, without the ending.
        plot: What is drawn.
        url: The plot as an SVG in a data URL.
        alt: What it shows, for readers who do not see it.
        caption: Below it.
    """

    name: str
    plot: Plot
    url: str
    alt: str
    caption: str


@dataclass(frozen=True)
class ClassRow:
    """A row of the table of classes, labels or outputs.

    Attributes:
        name: Of the class.
        cells: In the order of CLASS_TITLES, of numbers of OUTPUT_TITLES.
    """

    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class RunSection:
    """The section of one run.

    Attributes:
        name: Of the run.
        state: See `LoadedRun.state`.
        is_open: Whether the section is unfolded at first.
        split: On which the run was measured.
        images: The plots.
        notes: Why some plots are missing.
        classes: The table of classes, labels or outputs.
        task: What was learned.
        disagreements: Images on which teacher and student differ most.
        differ_by: What the bars and the number of each of these images are.
        no_disagreements: Why there are none; else empty.
        cost: Of the run; empty where it is not finished.
        provenance: (name, value) of data, cache, versions and machine.
        command: That trains the run again.
    """

    name: str
    state: str
    is_open: bool
    split: str
    images: list[PageImage]
    notes: list[str]
    classes: list[ClassRow]
    task: str
    disagreements: list[Disagreement]
    differ_by: str
    no_disagreements: str
    cost: str
    provenance: list[tuple[str, str]]
    command: str

    @property
    def table_text(self) -> tuple[str, str, str]:
        """The heading of the table of classes, the kind of its rows, and its caption."""
        return _TABLES[self.task]

    @property
    def class_titles(self) -> tuple[str, ...]:
        """The titles of the columns of the table of classes."""
        return OUTPUT_TITLES if self.task == NUMBERS else CLASS_TITLES


@dataclass(frozen=True)
class GroupSection:
    """The section of runs that were measured on the same rows.

    Attributes:
        group: The runs.
        summary: Sentences, see `summary.format_summary`.
        columns: The figures of the table, in order.
        table: See `table.make_table_rows`.
        costs: The main figure over size and latency; None where no size is known.
        runs: The sections of the runs.
    """

    group: Group
    summary: list[str]
    columns: list[str]
    table: list[Row]
    costs: PageImage | None
    runs: list[RunSection]

    @property
    def column_titles(self) -> list[dict[str, str]]:
        """The name, title and direction of each column."""
        return [
            {"name": name, "title": format_column_title(name), "direction": describe_direction(name)}
            for name in self.columns
        ]

    @property
    def has_options(self) -> bool:
        """Whether a finished or unfinished student differs from another one in an option."""
        return any(row.options for row in self.table if row.kind == "student")


def make_page_image(name: str, plot: Plot, alt: str, caption: str) -> PageImage:
    """Render a plot for the page; for the arguments see `PageImage`."""
    url = "data:image/svg+xml;base64," + base64.b64encode(render_svg(plot).encode()).decode()
    return PageImage(name=name, plot=plot, url=url, alt=alt, caption=caption)


def _make_printable(value: Any) -> Any:
    """Replace control characters in a value of the template; the page's own markup is no plain str."""
    return make_printable(value, None) if type(value) is str else value


def render_page(title: str, sections: list[GroupSection], command: str) -> str:
    """Fill in the page. All text is escaped; the content security policy allows only the page's own script.

    Args:
        title: Of the page.
        sections: Of the groups of runs.
        command: That makes the report again.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE_FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_make_printable
    )
    script = (_TEMPLATE_FOLDER / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        command=command,
        version=__version__,
        date=date.today().isoformat(),
        script=script,
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )
