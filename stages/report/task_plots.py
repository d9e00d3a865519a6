"""The plots of a report for the tasks beside classes: F1 of each label, predicted numbers, cosines of embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from softcache.stages.cli.plot_style import BLUE, GREEN, GREY, ORANGE, Plot, plot_text

_COLOURS = {"teacher": GREEN, "baseline": ORANGE, "student": BLUE}
_MARKERS = {"teacher": "^", "baseline": "s", "student": "o"}
_MOST_LABELS, _MOST_OUTPUTS, _MOST_POINTS = 40, 4, 2000  # that are drawn


def plot_label_f1(f1: Mapping[str, Sequence[float | None]], names: Sequence[str]) -> Plot:
    """Plot F1 of each label as bars, the lowest of the student first; of many labels the lowest 40.

    Args:
        f1: {model: F1 of each label, 0 … 1; None without a positive row}.
        names: Of the labels.
    """
    student = f1["student"]
    order = sorted((k for k, value in enumerate(student) if value is not None), key=lambda k: student[k] or 0)
    order = order[:_MOST_LABELS]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        height = 0.8 / len(f1)
        for i, (model, values) in enumerate(f1.items()):
            known = [(row, values[k]) for row, k in enumerate(order) if values[k] is not None]
            places = [row + (i - (len(f1) - 1) / 2) * height for row, _ in known]
            shares = [100 * (value or 0) for _, value in known]
            axes.barh(places, shares, height, color=_COLOURS[model], label=model)
        axes.set_yticks(range(len(order)), [plot_text(names[k], 24) for k in order])
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="F1, %")
        axes.grid(axis="x", alpha=0.6)
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(f1))

    return Plot((7.2, 1.4 + 0.32 * len(order)), draw)


def plot_numbers(
    outputs: Mapping[str, NDArray[np.floating]], numbers: NDArray[np.floating], names: Sequence[str]
) -> Plot:
    """Plot predicted over true numbers, of the first four outputs and the first 2,000 rows.

    Args:
        outputs: {model: [N, D]}.
        numbers: [N, D], NaN where unknown.
        names: Of the D outputs.
    """
    count = min(_MOST_OUTPUTS, numbers.shape[1])

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, count, squeeze=False)[0]
        for d, axes in enumerate(all_axes):
            known = np.flatnonzero(~np.isnan(numbers[:, d]))[:_MOST_POINTS]
            truth = numbers[known, d]
            for model, values in outputs.items():
                axes.scatter(
                    truth, values[known, d], 12, color=_COLOURS[model], marker=_MARKERS[model], alpha=0.5, label=model
                )
            if len(truth):
                ends = [truth.min(), truth.max()]
                axes.plot(ends, ends, color=GREY, linestyle="--", label="equal")
            axes.set(xlabel="true", title=plot_text(names[d], 30))
            axes.grid(alpha=0.6)
            axes.set_axisbelow(True)
        all_axes[0].set_ylabel("predicted")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))

    return Plot((max(4.4, 3.6 * count), 4.2), draw)


def plot_cosines(cosines: NDArray[np.floating]) -> Plot:
    """Plot how the cosines of the student's embeddings to the teacher's are distributed.

    Args:
        cosines: -1 … 1, of all rows and seeds.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        weights: Any = np.full(len(cosines), 100 / len(cosines))
        axes.hist(cosines, bins=30, weights=weights, color=BLUE)
        axes.axvline(float(cosines.mean()), color=GREY, linestyle="--", label=f"mean {cosines.mean():.4f}")
        axes.set(xlabel="cosine of student and teacher", ylabel="rows, %")
        axes.grid(alpha=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left")

    return Plot((5.4, 3.2), draw)
