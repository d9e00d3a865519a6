"""Plots of the findings of `softcache inspect`."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from softcache.stages.cli.plot_style import BLUE, GREY, ORANGE, Plot, label_classes, plot_text

_PANELS_PER_ROW = 3  # of channels


def plot_taps(taps: dict[str, dict[str, Any]], teacher: float, majority: float, split: str) -> Plot:
    """Plot probe accuracy and permutation importance of each tap, side by side.

    Args:
        taps: Of inspect.json.
        teacher: Its accuracy on the split.
        majority: Share of the largest class of the split.
        split: On which the probes were measured.
    """
    names = [plot_text(tap) for tap in taps]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _plot_bars(left, names, [tap["accuracy"] for tap in taps.values()])
        left.axvline(teacher, color=ORANGE, label="teacher")
        left.axvline(majority, color=GREY, linestyle="--", label="largest class")
        left.set_xlim(0, 1)
        left.set_xlabel(f"accuracy of a linear probe on {split}")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        importance = [tap["importance"] for tap in taps.values()]
        _plot_bars(right, names, [values["mean"] for values in importance], [values["sd"] for values in importance])
        right.set_xlabel("accuracy that the joint probe loses\nwhen the tap is permuted (mean ± sd)")

    return Plot((10, 1.8 + 0.35 * len(names)), draw)


def _plot_bars(axes: Axes, names: list[str], values: list[float], sd: list[float] | None = None) -> None:
    """Plot horizontal bars, the first on top, with error bars where there are standard deviations."""
    places = np.arange(len(names))
    axes.barh(places, values, xerr=sd, color=BLUE, ecolor=ORANGE, capsize=3, height=0.7)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def plot_channels(channels: dict[str, list[dict[str, Any]]], count: int) -> Plot:
    """Plot the most important channels of each tap, a panel per tap.

    Args:
        channels: {tap: its channels, the most important first}.
        count: Of the channels in a panel, at most.
    """
    columns = min(_PANELS_PER_ROW, len(channels))
    rows = -(-len(channels) // columns)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(channels) :]:
            axes.set_visible(False)
        for axes, (tap, tap_channels) in zip(panels, channels.items(), strict=False):
            first = tap_channels[:count]
            means, sds = [channel["mean"] for channel in first], [channel["sd"] for channel in first]
            _plot_bars(axes, [str(channel["channel"]) for channel in first], means, sds)
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=5)
            axes.set_title(plot_text(tap), fontsize=10)
            axes.set_ylabel("channel")
        figure.supxlabel("accuracy that the tap's probe loses when the channel is permuted (mean ± sd)", fontsize=10)

    return Plot((max(6.5, 3.6 * columns), 0.8 + 3.4 * rows), draw)


def plot_reliability(splits: dict[str, dict[str, Any]]) -> Plot:
    """Plot accuracy over the mean confidence of each bin, and the share of rows in each bin.

    Args:
        splits: {split: see `soft_targets.calibration`}.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(splits), squeeze=False)[0]
        for axes, (split, calibration) in zip(panels, splits.items(), strict=True):
            bins = [bin_ for bin_ in calibration["bins"] if bin_["rows"]]
            width = calibration["bins"][0]["high"]
            share = [bin_["rows"] / calibration["rows"] for bin_ in bins]
            centre = [(bin_["low"] + bin_["high"]) / 2 for bin_ in bins]
            axes.bar(centre, share, width, color=GREY, alpha=0.4, label="share of the rows")
            axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="calibrated")
            confidence, accuracy = [bin_["confidence"] for bin_ in bins], [bin_["accuracy"] for bin_ in bins]
            area = [20 + 180 * value for value in share]  # the accuracy of few rows is uncertain
            axes.scatter(confidence, accuracy, area, color=BLUE, label="accuracy", clip_on=False, zorder=3)
            axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
            axes.set_title(f"{split}: ECE {calibration['ece']:.4f}, {calibration['rows']:,} rows", fontsize=10)
            axes.legend(loc="upper left", fontsize=8)

    return Plot((max(5.0, 4.6 * len(splits)), 4.4), draw)


def plot_similarity(matrix: NDArray[np.float64], names: list[str], title: str) -> Plot:
    """Plot the similarity of classes. The diagonal is left out: it would take all the colours; NaN is grey.

    Args:
        matrix: [K, K], see `soft_targets.similarity`.
        names: Of the K classes.
        title: Of the plot.
    """
    K = len(matrix)
    off_diagonal = np.where(np.eye(K, dtype=bool), np.nan, matrix)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_facecolor("#DDDDDD")
        image = axes.imshow(off_diagonal, cmap="viridis", vmin=0)
        figure.colorbar(image, ax=axes, shrink=0.8, label="mean probability")
        label_classes(axes, names, 18)
        axes.set(xlabel="class of the probability", ylabel="true class")
        axes.set_title(title, fontsize=10)

    side = min(12.0, 3.2 + 0.28 * K)
    return Plot((side + 1.8, side), draw)


def plot_temperatures(records: list[dict[str, Any]], best: float) -> Plot:
    """Plot entropy and information of the soft targets by temperature.

    Args:
        records: Of each temperature, see `soft_targets.soft_target_statistics`.
        best: The temperature with the most information.
    """
    T = [record["temperature"] for record in records]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        if records[0]["share"] is not None:
            left.plot(T, [record["share"] for record in records], "o-", color=BLUE, label="entropy / log K")
        others = [record["others"] for record in records]
        left.plot(T, others, "s-", color=ORANGE, label="probability of the other classes")
        left.set(ylim=(0, 1), xlabel="temperature")
        left.legend(loc="lower right", fontsize=8)
        right.plot(T, [record["information"] for record in records], "o-", color=BLUE)
        right.axvline(best, color=ORANGE, linestyle="--", label=f"maximum at {best:g}")
        right.set(xlabel="temperature", ylabel="nats per row")
        right.set_ylim(bottom=0)
        right.set_title("information on a row in the classes besides the first", fontsize=10)
        right.legend(loc="upper right", fontsize=8)
        for axes in (left, right):
            axes.set_xticks(T)
            axes.grid(alpha=0.3)

    return Plot((10, 4), draw)
