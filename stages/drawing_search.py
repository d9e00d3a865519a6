"""The picture of a search: the figure of each trial in turn, and against each name that was searched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .search_space import Searched

_COLUMNS = 3


def draw_search(path: Path, rows: Sequence[dict[str, Any]], space: Sequence[Searched], figure: str) -> None:
    """A PNG of rows, as search_report.rows_of makes them. Pruned trials are where they were when they ended."""
    height = -(-(1 + len(space)) // _COLUMNS)
    picture = Figure(figsize=(4.2 * _COLUMNS, 3.4 * height), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(height, _COLUMNS, squeeze=False).ravel()
    _in_turn(panels[0], rows, figure)
    for panel, one in zip(panels[1:], space, strict=False):
        _against(panel, rows, one)
    for panel in panels[1 + len(space) :]:
        panel.set_visible(False)
    picture.savefig(path, format="png", dpi=120)


def _points(panel: Axes, found: Sequence[tuple[dict[str, Any], float]]) -> None:
    """(trial, x) as points, the complete ones full, the pruned ones hollow."""
    for state, colour, face in (("complete", "tab:blue", "tab:blue"), ("pruned", "tab:gray", "none")):
        some = [(row, x) for row, x in found if row["state"] == state]
        values = [row["value"] if state == "complete" else row["last"] for row, _ in some]
        if some:
            panel.scatter([x for _, x in some], values, s=18, edgecolors=colour, facecolors=face, label=state)


def _in_turn(panel: Axes, rows: Sequence[dict[str, Any]], figure: str) -> None:
    _points(panel, [(row, row["trial"]) for row in rows])
    better = min if figure == "nll" else max
    done = [(row["trial"], row["value"]) for row in rows if row["state"] == "complete"]
    if done:
        best = [better(value for _, value in done[: i + 1]) for i in range(len(done))]
        panel.step([trial for trial, _ in done], best, where="post", color="tab:orange", label="best so far")
    failed = [row["trial"] for row in rows if row["state"] == "failed"]
    if failed:
        panel.plot(
            failed, [0.02] * len(failed), "x", color="tab:red", transform=panel.get_xaxis_transform(), label="failed"
        )
    panel.set_xlabel("trial")
    panel.set_ylabel(f"validation {figure}")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize="small")


def _against(panel: Axes, rows: Sequence[dict[str, Any]], one: Searched) -> None:
    if one.choices:
        _points(panel, [(row, one.choices.index(row["parameters"][one.name])) for row in rows])
        panel.set_xticks(range(len(one.choices)), [str(choice) for choice in one.choices])
        panel.set_xlim(-0.5, len(one.choices) - 0.5)
    else:
        _points(panel, [(row, row["parameters"][one.name]) for row in rows])
        if one.log:
            panel.set_xscale("log")
    panel.set_xlabel(one.name)
