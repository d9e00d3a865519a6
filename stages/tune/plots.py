"""The image of a search: the figure of each trial in turn, and against each name that was searched."""

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softcache.stages.cli.plot_style import BLUE, GREY, ORANGE, PURPLE, Plot

from .space import SearchedOption

Row = dict[str, Any]
# How a trial of each state is drawn: colour, and whether its point is full.
_STATES = {"complete": (BLUE, True), "pruned": (GREY, False)}


def plot_search(rows: Sequence[Row], space: Sequence[SearchedOption], figure: str) -> Plot:
    """The image of rows, as search_report.rows_of makes them. A pruned trial is where it was when it was stopped.

    A trial that is far worse than most stands at the edge, as a triangle: else it alone would set the scale.
    """
    columns = ceil(sqrt(1 + len(space)))
    height = ceil((1 + len(space)) / columns)

    def draw(image: Figure) -> None:
        panels = image.subplots(height, columns, squeeze=False, sharey=True).ravel()
        low, high = _edges(rows, figure)
        _points(panels[0], rows, [row["trial"] for row in rows], low, high)
        _in_turn(panels[0], rows, figure)
        for panel, one in zip(panels[1:], space, strict=False):
            _against(panel, rows, one, low, high)
        for panel in panels[::columns]:
            panel.set_ylabel(f"validation {figure}")
        for panel in panels[1 + len(space) :]:
            panel.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            image.legend(handles, labels, loc="outside lower center", ncols=len(handles))

    return Plot((4.4 * columns, 3.4 * height + 0.4), draw)


def _figure(row: Row) -> float | None:
    """Where a trial is drawn; None for one that has no figure, and one that is not over."""
    value: float | None = {"complete": row["value"], "pruned": row["last"]}.get(row["state"])
    return value


def _edges(rows: Sequence[Row], figure: str) -> tuple[float, float]:
    """The values that are drawn as they are: the good end whole, the bad end to Tukey's outer fence."""
    values = [value for row in rows if (value := _figure(row)) is not None]
    if not values:
        return 0.0, 1.0
    quarter, rest = np.percentile(values, [25, 75])
    low, high = min(values), max(values)
    if figure == "nll":
        return low, min(high, float(rest + 3 * (rest - quarter)))
    return max(low, float(quarter - 3 * (rest - quarter))), high


def _points(panel: Axes, rows: Sequence[Row], xs: Sequence[float], low: float, high: float) -> None:
    for state, (colour, full) in _STATES.items():
        some = [
            (x, value)
            for row, x in zip(rows, xs, strict=True)
            if row["state"] == state and (value := _figure(row)) is not None
        ]
        face = colour if full else "none"
        for marker, label, chosen in (
            ("o", state, [(x, v) for x, v in some if low <= v <= high]),
            ("v", None, [(x, low) for x, v in some if v < low]),
            ("^", None, [(x, high) for x, v in some if v > high]),
        ):
            if chosen:
                x, y = zip(*chosen, strict=True)
                panel.scatter(x, y, 22, marker=marker, edgecolors=colour, facecolors=face, label=label)


def _in_turn(panel: Axes, rows: Sequence[Row], figure: str) -> None:
    better = min if figure == "nll" else max
    done = [row for row in rows if row["state"] == "complete"]
    if done:
        best = [better(row["value"] for row in done[: i + 1]) for i in range(len(done))]
        panel.step([row["trial"] for row in done], best, where="post", color=ORANGE, label="best so far")
    failed = [row["trial"] for row in rows if row["state"] == "failed"]
    if failed:
        at_foot = panel.get_xaxis_transform()
        panel.plot(failed, [0.02] * len(failed), "x", color=PURPLE, transform=at_foot, label="failed")
    panel.set_xlabel("trial")


def _against(panel: Axes, rows: Sequence[Row], one: SearchedOption, low: float, high: float) -> None:
    values = [row["parameters"][one.name] for row in rows]
    if one.choices:
        values = [one.choices.index(value) for value in values]
        panel.set_xticks(range(len(one.choices)), [str(choice) for choice in one.choices])
        panel.set_xlim(-0.5, len(one.choices) - 0.5)
    elif one.log:
        panel.set_xscale("log")
        ticks = _decimal_ticks(one.low, one.high)
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.set_xlim(one.low / 1.1, one.high * 1.1)
    _points(panel, rows, values, low, high)
    panel.set_xlabel(one.name)


def _decimal_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two numbers above 0; the powers alone where these are many."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
