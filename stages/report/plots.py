"""The images of a report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from softcache.stages.cli.plot_style import BLUE, GREEN, GREY, MARKERS, ORANGE, SERIES, Plot, label_classes, plot_text

from .load import Line
from .summary import Agreement, find_pareto

_COUNTED = 12  # classes up to which a cell has its number in it
_KINDS = {"student": (BLUE, "o"), "baseline": (ORANGE, "s"), "teacher": (GREEN, "^")}


@dataclass(frozen=True)
class Point:
    """A network in the plot of what it costs and what it is worth. accuracy: 0 … 1; sd: over seeds; parameters and
    milliseconds (of one image) None where they are not known."""

    name: str
    kind: str
    accuracy: float
    sd: float
    parameters: int | None
    milliseconds: float | None


def plot_costs(points: Sequence[Point]) -> Plot:
    """Accuracy over size and over latency, with those that no cheaper one equals joined by a line."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, what, key in zip(
            panels, ("parameters", "ms a image, one thread"), ("parameters", "milliseconds"), strict=True
        ):
            some = [point for point in points if getattr(point, key)]
            _cloud(axes, some, [getattr(point, key) for point in some])
            for point in points:
                if point.kind == "teacher" and point not in some:
                    axes.axhline(100 * point.accuracy, color=GREEN, linestyle=":", label="teacher")
            axes.set_xlabel(what)
            axes.grid(alpha=0.6)
        panels[0].set_ylabel("accuracy, %")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))

    return Plot((9, 4.4), draw)


def _cloud(axes: Axes, points: Sequence[Point], costs: Sequence[float]) -> None:
    front = find_pareto(costs, [point.accuracy for point in points])
    if len(front) > 1:
        x, y = [costs[i] for i in front], [100 * points[i].accuracy for i in front]
        axes.plot(x, y, color=GREY, linewidth=1, zorder=1, label="Pareto front")
    for kind, (colour, marker) in _KINDS.items():
        some = [(cost, point) for cost, point in zip(costs, points, strict=True) if point.kind == kind]
        if some:
            x, y = [cost for cost, _ in some], [100 * point.accuracy for _, point in some]
            sd = [100 * point.sd for _, point in some]
            axes.errorbar(x, y, sd if any(sd) else None, fmt=marker, color=colour, capsize=3, label=kind)
    if points:
        axes.set_xscale("log")
        axes.margins(0.25, 0.15)
        narrow = max(costs) < 30 * min(costs)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if min(costs) >= 100 else "{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    named = [point for point in points if point.kind != "baseline"]  # which has its student's name, and stands below
    for cost, point in zip(costs, points, strict=True):
        if len(named) <= _COUNTED and point in named:
            where, offset, ha, va = (cost, 100 * point.accuracy), (-7, 4), "right", "bottom"
            if point.kind == "teacher":
                offset, ha, va = (7, -4), "left", "top"
            axes.annotate(
                plot_text(point.name, 20), where, offset, ha=ha, va=va, textcoords="offset points", fontsize=8
            )


def plot_curves(trainings: dict[str, list[list[Line]]], finetuned_from: int) -> Plot:
    """By epoch: the terms of the student's loss, their gradients, and accuracy and macro F1 of validation.

    trainings: {student or baseline: of each seed its lines}; a line is the mean over seeds, the shade from the least
    to the most. finetuned_from: the epoch after which hard targets alone are learned, 0 for none.
    """
    student = trainings["student"]
    terms, gradients = (_keys(student, prefix) for prefix in ("loss_", "gradient_"))
    panels = [("terms of the loss", terms), ("gradient of each term, L2", gradients)]
    shown = [(title, keys) for title, keys in panels if keys]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
        for panel, (title, keys) in zip(axes, shown, strict=False):
            for i, key in enumerate(keys):
                label = plot_text(key.partition("_")[2])
                _curve(panel, student, key, 1, SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)], label)
            panel.set_yscale("log" if _positive(student, keys) else "linear")
            panel.set_title(title)
        _validation(axes[-1], trainings)
        for panel in axes:
            if finetuned_from:
                panel.axvline(finetuned_from + 0.5, color=GREY, linestyle="--", label="fine-tuning")
            panel.set_xlabel("epoch")
            panel.grid(alpha=0.6)
            if panel.get_legend_handles_labels()[0]:
                panel.legend()

    return Plot((4.2 * (len(shown) + 1), 3.4), draw)


def _validation(axes: Axes, trainings: dict[str, list[list[Line]]]) -> None:
    looks = (("student", BLUE, "o"), ("baseline", ORANGE, "s"))
    for name, colour, marker in looks:
        for key, style in (("val_accuracy", "-"), ("val_f1_macro", ":")):
            label = f"{name}, {'accuracy' if key == 'val_accuracy' else 'macro F1'}"
            _curve(axes, trainings.get(name, []), key, 100, colour, marker, label, style)
    axes.set_title("validation, %")


def _curve(
    axes: Axes, seeds: list[list[Line]], key: str, scale: float, colour: str, marker: str, label: str, style: str = "-"
) -> None:
    """The mean over the seeds that have come so far, with a shade over all of them."""
    lines = [[scale * line[key] for line in seed if key in line] for seed in seeds]
    lines = [values for values in lines if values]
    if not lines:
        return
    epochs = np.arange(1, max(map(len, lines)) + 1)
    padded = np.array([values + [np.nan] * (len(epochs) - len(values)) for values in lines])
    every = max(1, len(epochs) // 8)
    mean = np.nanmean(padded, axis=0)
    axes.plot(epochs, mean, style, color=colour, marker=marker, markevery=every, markersize=4, label=label)
    if len(lines) > 1:
        low, high = np.nanmin(padded, axis=0), np.nanmax(padded, axis=0)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)


def _keys(seeds: list[list[Line]], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for seed in seeds for line in seed for key in line if key.startswith(prefix)))


def _positive(seeds: list[list[Line]], keys: list[str]) -> bool:
    """Whether all values can stand on a logarithmic axis."""
    return all(line[key] > 0 for seed in seeds for line in seed for key in keys if key in line)


def plot_confusion(student: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]], names: list[str]) -> Plot:
    """Shares of each true class, and by how many points the student's differ from the teacher's."""
    own, theirs = _shares(student), _shares(teacher)
    side = min(7.0, 2.6 + 0.28 * len(names))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _matrix(figure, left, 100 * own, names, "student, % of each true class", "Blues", (0, 100))
        change = 100 * (own - theirs)
        most = float(max(np.nanmax(np.abs(change)), 1.0))
        _matrix(figure, right, change, names, "student − teacher, points", "PuOr", (-most, most))

    return Plot((2 * side + 1.4, side), draw)


def _shares(confusion: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """[K, K] of each row its shares; NaN where a class has no row."""
    counts = np.array(confusion, np.float64)
    rows = counts.sum(1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
    return shares


def _matrix(
    figure: Figure,
    axes: Axes,
    values: NDArray[np.float64],
    names: list[str],
    title: str,
    colours: str,
    span: tuple[float, float],
) -> None:
    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(values, cmap=colours, vmin=span[0], vmax=span[1])
    figure.colorbar(image, ax=axes, shrink=0.75)
    label_classes(axes, names, 14)
    counted = np.abs(np.nan_to_num(values)) >= 0.5
    for i, j in zip(*np.nonzero(counted), strict=True) if len(names) <= _COUNTED else ():
        colour = _legible(image.to_rgba(values[i, j])[:3])
        axes.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="guessed class", ylabel="true class")
    axes.set_title(title)
    axes.spines[:].set_visible(False)


def _legible(paper: Iterable[float]) -> str:
    """Black or white, whichever has the more contrast (4.5 to 1 at least, WCAG 2.1) with an sRGB colour of 0 … 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in paper]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#FFFFFF"


def plot_reliability(models: dict[str, dict[str, Any]]) -> Plot:
    """Accuracy over mean confidence of each bin. models: {name: soft_targets.calibration of it}."""

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="calibrated")
        for i, (name, found) in enumerate(models.items()):
            colour, marker = _KINDS[name]
            bins = [one for one in found["bins"] if one["rows"]]
            x, y = [100 * one["confidence"] for one in bins], [100 * one["accuracy"] for one in bins]
            label = f"{name}, ECE {100 * found['ece']:.2f} %"
            at = [100 * (one["low"] + one["high"]) / 2 for one in bins]
            share, width = [100 * one["rows"] / found["rows"] for one in bins], 6.0 / len(models)
            area = [12 + 1.6 * one for one in share]  # a bin of few rows says little
            above.plot(x, y, color=colour, linewidth=0.7, alpha=0.6)
            above.scatter(x, y, area, color=colour, marker=marker, label=label, clip_on=False, zorder=3)
            below.bar([x + (i - (len(models) - 1) / 2) * width for x in at], share, width, color=colour)
        above.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %")
        below.set(xlabel="confidence, %", ylabel="rows, %")
        above.legend(loc="upper left")
        for axes in (above, below):
            axes.grid(alpha=0.6)
            axes.set_axisbelow(True)

    return Plot((5.4, 4.8), draw)


def plot_agreement(found: Agreement) -> Plot:
    """Where the student follows its teacher, and where it should not have."""
    names = [f"teacher right\n({found.rows[0]:,} rows)", f"teacher wrong\n({found.rows[1]:,} rows)"]
    parts = ("says the same", "right, against the teacher", "wrong in its own way")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = np.zeros(2)
        for part, colour, hatch, shares in zip(
            parts, (BLUE, GREEN, ORANGE), ("", "//", ".."), zip(found.right, found.wrong, strict=True), strict=True
        ):
            values = 100 * np.array(shares)
            axes.barh(names, values, left=left, color=colour, hatch=hatch, edgecolor="#FFFFFF", label=part, height=0.6)
            left += values
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="% of the rows")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(parts))

    return Plot((7.2, 2.3), draw)
