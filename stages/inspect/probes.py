"""Linear probes of all taps of a cache, a joint probe of all of them, and the importance of taps and channels."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.data.transfer_set import Labels
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.rows import Positions
from softcache.pipeline.metrics.classification import summarize
from softcache.stages.cli.configs import InspectConfig
from softcache.stages.cli.console import progress_bar

from .linear_probe import (
    Floats,
    Probe,
    TapForm,
    describe_tap,
    fit_probe,
    measure_importance,
    read_columns,
    standardize,
)

_JOINT = ""  # the key of the joint probe: no tap has an empty name


@dataclass(frozen=True)
class Sample:
    """Rows of draw 0 of a split. The first rows of a split are a random sample: rows are stored in random order.

    Attributes:
        split: Of the cache.
        positions: [n], of the rows in the split.
        labels: [n], -1 for rows without a label.
        split_rows: Number of rows of the split.
    """

    split: str
    positions: Positions
    labels: Labels
    split_rows: int

    def drop_unlabelled(self) -> "Sample":
        """Return the rows with a label."""
        has_label = self.labels >= 0
        return Sample(self.split, self.positions[has_label], self.labels[has_label], self.split_rows)

    def take_first(self, rows: int) -> "Sample":
        """Return the first rows, at most so many."""
        return Sample(self.split, self.positions[:rows], self.labels[:rows], self.split_rows)


def probe_taps(
    cache: CacheReader, train: Sample, test: Sample, *, teacher_logits: NDArray[np.floating], config: InspectConfig
) -> dict[str, Any]:
    """Fit and measure a probe of each tap and the joint probe.

    Args:
        cache: With at least one tap.
        train: Rows with labels of at least two classes, on which probes are fitted.
        test: Rows with labels, on which they are measured.
        teacher_logits: [m, K], of the test sample.
        config: Options of the command.

    Returns:
        taps, channels, best and joint, as in inspect.json.
    """
    forms = {tap: describe_tap(tap, shape) for tap, shape in cache.manifest.taps.items()}
    train_columns, test_columns = _read_standardized(cache, train, test, config.seed)
    probes = _fit_probes(train_columns, train.labels)
    test_columns[_JOINT] = np.concatenate(list(test_columns.values()), 1)
    importance = _measure_importances(forms, probes, test_columns, labels=test.labels, config=config)
    metrics = {
        name: summarize(probe.compute_logits(test_columns[name], cache.classes), test.labels)
        | {"converged": probe.converged}
        for name, probe in probes.items()
    }
    taps: dict[str, dict[str, Any]] = {
        tap: {"form": form.description, "columns": form.columns, **metrics[tap], "importance": tap_importance}
        for (tap, form), tap_importance in zip(forms.items(), importance[_JOINT], strict=True)
    }
    return {
        "taps": taps,
        "channels": {tap: _rank_channels(channels) for tap, channels in importance.items() if tap != _JOINT},
        "best": max(taps, key=lambda tap: (taps[tap]["accuracy"], taps[tap]["importance"]["mean"])),
        "joint": metrics[_JOINT]
        | {
            "split": test.split,
            "rows": len(test.labels),
            "of": test.split_rows,
            "train_rows": len(train.labels),
            "train_of": train.split_rows,
            "teacher": summarize(teacher_logits, test.labels)["accuracy"],
            "majority": float(np.bincount(test.labels).max() / len(test.labels)),
            "classes_without_rows": sorted(set(range(cache.classes)) - set(test.labels.tolist())),
        },
    }


def _read_standardized(
    cache: CacheReader, train: Sample, test: Sample, seed: int
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Read {tap: standardised columns} of the training and of the test sample."""
    train_columns, test_columns = {}, {}
    rows = len(train.positions) + len(test.positions)
    with progress_bar(len(cache.manifest.taps) * rows, "reading taps", "row") as bar:
        for tap in cache.manifest.taps:
            train_columns[tap], test_columns[tap] = standardize(
                read_columns(cache, train.split, train.positions, tap, seed=seed, on_progress=bar.update),
                read_columns(cache, test.split, test.positions, tap, seed=seed, on_progress=bar.update),
            )
    return train_columns, test_columns


def _fit_probes(columns: dict[str, Floats], labels: Labels) -> dict[str, Probe]:
    """Fit a probe of each tap, and the joint one of all columns."""
    probes = {}
    with progress_bar(len(columns) + 1, "linear probes", "probe") as bar:
        for tap, x in columns.items():
            probes[tap] = fit_probe(x, labels)
            bar.update()
        probes[_JOINT] = fit_probe(np.concatenate(list(columns.values()), 1), labels)
        bar.update()
    return probes


def _measure_importances(
    forms: dict[str, TapForm],
    probes: dict[str, Probe],
    columns: dict[str, Floats],
    *,
    labels: Labels,
    config: InspectConfig,
) -> dict[str, list[dict[str, float]]]:
    """Measure the importance of each tap in the joint probe, and of each channel in the probe of its tap.

    Returns:
        {name of a probe: {mean, sd} of each of its taps or channels, in their order}.
    """
    ends = np.cumsum([0, *(form.columns for form in forms.values())]).tolist()
    groups = {_JOINT: tuple(slice(start, end) for start, end in pairwise(ends))}
    groups |= {tap: form.channels for tap, form in forms.items() if form.channels}
    predictions = sum(1 + len(slices) * config.repeats for slices in groups.values())
    importance = {}
    with progress_bar(predictions, "permutation importance", "prediction") as bar:
        for name, slices in groups.items():
            means, sds = measure_importance(
                probes[name],
                columns[name],
                labels,
                slices,
                repeats=config.repeats,
                seed=config.seed,
                on_progress=bar.update,
            )
            importance[name] = [{"mean": float(mean), "sd": float(sd)} for mean, sd in zip(means, sds, strict=True)]
    return importance


def _rank_channels(importance: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Number the channels of a tap and sort them, the most important first."""
    channels = [{"channel": channel, **values} for channel, values in enumerate(importance)]
    return sorted(channels, key=lambda channel: -channel["mean"])
