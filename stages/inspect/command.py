"""`softcache inspect`: what in the teacher matters, from its cache alone: taps, channels, classes, temperatures."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError
from softcache.base.files import make_folder, publish_json, publish_text
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.rows import Positions
from softcache.pipeline.metrics.soft_targets import (
    TEMPERATURES,
    calibration,
    most_confused,
    similarity,
    soft_target_statistics,
)
from softcache.stages.cli.configs import InspectConfig
from softcache.stages.cli.console import Console, format_duration, progress, progress_bar
from softcache.stages.cli.extras import require_extra
from softcache.stages.runs.environment import library_versions
from softcache.stages.runs.folder import find_free_folder

from .probes import Sample, probe_taps
from .suggestion import suggest_student
from .summary import print_findings

_PAIRS = 10  # of classes, in inspect.json
_SHOWN = 15  # channels of a tap, in inspect.json and in its panel
_BLOCK = 4096  # rows whose logits are read at once


def run(name: str, config: InspectConfig) -> None:
    """Everything is computed before the first file is written; inspect.json is the last."""
    console, begun = Console(config.json), time.monotonic()
    require_extra("inspect draws with", "report", "matplotlib")
    cache = Cache(Path(name))
    folder = _folder(config, cache)
    train, held_out = _samples(cache, config.rows)
    found = _teacher(cache, train, held_out, config) | _taps(cache, train, held_out, config)
    found["command"] = suggest_student(cache, found["best"]) if found["best"] else None
    make_folder(folder)
    files = _publish(folder, found, config)
    record = {
        "cache": name,
        "fingerprint": cache.manifest.fingerprint,
        "teacher": cache.teacher,
        "settings": asdict(config) | {"out": str(folder)},
        **_summary(found),
        "files": files,
        "versions": library_versions(),
        "seconds": time.monotonic() - begun,
    }
    publish_json(folder / "inspect.json", record)
    if config.json:
        return console.print_json(json.dumps(record))
    print_findings(record, console)
    console.print(f"files: {folder}/inspect.json, {', '.join(files)} ({format_duration(record['seconds'])})")
    if record["best"]:
        console.print(f"best tap: {record['best']}, hint from it with  {record['command']}")


def _folder(config: InspectConfig, cache: Cache) -> Path:
    """Where the findings go: nowhere yet. Raises UsageError for a place that holds something."""
    if not config.out:
        return find_free_folder(f"inspect-{cache.folder.resolve().name}")
    folder = Path(config.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is not empty: choose another --out")
    return folder


def _samples(cache: Cache, rows: int) -> tuple[Sample, list[Sample]]:
    """The first rows of training, and all rows of val and test that have a label, where there are any."""
    train = _sample(cache, "train", rows)
    if cache.views.mixup:  # a view of two images has no one label
        train = replace(train, labels=np.full_like(train.labels, -1))
    splits = [split for split in ("val", "test") if split in cache.manifest.splits]
    held_out = [_sample(cache, split, cache.manifest.splits[split]).labelled() for split in splits]
    return train, [rows for rows in held_out if len(rows.labels)]


def _sample(cache: Cache, split: str, rows: int) -> Sample:
    """The first rows of a split, with their labels. Raises CacheError for what is no class."""
    of = cache.manifest.splits[split]
    positions = np.arange(min(rows, of))
    labels = cache.read_rows(split, 0, "label", positions).astype(np.int64)
    if len(labels) and not -1 <= labels.min() <= labels.max() < cache.classes:
        span = f"{labels.min()} to {labels.max()}"
        raise CacheError(f"'{cache.folder}': labels of {split} are {span}, and there are {cache.classes} classes")
    return Sample(split, positions, labels, of)


def _logits(cache: Cache, split: str, positions: Positions) -> Any:
    """float32 [n, K] of draw 0, read by blocks."""
    parts = []
    with progress_bar(len(positions), f"logits of {split}", "row") as shown:
        for at in range(0, len(positions), _BLOCK):
            parts.append(cache.read_stored(split, 0, positions[at : at + _BLOCK])[0].numpy())
            shown.update(len(parts[-1]))
    return np.concatenate(parts)


def _names(cache: Cache) -> list[str]:
    """Of the classes: their numbers, where the data have no names for them."""
    names = [str(name) for name in cache.manifest.identity["transfer_set"]["classes"]]
    return names if len(names) == cache.classes else [str(c) for c in range(cache.classes)]


def _teacher(cache: Cache, train: Sample, held_out: list[Sample], config: InspectConfig) -> dict[str, Any]:
    """Calibration and class similarity on the held-out rows; soft targets by temperature on the training rows."""
    said = {rows.split: (_logits(cache, rows.split, rows.positions), rows.labels) for rows in held_out}
    split = next(iter(said), None)
    logits = _logits(cache, "train", train.positions)
    target = np.where(train.labels < 0, logits.argmax(1), train.labels)
    counted = progress(TEMPERATURES, len(TEMPERATURES), "temperatures")
    records = [soft_target_statistics(logits, target, temperature) for temperature in counted]
    return {
        "classes": _names(cache),
        "calibration": {name: calibration(*both) for name, both in said.items()},
        "similarity": similarity(*said[split], config.temperature) if split else None,
        "similarity_split": split,
        "soft_targets": {
            "split": "train",
            "rows": len(target),
            "of": train.of,
            "by_own_class": int((train.labels < 0).sum()),
            "temperatures": records,
            "most_information_at": max(records, key=lambda record: record["information"])["temperature"],
        },
    }


def _taps(cache: Cache, train: Sample, held_out: list[Sample], config: InspectConfig) -> dict[str, Any]:
    """Probes of the taps, or why there are none."""
    train, why = train.labelled(), ""
    if not cache.manifest.taps:
        why = "the cache has no taps: the same teacher-cache command with --taps adds them"
    elif cache.views.mixup:
        why = "the cached training views are mixed of two images, and a probe is of one label: no probe of the taps"
    elif not len(train.labels) or not held_out:
        why = f"the {'held-out' if len(train.labels) else 'training'} rows have no labels: no probe of the taps"
    elif len(np.unique(train.labels)) < 2:
        why = f"the first {config.rows:,} training rows are of one class: no probe of the taps; more --rows may do"
    if why:
        return {"taps": {}, "channels": {}, "joint": None, "best": None, "no_taps": why}
    test = held_out[0].first(config.rows)
    return probe_taps(cache, train, test, _logits(cache, test.split, test.positions), config) | {"no_taps": None}


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """What goes into inspect.json: all but the matrix and the long tail of the channels, which have a file each."""
    pairs = []
    if found["similarity"] is not None:
        names = found["classes"]
        pairs = [(names[i], names[j], p) for i, j, p in most_confused(found["similarity"], _PAIRS)]
    first = {tap: rows[:_SHOWN] for tap, rows in found["channels"].items()}
    return {key: value for key, value in found.items() if key != "similarity"} | {
        "channels": first,
        "most_confused": [{"true": a, "other": b, "probability": p} for a, b, p in pairs],
    }


def _publish(folder: Path, found: dict[str, Any], config: InspectConfig) -> list[str]:
    """Tables and images; returns their names."""
    from softcache.stages.cli.plot_style import Plot, save_png

    from . import plots as drawing

    files: list[str] = []

    def table(name: str, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        publish_text(folder / name, _csv(head, rows))
        files.append(name)

    def image(name: str, draw: Callable[..., Plot], *what: Any) -> None:
        save_png(folder / name, draw(*what))
        files.append(name)

    if taps := found["taps"]:
        keys = ("form", "columns", "accuracy", "f1_macro", "converged")
        head = ("tap", *keys, "importance_mean", "importance_sd")
        table("taps.csv", head, ([t, *(r[k] for k in keys), *r["importance"].values()] for t, r in taps.items()))
        joint = found["joint"]
        image("taps.png", drawing.plot_taps, taps, joint["teacher"], joint["majority"], joint["split"])
    if channels := found["channels"]:
        rows = ([tap, *row.values()] for tap, of_tap in channels.items() for row in of_tap)
        table("channels.csv", ("tap", "channel", "importance_mean", "importance_sd"), rows)
        image("channels.png", drawing.plot_channels, channels, _SHOWN)
    if splits := found["calibration"]:
        bins = [(split, b) for split, figures in splits.items() for b in figures["bins"]]
        table("reliability.csv", ("split", *bins[0][1]), ([split, *b.values()] for split, b in bins))
        image("reliability.png", drawing.plot_reliability, splits)
        names, matrix = found["classes"], found["similarity"]
        rows = ([name, *(None if np.isnan(p) else p for p in row)] for name, row in zip(names, matrix, strict=True))
        table("similarity.csv", ("true class", *names), rows)
        what = f"mean probability at temperature {config.temperature:g}, {found['similarity_split']}"
        image("similarity.png", drawing.plot_similarity, matrix, names, what)
    soft = found["soft_targets"]
    records = soft["temperatures"]
    table("temperatures.csv", records[0], (record.values() for record in records))
    image("temperatures.png", drawing.plot_temperatures, records, soft["most_information_at"])
    return files


def _csv(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as text; None is n/a."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["n/a" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue()
