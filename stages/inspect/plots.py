"""Images of what `softcache inspect` found. Needs matplotlib."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from softcache.stages.cli.plot_style import BLUE, GREY, ORANGE, Plot, label_classes, plot_text

_ACROSS = 3  # panels of channels beside each other


def _bars(axes: Axes, names: list[str], values: list[float], spread: list[float] | None = None) -> None:
    """Horizontal bars, the first on top, with error bars where there is a spread."""
    places = np.arange(len(names))
    axes.barh(places, values, xerr=spread, color=BLUE, ecolor=ORANGE, capsize=3, height=0.7)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def plot_taps(taps: dict[str, dict[str, Any]], teacher: float, majority: float, split: str) -> Plot:
    """Probe accuracy and permutation importance of each tap, side by side."""
    names = [plot_text(tap) for tap in taps]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, names, [found["accuracy"] for found in taps.values()])
        left.axvline(teacher, color=ORANGE, label="teacher")
        left.axvline(majority, color=GREY, linestyle="--", label="largest class")
        left.set_xlim(0, 1)
        left.set_xlabel(f"accuracy of a linear probe on {split}")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        importance = [found["importance"] for found in taps.values()]
        _bars(right, names, [found["mean"] for found in importance], [found["sd"] for found in importance])
        right.set_xlabel("accuracy that the joint probe loses\nwhen the tap is permuted (mean ± sd)")

    return Plot((10, 1.8 + 0.35 * len(names)), draw)


def plot_channels(channels: dict[str, list[dict[str, Any]]], most: int) -> Plot:
    """The first channels of each tap, in a panel of its own. channels: by tap, the most important first."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(-(-len(channels) // across), across, squeeze=False).ravel()
        for axes in panels[len(channels) :]:
            axes.set_visible(False)
        for axes, (tap, found) in zip(panels, channels.items(), strict=False):
            first = found[:most]
            spread = [row["sd"] for row in first]
            _bars(axes, [str(row["channel"]) for row in first], [row["mean"] for row in first], spread)
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=5)
            axes.set_title(plot_text(tap), fontsize=10)
            axes.set_ylabel("channel")
        figure.supxlabel("accuracy that the tap's probe loses when the channel is permuted (mean ± sd)", fontsize=10)

    across = min(_ACROSS, len(channels))
    return Plot((max(6.5, 3.6 * across), 0.8 + 3.4 * -(-len(channels) // across)), draw)


def plot_reliability(splits: dict[str, dict[str, Any]]) -> Plot:
    """Accuracy over mean confidence of each bin, and how many rows each has, for each split."""

    def draw(figure: Figure) -> None:
        for axes, (split, found) in zip(
            figure.subplots(1, len(splits), squeeze=False)[0], splits.items(), strict=True
        ):
            bins = [b for b in found["bins"] if b["rows"]]
            width = found["bins"][0]["high"]
            share = [b["rows"] / found["rows"] for b in bins]
            at = [(b["low"] + b["high"]) / 2 for b in bins]
            axes.bar(at, share, width, color=GREY, alpha=0.4, label="share of the rows")
            axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="calibrated")
            confidence, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            area = [20 + 180 * part for part in share]  # a bin of few rows says little
            axes.scatter(confidence, accuracy, area, color=BLUE, label="accuracy", clip_on=False, zorder=3)
            axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
            axes.set_title(f"{split}: ECE {found['ece']:.4f}, {found['rows']:,} rows", fontsize=10)
            axes.legend(loc="upper left", fontsize=8)

    return Plot((max(5.0, 4.6 * len(splits)), 4.4), draw)


def plot_similarity(matrix: NDArray[np.float64], names: list[str], what: str) -> Plot:
    """The matrix off its diagonal, which would leave no colours for the rest; grey where there is nothing to show."""
    K = len(matrix)
    shown = np.where(np.eye(K, dtype=bool), np.nan, matrix)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_facecolor("#DDDDDD")
        image = axes.imshow(shown, cmap="viridis", vmin=0)
        figure.colorbar(image, ax=axes, shrink=0.8, label="mean probability")
        label_classes(axes, names, 18)
        axes.set(xlabel="class of the probability", ylabel="true class")
        axes.set_title(what, fontsize=10)

    side = min(12.0, 3.2 + 0.28 * K)
    return Plot((side + 1.8, side), draw)


def plot_temperatures(records: list[dict[str, Any]], best: float) -> Plot:
    """How flat the targets are, and what they say beside the class, by temperature."""
    T = [record["temperature"] for record in records]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        if records[0]["share"] is not None:
            left.plot(T, [record["share"] for record in records], "o-", color=BLUE, label="entropy / log K")
        left.plot(T, [r["others"] for r in records], "s-", color=ORANGE, label="probability of the other classes")
        left.set(ylim=(0, 1), xlabel="temperature")
        left.legend(loc="lower right", fontsize=8)
        right.plot(T, [record["information"] for record in records], "o-", color=BLUE)
        right.axvline(best, color=ORANGE, linestyle="--", label=f"most at {best:g}")
        right.set(xlabel="temperature", ylabel="nats per row")
        right.set_ylim(bottom=0)
        right.set_title("what the classes beside the first say about a row", fontsize=10)
        right.legend(loc="upper right", fontsize=8)
        for axes in (left, right):
            axes.set_xticks(T)
            axes.grid(alpha=0.3)

    return Plot((10, 4), draw)
