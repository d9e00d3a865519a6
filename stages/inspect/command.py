"""`softcache inspect`: which taps, channels, classes and temperatures of a teacher matter, from its cache alone."""

import csv
import io
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError
from softcache.base.files import make_folder, publish_json, publish_text
from softcache.base.packages import require_extra
from softcache.base.text import escape_csv_cell
from softcache.data.tasks import CLASSES
from softcache.pipeline.cache.codecs import DENSE
from softcache.pipeline.cache.reader import CacheReader
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
from softcache.stages.cli.new_folders import make_new_folder
from softcache.stages.runs.environment import library_versions
from softcache.stages.runs.output_folder import check_output_folder

from .probes import Sample, probe_taps
from .suggestion import suggest_student
from .summary import print_findings

if TYPE_CHECKING:
    from softcache.stages.cli.plot_style import Plot

_PAIRS = 10  # of classes, in inspect.json
_CHANNELS = 15  # of a tap, in inspect.json and in its panel
_BLOCK = 4096  # rows whose logits are read at once


def run(name: str, config: InspectConfig) -> None:
    """Inspect a cache. Everything is computed before the first file is written; inspect.json is the last.

    Args:
        name: Folder of the cache.
        config: Options of the command.

    Raises:
        UsageError: matplotlib is missing, or --out is not empty.
        CacheError: The cache is damaged.
    """
    console, start = Console(config.json), time.monotonic()
    require_extra("inspect draws with", "report", "matplotlib")
    cache = CacheReader(Path(name))
    if cache.task != CLASSES:
        raise UsageError(
            f"inspect is for one class an image, and the task of '{name}' is {cache.task}: its students are described"
            " by report"
        )
    folder = _choose_folder(config, cache)
    train, held_out = _read_samples(cache, config.rows)
    findings = _inspect_teacher(cache, train, held_out, config) | _inspect_taps(cache, train, held_out, config)
    findings["command"] = suggest_student(cache, findings["best"]) if findings["best"] else None
    files = _make_files(findings, config)
    make_folder(folder)
    _publish(folder, files)
    record = {
        "cache": name,
        "fingerprint": cache.manifest.fingerprint,
        "teacher": cache.teacher,
        "settings": asdict(config) | {"out": str(folder)},
        **_shorten_findings(findings),
        "files": list(files),
        "versions": library_versions(),
        "seconds": time.monotonic() - start,
    }
    publish_json(folder / "inspect.json", record)
    if config.json:
        return console.print_json(json.dumps(record))
    if cache.codec.kind != DENSE:
        console.print(
            f"the cache has the codec {cache.codec_name}: what follows is of the targets as they are stored, not of"
            " all the teacher's logits"
        )
    print_findings(record, console)
    console.print(f"files: {folder}/inspect.json, {', '.join(files)} ({format_duration(record['seconds'])})")
    if record["best"]:
        console.print(f"best tap: {record['best']}; a student with a hint from it:  {record['command']}")


def _choose_folder(config: InspectConfig, cache: CacheReader) -> Path:
    """Return the folder of the results, empty or not made yet. Raises UsageError for one that is not empty."""
    if not config.out:
        return make_new_folder(f"inspect-{cache.folder.resolve().name}")
    folder = Path(config.out)
    check_output_folder(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is not empty: choose another --out")
    return folder


def _read_samples(cache: CacheReader, rows: int) -> tuple[Sample, list[Sample]]:
    """Read the first training rows, and all rows of val and test that have a label, where there are any."""
    train = _read_sample(cache, "train", rows)
    if cache.views.mixes_images:  # a view of two images has no single label
        train = replace(train, labels=np.full_like(train.labels, -1))
    held_out = []
    for split in ("val", "test"):
        if split in cache.manifest.splits:
            sample = _read_sample(cache, split, cache.manifest.splits[split]).drop_unlabelled()
            if len(sample.labels):
                held_out.append(sample)
    return train, held_out


def _read_sample(cache: CacheReader, split: str, rows: int) -> Sample:
    """Read the first rows of a split with their labels. Raises CacheError for labels that are not classes."""
    split_rows = cache.manifest.splits[split]
    positions = np.arange(min(rows, split_rows))
    labels = cache.read_rows(split, 0, "label", positions).astype(np.int64)
    if len(labels) and not -1 <= labels.min() <= labels.max() < cache.classes:
        raise CacheError(
            f"'{cache.folder}': labels of {split} are {labels.min()} to {labels.max()}, and must be -1 to"
            f" {cache.classes - 1}"
        )
    return Sample(split, positions, labels, split_rows)


def _read_logits(cache: CacheReader, split: str, positions: Positions) -> NDArray[np.float32]:
    """Read the logits of draw 0 in blocks, float32 [n, K]."""
    blocks = []
    with progress_bar(len(positions), f"logits of {split}", "row") as bar:
        for start in range(0, len(positions), _BLOCK):
            blocks.append(cache.read_stored(split, 0, positions[start : start + _BLOCK])[0].numpy())
            bar.update(len(blocks[-1]))
    return np.concatenate(blocks)


def _list_class_names(cache: CacheReader) -> list[str]:
    """List the names of the classes; their numbers where the data have no names."""
    names = [str(name) for name in cache.manifest.identity["transfer_set"]["classes"]]
    return names if len(names) == cache.classes else [str(c) for c in range(cache.classes)]


def _inspect_teacher(
    cache: CacheReader, train: Sample, held_out: list[Sample], config: InspectConfig
) -> dict[str, Any]:
    """Measure calibration and class similarity on held-out rows, and soft targets by temperature on training rows.

    Class similarity is measured on the first held-out split.
    """
    logits = {sample.split: _read_logits(cache, sample.split, sample.positions) for sample in held_out}
    train_logits = _read_logits(cache, "train", train.positions)
    target = np.where(train.labels < 0, train_logits.argmax(1), train.labels)
    temperatures = progress(TEMPERATURES, len(TEMPERATURES), "temperatures")
    records = [soft_target_statistics(train_logits, target, temperature) for temperature in temperatures]
    first = held_out[0] if held_out else None
    return {
        "classes": _list_class_names(cache),
        "calibration": {sample.split: calibration(logits[sample.split], sample.labels) for sample in held_out},
        "similarity": similarity(logits[first.split], first.labels, config.temperature) if first else None,
        "similarity_split": first.split if first else None,
        "soft_targets": {
            "split": "train",
            "rows": len(target),
            "of": train.split_rows,
            "by_own_class": int((train.labels < 0).sum()),
            "temperatures": records,
            "most_information_at": max(records, key=lambda record: record["information"])["temperature"],
        },
    }


def _inspect_taps(cache: CacheReader, train: Sample, held_out: list[Sample], config: InspectConfig) -> dict[str, Any]:
    """Probe the taps, see `probe_taps`; `no_taps` says why this is not possible."""
    train, reason = train.drop_unlabelled(), ""
    if not cache.manifest.taps:
        reason = "the cache has no taps: the same teacher-cache command with --taps adds them"
    elif cache.views.mixes_images:
        reason = "the cached training views mix two images and have no single label: no probe of the taps"
    elif not len(train.labels):
        reason = "the training rows have no labels: no probe of the taps"
    elif not held_out:
        reason = "the held-out rows have no labels: no probe of the taps"
    elif len(np.unique(train.labels)) < 2:
        reason = f"the first {config.rows:,} training rows are of one class: no probe of the taps; try more --rows"
    if reason:
        return {"taps": {}, "channels": {}, "joint": None, "best": None, "no_taps": reason}
    test = held_out[0].take_first(config.rows)
    teacher_logits = _read_logits(cache, test.split, test.positions)
    return probe_taps(cache, train, test, teacher_logits=teacher_logits, config=config) | {"no_taps": None}


def _shorten_findings(findings: dict[str, Any]) -> dict[str, Any]:
    """Shorten the findings for inspect.json: the full similarity matrix and list of channels are in CSV files."""
    pairs = []
    if findings["similarity"] is not None:
        names = findings["classes"]
        pairs = [
            {"true": names[i], "other": names[j], "probability": probability}
            for i, j, probability in most_confused(findings["similarity"], _PAIRS)
        ]
    return {key: value for key, value in findings.items() if key != "similarity"} | {
        "channels": {tap: channels[:_CHANNELS] for tap, channels in findings["channels"].items()},
        "most_confused": pairs,
    }


def _make_files(findings: dict[str, Any], config: InspectConfig) -> "dict[str, str | Plot]":
    """Make {name: text of a table, or plot}, in the order in which the files are listed."""
    from .plots import plot_channels, plot_reliability, plot_similarity, plot_taps, plot_temperatures

    files: dict[str, str | Plot] = {}
    if taps := findings["taps"]:
        keys = ("form", "columns", "accuracy", "f1_macro", "converged")
        rows = [[name, *(tap[key] for key in keys), *tap["importance"].values()] for name, tap in taps.items()]
        files["taps.csv"] = _format_csv(("tap", *keys, "importance_mean", "importance_sd"), rows)
        joint = findings["joint"]
        files["taps.png"] = plot_taps(taps, joint["teacher"], joint["majority"], joint["split"])
    if channels := findings["channels"]:
        rows = [[tap, *channel.values()] for tap, tap_channels in channels.items() for channel in tap_channels]
        files["channels.csv"] = _format_csv(("tap", "channel", "importance_mean", "importance_sd"), rows)
        files["channels.png"] = plot_channels(channels, _CHANNELS)
    if splits := findings["calibration"]:
        bins = [{"split": split} | bin_ for split, values in splits.items() for bin_ in values["bins"]]
        files["reliability.csv"] = _format_csv(bins[0], (bin_.values() for bin_ in bins))
        files["reliability.png"] = plot_reliability(splits)
        names, matrix = findings["classes"], findings["similarity"]
        rows = [
            [name, *(None if np.isnan(probability) else probability for probability in probabilities)]
            for name, probabilities in zip(names, matrix, strict=True)
        ]
        files["similarity.csv"] = _format_csv(("true class", *names), rows)
        title = f"mean probability at temperature {config.temperature:g}, {findings['similarity_split']}"
        files["similarity.png"] = plot_similarity(matrix, names, title)
    soft_targets = findings["soft_targets"]
    records = soft_targets["temperatures"]
    files["temperatures.csv"] = _format_csv(records[0], (record.values() for record in records))
    files["temperatures.png"] = plot_temperatures(records, soft_targets["most_information_at"])
    return files


def _format_csv(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Format a table as CSV, None as n/a. Names that a spreadsheet would compute get an apostrophe before them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(escape_csv_cell, titles))
    writer.writerows(["n/a" if cell is None else escape_csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _publish(folder: Path, files: "dict[str, str | Plot]") -> None:
    from softcache.stages.cli.plot_style import save_png

    for name, content in files.items():
        if isinstance(content, str):
            publish_text(folder / name, content)
        else:
            save_png(folder / name, content)
