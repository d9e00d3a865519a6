"""The plots of a report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, BboxBase
from numpy.typing import NDArray

from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS
from softcache.pipeline.metrics.tasks import LOWER_IS_BETTER
from softcache.stages.cli.plot_style import BLUE, GREEN, GREY, MARKERS, ORANGE, SERIES, Plot, label_classes, plot_text
from softcache.stages.runs.figures import IN_PERCENT, TITLES

from .agreement import Agreement
from .load import EpochMetrics

_MAX_LABELS = 12  # networks up to which points have names, and classes up to which cells have numbers
# Where a label may be, the best place first: its offset in points, and which side of it is at the offset.
_LABEL_PLACES = [
    (dx * far, dy * far, ha, va)
    for far in (1, 2, 3.5)
    for dx, dy, ha, va in (
        (-6, 4, "right", "bottom"),
        (6, 4, "left", "bottom"),
        (6, -4, "left", "top"),
        (-6, -4, "right", "top"),
        (0, 8, "center", "bottom"),
        (0, -8, "center", "top"),
    )
]
_FEW_ROWS = 10  # a bin with fewer is hollow: its accuracy is uncertain
_CURVES = {  # the validation figures of the curves
    CLASSES: ("accuracy", "f1_macro"),
    LABELS: ("map", "f1_macro"),
    NUMBERS: ("rmse", "mae"),
    EMBEDDING: ("cosine",),
}
_KINDS = {"student": (BLUE, "o"), "baseline": (ORANGE, "s"), "teacher": (GREEN, "^")}


@dataclass(frozen=True)
class Point:
    """A network in the plot of costs.

    Attributes:
        name: Its label.
        kind: "teacher", "baseline" or "student".
        value: Its main figure; an accuracy is 0 … 1.
        sd: Standard deviation of the figure over seeds.
        parameters: Number of parameters; None where unknown.
        milliseconds: Latency of one image; None where unknown.
    """

    name: str
    kind: str
    value: float
    sd: float
    parameters: int | None
    milliseconds: float | None


def plot_costs(points: Sequence[Point], figure_name: str = "accuracy") -> Plot:
    """Plot the main figure over size and over latency, with the Pareto front as a line.

    Args:
        points: The networks.
        figure_name: Name of the figure.
    """
    scale = 100 if figure_name in IN_PERCENT else 1
    scaled = [replace(point, value=scale * point.value, sd=scale * point.sd) for point in points]
    return _plot_scaled_costs(scaled, figure_name)


def _plot_scaled_costs(points: Sequence[Point], figure_name: str) -> Plot:
    """Plot values in the unit of the axis."""

    sign = -1 if figure_name in LOWER_IS_BETTER else 1

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        costs = {"parameters": "parameters", "milliseconds": "ms per image, one thread"}
        shown: dict[Axes, list[tuple[float, Point]]] = {}
        for axes, (attribute, label) in zip(panels, costs.items(), strict=True):
            known = [point for point in points if getattr(point, attribute)]
            _plot_points(axes, known, [getattr(point, attribute) for point in known], sign)
            for point in points:
                if point.kind == "teacher" and point not in known:
                    axes.axhline(point.value, color=GREEN, linestyle=":", label="teacher")
            axes.set_xlabel(label)
            axes.grid(alpha=0.6)
            shown[axes] = [(getattr(point, attribute), point) for point in known]
        unit = ", %" if figure_name in IN_PERCENT else ""
        panels[0].set_ylabel(f"{TITLES[figure_name]}{unit}")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        _label_points(figure, shown)

    return Plot((9, 4.4), draw)


def _plot_points(axes: Axes, points: Sequence[Point], costs: Sequence[float], sign: int) -> None:
    """Plot a figure over cost on a logarithmic axis. costs: of the points; sign: -1 where lower is better."""
    front = find_pareto(costs, [sign * point.value for point in points])
    if len(front) > 1:
        x, y = [costs[i] for i in front], [points[i].value for i in front]
        axes.plot(x, y, color=GREY, linewidth=1, zorder=1, label="Pareto front")
    for kind, (colour, marker) in _KINDS.items():
        of_kind = [(cost, point) for cost, point in zip(costs, points, strict=True) if point.kind == kind]
        if of_kind:
            x, y = [cost for cost, _ in of_kind], [point.value for _, point in of_kind]
            sd = [point.sd for _, point in of_kind]
            axes.errorbar(x, y, sd if any(sd) else None, fmt=marker, color=colour, capsize=3, label=kind)
    if points:
        axes.set_xscale("log")
        axes.margins(0.25, 0.15)
        is_narrow = max(costs) < 30 * min(costs)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if min(costs) >= 100 else "{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _label_points(figure: Figure, panels: dict[Axes, list[tuple[float, Point]]]) -> None:
    """Write the names of networks beside their points, where a label covers no point and no other label.

    A baseline has no label: it has the name of its student, and is close to it. A name that finds no room is left out.

    Args:
        figure: With everything else drawn.
        panels: {axes: (cost, network) of its points}.
    """
    figure.draw_without_rendering()  # the places of the axes are final after this
    for axes, points in panels.items():
        places = axes.transData.transform([(cost, point.value) for cost, point in points])
        taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in places]
        labelled = [(cost, point) for cost, point in points if point.kind != "baseline"]
        for cost, point in labelled if len(labelled) <= _MAX_LABELS else ():
            for dx, dy, ha, va in _LABEL_PLACES:
                label = axes.annotate(
                    plot_text(point.name, 20),
                    (cost, point.value),
                    (dx, dy),
                    ha=ha,
                    va=va,
                    textcoords="offset points",
                    fontsize=8,
                )
                label.set_in_layout(False)
                extent = label.get_window_extent()
                if _contains(axes.bbox, extent) and not any(extent.overlaps(other) for other in taken):
                    taken.append(extent)
                    break
                label.remove()


def _contains(outer: BboxBase, inner: BboxBase) -> bool:
    return bool(outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1)


def find_pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Find the Pareto front of minimal cost and maximal value.

    Args:
        costs: Of the items.
        values: Of the items.

    Returns:
        Indices of the items that are better than every item of the same or a lower cost, by rising cost.
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[i] > values[front[-1]]:
            front.append(i)
    return front


def plot_curves(trainings: dict[str, list[list[EpochMetrics]]], finetuned_from: int, task: str = CLASSES) -> Plot:
    """Plot the terms of the student's loss, their gradients, and the task's validation figures by epoch.

    A line is the mean over seeds, the shade around it spans all seeds.

    Args:
        trainings: {"student" or "baseline": of each seed the metrics of each epoch}.
        finetuned_from: The epoch after which fine-tuning from hard targets alone begins; 0 without it.
        task: Of the runs: accuracy and macro F1 of classes, mAP and macro F1 of labels, RMSE and MAE of numbers, the
            cosine of embeddings.
    """
    student = trainings["student"]
    panels = [
        ("terms of the loss", _list_keys(student, "loss_")),
        ("gradient of each term, L2", _list_keys(student, "gradient_")),
    ]
    panels = [(title, keys) for title, keys in panels if keys]

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
        for axes, (title, keys) in zip(all_axes, panels, strict=False):
            for i, key in enumerate(keys):
                _plot_curve(
                    axes,
                    student,
                    key,
                    colour=SERIES[i % len(SERIES)],
                    marker=MARKERS[i % len(MARKERS)],
                    label=plot_text(key.partition("_")[2]),
                )
            axes.set_yscale("log" if _are_positive(student, keys) else "linear")
            axes.set_title(title)
        _plot_validation(all_axes[-1], trainings, task)
        for axes in all_axes:
            if finetuned_from:
                axes.axvline(finetuned_from + 0.5, color=GREY, linestyle="--", label="fine-tuning")
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.6)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()

    return Plot((4.2 * (len(panels) + 1), 3.4), draw)


def _plot_validation(axes: Axes, trainings: dict[str, list[list[EpochMetrics]]], task: str) -> None:
    names = _CURVES[task]
    is_share = names[0] in IN_PERCENT
    for model in ("student", "baseline"):
        colour, marker = _KINDS[model]
        for name, style in zip(names, ("-", ":"), strict=False):
            _plot_curve(
                axes,
                trainings.get(model, []),
                f"val_{name}",
                scale=100 if is_share else 1,
                colour=colour,
                marker=marker,
                label=f"{model}, {TITLES[name]}",
                style=style,
            )
    axes.set_title("validation, %" if is_share else "validation")


def _plot_curve(
    axes: Axes,
    seeds: list[list[EpochMetrics]],
    key: str,
    *,
    colour: str,
    marker: str,
    label: str,
    scale: float = 1,
    style: str = "-",
) -> None:
    """Plot the mean of a metric over the seeds that have reached each epoch, with a shade over all of them."""
    curves = [[scale * metrics[key] for metrics in seed if key in metrics] for seed in seeds]
    curves = [values for values in curves if values]
    if not curves:
        return
    epochs = np.arange(1, max(map(len, curves)) + 1)
    padded = np.array([values + [np.nan] * (len(epochs) - len(values)) for values in curves])
    mean = np.nanmean(padded, axis=0)
    step = max(1, len(epochs) // 8)
    axes.plot(epochs, mean, style, color=colour, marker=marker, markevery=step, markersize=4, label=label)
    if len(curves) > 1:
        low, high = np.nanmin(padded, axis=0), np.nanmax(padded, axis=0)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)


def _list_keys(seeds: list[list[EpochMetrics]], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for seed in seeds for metrics in seed for key in metrics if key.startswith(prefix)))


def _are_positive(seeds: list[list[EpochMetrics]], keys: list[str]) -> bool:
    """Whether all values can be drawn on a logarithmic axis."""
    return all(metrics[key] > 0 for seed in seeds for metrics in seed for key in keys if key in metrics)


def plot_confusion(student: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]], names: list[str]) -> Plot:
    """Plot the student's confusion matrix in % of each true class, and its difference from the teacher's in points.

    Args:
        student: Counts [K, K]: rows are true classes, columns predicted ones.
        teacher: The same of the teacher.
        names: Of the K classes.
    """
    student_shares, teacher_shares = _compute_row_shares(student), _compute_row_shares(teacher)
    side = min(7.0, 2.6 + 0.28 * len(names))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        title = "student, % of each true class"
        _plot_matrix(left, 100 * student_shares, names, title=title, colours="Blues", span=(0, 100))
        difference = 100 * (student_shares - teacher_shares)
        most = float(max(np.nanmax(np.abs(difference)), 1.0))
        title = "student − teacher, points"
        _plot_matrix(right, difference, names, title=title, colours="PuOr", span=(-most, most))

    return Plot((2 * side + 1.4, side), draw)


def _compute_row_shares(confusion: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Divide each row [K] of a matrix [K, K] by its sum; NaN where that is 0."""
    counts = np.array(confusion, np.float64)
    rows = counts.sum(1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
    return shares


def _plot_matrix(
    axes: Axes,
    values: NDArray[np.float64],
    names: list[str],
    *,
    title: str,
    colours: str,
    span: tuple[float, float],
) -> None:
    """Plot a matrix [K, K] of classes, with its numbers where classes are few."""
    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(values, cmap=colours, vmin=span[0], vmax=span[1])
    axes.figure.colorbar(image, ax=axes, shrink=0.75)
    label_classes(axes, names, 14)
    if len(names) <= _MAX_LABELS:
        rounds_to_nonzero = np.abs(np.nan_to_num(values)) >= 0.5
        for i, j in zip(*np.nonzero(rounds_to_nonzero), strict=True):
            colour = _choose_text_colour(image.to_rgba(values[i, j])[:3])
            axes.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title)
    axes.spines[:].set_visible(False)


def _choose_text_colour(background: Iterable[float]) -> str:
    """Return black or white, whichever has the more contrast with an sRGB colour of 0 … 1; at least 4.5 to 1.

    Source:
        WCAG 2.1, relative luminance and contrast ratio.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#FFFFFF"


def plot_reliability(models: dict[str, dict[str, Any]]) -> Plot:
    """Plot accuracy over the mean confidence of each bin, and the share of rows in each bin.

    Bins of fewer than 10 rows are hollow.

    Args:
        models: {model: see `soft_targets.calibration`}.
    """

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="calibrated")
        for i, (model, calibration) in enumerate(models.items()):
            colour, marker = _KINDS[model]
            bins = [bin_ for bin_ in calibration["bins"] if bin_["rows"]]
            x, y = [100 * bin_["confidence"] for bin_ in bins], [100 * bin_["accuracy"] for bin_ in bins]
            label = f"{model}, ECE {100 * calibration['ece']:.2f} %"
            centre = [100 * (bin_["low"] + bin_["high"]) / 2 for bin_ in bins]
            share, width = [100 * bin_["rows"] / calibration["rows"] for bin_ in bins], 6.0 / len(models)
            area = [12 + 1.6 * percent for percent in share]
            upper.plot(x, y, color=colour, linewidth=0.7, alpha=0.6)
            faces = [colour if bin_["rows"] >= _FEW_ROWS else "none" for bin_ in bins]
            upper.scatter(x, y, area, facecolors=faces, edgecolors=colour, marker=marker, clip_on=False, zorder=3)
            upper.plot([], [], color=colour, marker=marker, linestyle="none", label=label)
            lower.bar([x + (i - (len(models) - 1) / 2) * width for x in centre], share, width, color=colour)
        upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %")
        lower.set(xlabel="confidence, %", ylabel="rows, %")
        upper.legend(loc="upper left")
        for axes in (upper, lower):
            axes.grid(alpha=0.6)
            axes.set_axisbelow(True)

    return Plot((5.4, 4.8), draw)


def plot_agreement(agreement: Agreement) -> Plot:
    """Plot the shares of Agreement as two bars: rows where the teacher is right, and where it is wrong."""
    names = [
        f"teacher right\n({agreement.rows[0]:,} rows)",
        f"teacher wrong\n({agreement.rows[1]:,} rows)",
    ]
    styles = (("same class", BLUE, ""), ("right, other class", GREEN, "//"), ("wrong, other class", ORANGE, ".."))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = np.zeros(2)
        for (label, colour, hatch), right, wrong in zip(styles, agreement.right, agreement.wrong, strict=True):
            values = 100 * np.array([right, wrong])
            axes.barh(
                names, values, left=left, color=colour, hatch=hatch, edgecolor="#FFFFFF", label=label, height=0.6
            )
            left += values
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="% of the rows")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(styles))

    return Plot((7.2, 2.3), draw)
