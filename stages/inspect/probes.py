"""Linear probes of every tap of a cache, one joint probe of all, and what each tap and channel is worth to them."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.data.transfer_set import Labels
from softcache.pipeline.cache.reader import Cache
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

_ALL = ""  # the joint probe: a name that no tap has


@dataclass(frozen=True)
class Sample:
    """Rows of draw 0 of a split, at positions [n], with labels [n], -1 for none; of: rows that the split has.

    The first rows of a split are a random sample of it: rows are stored in a mixed order.
    """

    split: str
    positions: Positions
    labels: Labels
    of: int

    def labelled(self) -> "Sample":
        """Those of the rows that have a label."""
        known = self.labels >= 0
        return Sample(self.split, self.positions[known], self.labels[known], self.of)

    def first(self, rows: int) -> "Sample":
        """At most so many of the rows."""
        return Sample(self.split, self.positions[:rows], self.labels[:rows], self.of)


def probe_taps(
    cache: Cache, train: Sample, test: Sample, teacher: NDArray[np.floating], config: InspectConfig
) -> dict[str, Any]:
    """taps, channels, joint and best, as in inspect.json. teacher: its logits [m, K] of the test sample."""
    forms = {tap: describe_tap(tap, shape) for tap, shape in cache.manifest.taps.items()}
    x = _read(cache, train, test, config.seed)
    probes = _fit(x, train.labels)
    held_out = {tap: both[1] for tap, both in x.items()} | {_ALL: np.concatenate([both[1] for both in x.values()], 1)}
    found = _importance(forms, probes, held_out, test.labels, config)
    figures = {
        name: summarize(probe.logits(held_out[name], cache.classes), test.labels) | {"converged": probe.converged}
        for name, probe in probes.items()
    }
    taps: dict[str, dict[str, Any]] = {
        tap: {"form": form.words, "columns": form.columns, **figures[tap], "importance": found[_ALL][place]}
        for place, (tap, form) in enumerate(forms.items())
    }
    return {
        "taps": taps,
        "channels": {tap: _ranked(rows) for tap, rows in found.items() if tap != _ALL},
        "best": max(taps, key=lambda tap: (taps[tap]["accuracy"], taps[tap]["importance"]["mean"])),
        "joint": figures[_ALL]
        | {
            "split": test.split,
            "rows": len(test.labels),
            "of": test.of,
            "train_rows": len(train.labels),
            "train_of": train.of,
            "teacher": summarize(teacher, test.labels)["accuracy"],
            "majority": float(np.bincount(test.labels).max() / len(test.labels)),
            "classes_without_rows": sorted(set(range(cache.classes)) - set(test.labels.tolist())),
        },
    }


def _importance(
    forms: dict[str, TapForm], probes: dict[str, Probe], x: dict[str, Floats], labels: Labels, config: InspectConfig
) -> dict[str, list[dict[str, float]]]:
    """Mean and sd of each tap, in order, for the probe of all; of each channel for the probe of its tap."""
    ends = np.cumsum([0, *(form.columns for form in forms.values())]).tolist()
    groups = {_ALL: tuple(slice(a, b) for a, b in pairwise(ends))}
    groups |= {tap: form.channels for tap, form in forms.items() if form.channels}
    predictions = sum(1 + len(own) * config.repeats for own in groups.values())
    found = {}
    with progress_bar(predictions, "permutation importance", "prediction") as shown:
        for name, own in groups.items():
            both = measure_importance(probes[name], x[name], labels, own, config.repeats, config.seed, shown.update)
            found[name] = [{"mean": float(mean), "sd": float(sd)} for mean, sd in zip(*both, strict=True)]
    return found


def _read(cache: Cache, train: Sample, test: Sample, seed: int) -> dict[str, tuple[Floats, Floats]]:
    """{tap: standardised columns of the training and of the test sample}."""
    taps = cache.manifest.taps
    x = {}
    with progress_bar(len(taps) * (len(train.positions) + len(test.positions)), "reading taps", "row") as shown:
        for tap in taps:
            both = [read_columns(cache, s.split, s.positions, tap, seed, shown.update) for s in (train, test)]
            x[tap] = standardize(*both)
    return x


def _fit(x: dict[str, tuple[Floats, Floats]], labels: Labels) -> dict[str, Probe]:
    """A probe of each tap, and under _ALL the joint one, of all their columns."""
    probes = {}
    with progress_bar(len(x) + 1, "linear probes", "probe") as shown:
        for tap, (train, _) in x.items():
            probes[tap] = fit_probe(train, labels)
            shown.update()
        probes[_ALL] = fit_probe(np.concatenate([train for train, _ in x.values()], 1), labels)
        shown.update()
    return probes


def _ranked(rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The channels of a tap, the most important first."""
    numbered = [{"channel": channel, **row} for channel, row in enumerate(rows)]
    return sorted(numbered, key=lambda row: -row["mean"])
