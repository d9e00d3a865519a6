"""The image of a search: the figure of each trial in order, and plotted against each searched option."""

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER
from softcache.stages.cli.plot_style import BLUE, GREY, ORANGE, PURPLE, Plot

from .space import SearchedOption

Row = dict[str, Any]
# {state: (colour, whether the marker is filled)} of the trials that are drawn as points.
_STATES = {"complete": (BLUE, True), "pruned": (GREY, False)}


def plot_search(rows: Sequence[Row], space: Sequence[SearchedOption], figure: str) -> Plot:
    """Plot the trials of a search. A pruned trial is drawn at its last figure.

    A trial that is far worse than most is a triangle at the edge, because it would otherwise set the scale alone.

    Args:
        rows: the trials, as summary.make_rows returns them.
        space: what was searched; one panel each.
        figure: by which trials are compared.
    """
    columns = ceil(sqrt(1 + len(space)))
    height = ceil((1 + len(space)) / columns)

    def draw(image: Figure) -> None:
        panels = image.subplots(height, columns, squeeze=False, sharey=True).ravel()
        low, high = _find_limits(rows, figure)
        _draw_points(panels[0], rows, [row["trial"] for row in rows], low, high)
        _draw_progress(panels[0], rows, figure)
        for panel, option in zip(panels[1:], space, strict=False):
            _draw_against_option(panel, rows, option, low, high)
        for panel in panels[::columns]:
            panel.set_ylabel(f"validation {figure}")
        for panel in panels[1 + len(space) :]:
            panel.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            image.legend(handles, labels, loc="outside lower center", ncols=len(handles))

    return Plot((4.4 * columns, 3.4 * height + 0.4), draw)


def _get_figure(row: Row) -> float | None:
    """Return the figure at which a trial is drawn, None for a failed or running one."""
    value: float | None = {"complete": row["value"], "pruned": row["last"]}.get(row["state"])
    return value


def _find_limits(rows: Sequence[Row], figure: str) -> tuple[float, float]:
    """Return the range of figures that are drawn in place: to the best one, and to Tukey's outer fence of bad ones."""
    values = [value for row in rows if (value := _get_figure(row)) is not None]
    if not values:
        return 0.0, 1.0
    first_quartile, third_quartile = np.percentile(values, [25, 75])
    low, high = min(values), max(values)
    if figure in LOWER_IS_BETTER:
        return low, min(high, float(third_quartile + 3 * (third_quartile - first_quartile)))
    return max(low, float(first_quartile - 3 * (third_quartile - first_quartile))), high


def _draw_points(panel: Axes, rows: Sequence[Row], xs: Sequence[float], low: float, high: float) -> None:
    """Draw complete and pruned trials, and triangles at `low` and `high` for those beyond."""
    for state, (colour, is_filled) in _STATES.items():
        points = [
            (x, value)
            for row, x in zip(rows, xs, strict=True)
            if row["state"] == state and (value := _get_figure(row)) is not None
        ]
        face = colour if is_filled else "none"
        for marker, label, marked_points in (
            ("o", state, [(x, value) for x, value in points if low <= value <= high]),
            ("v", None, [(x, low) for x, value in points if value < low]),
            ("^", None, [(x, high) for x, value in points if value > high]),
        ):
            if marked_points:
                x, y = zip(*marked_points, strict=True)
                panel.scatter(x, y, 22, marker=marker, edgecolors=colour, facecolors=face, label=label)


def _draw_progress(panel: Axes, rows: Sequence[Row], figure: str) -> None:
    """Draw the best figure up to each trial, and a cross for each failed one."""
    better = min if figure in LOWER_IS_BETTER else max
    complete = [row for row in rows if row["state"] == "complete"]
    if complete:
        best = [better(row["value"] for row in complete[: i + 1]) for i in range(len(complete))]
        panel.step([row["trial"] for row in complete], best, where="post", color=ORANGE, label="best so far")
    failed = [row["trial"] for row in rows if row["state"] == "failed"]
    if failed:
        axis_transform = panel.get_xaxis_transform()  # y as a share of the height
        panel.plot(failed, [0.02] * len(failed), "x", color=PURPLE, transform=axis_transform, label="failed")
    panel.set_xlabel("trial")


def _draw_against_option(panel: Axes, rows: Sequence[Row], option: SearchedOption, low: float, high: float) -> None:
    values = [row["parameters"][option.name] for row in rows]
    if option.choices:
        values = [option.choices.index(value) for value in values]
        panel.set_xticks(range(len(option.choices)), [str(choice) for choice in option.choices])
        panel.set_xlim(-0.5, len(option.choices) - 0.5)
    elif option.log:
        panel.set_xscale("log")
        ticks = _list_decimal_ticks(option.low, option.high)
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.set_xlim(option.low / 1.1, option.high * 1.1)
    _draw_points(panel, rows, values, low, high)
    panel.set_xlabel(option.name)


def _list_decimal_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two positive numbers; powers of ten only if there are many."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
