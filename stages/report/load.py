"""A run's folder as one record: finished, or as far as it came."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.models.prepared_model import InputSpec
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.folder import read_config, read_fingerprints, read_json
from softcache.stages.runs.logits import LOGITS, TEACHER_LOGITS, SplitLogits, read_logits
from softcache.stages.training.checkpoint import METRICS_FILE, read_epoch_lines

MODELS = ("teacher", "baseline", "student")
TRAININGS = ("distilled", "student", "baseline")
_NUMBERS = (
    "accuracy",
    "nll",
    "ece",
    "precision_macro",
    "recall_macro",
    "f1_macro",
    "auroc_macro",
    "top5",
    "brier",
    "f1_weighted",
    "agreement",
    "kl_to_teacher",
    "recall_tail",
)
Line = dict[str, Any]


@dataclass(frozen=True)
class LoadedRun:
    """A student's run. result: its result.json, None while it is not finished; fingerprints: of its
    caches; lines: {training: of each seed a line per epoch}; said: {model: of each seed {split: logits}}."""

    name: str
    folder: Path
    config: StudentConfig
    result: dict[str, Any] | None
    fingerprints: list[str]
    lines: dict[str, list[list[Line]]]
    logits: dict[str, list[dict[str, SplitLogits]]]

    @property
    def epochs(self) -> int:
        """Of a training from its first step to its last, fine-tuning included."""
        return self.config.epochs + self.config.finetune_epochs

    @cached_property
    def state(self) -> str:
        """`finished`, or how far it came, in words."""
        if self.result:
            return "finished"
        begun = max(len(seeds) for seeds in self.lines.values())
        if not any(any(seeds) for seeds in self.lines.values()):
            return "unfinished: no epoch is over"
        name = [name for name in TRAININGS if len(self.lines[name]) == begun and self.lines[name][-1]][-1]
        seeds = self.lines[name]
        before = len(self.lines["distilled"][len(seeds) - 1]) if name == "student" and self.lines["distilled"] else 0
        of = f", seed {len(seeds)} of {self.config.seeds}" if self.config.seeds > 1 else ""
        total = self.config.epochs if name == "distilled" else self.epochs
        return f"unfinished: {name}{of}, epoch {before + len(seeds[-1])} of {total}"

    def figures(self, model: str, split: str) -> dict[str, Any] | None:
        """Of the teacher, baseline or student on a split: means over the seeds. None where the run has none."""
        if self.result:
            return dict(self.result[model][split]) if split in self.result.get(model, {}) else None
        return self._teacher.get(split) if model == "teacher" else None

    @cached_property
    def _teacher(self) -> dict[str, Any]:
        """Of a run that is not finished, from what its teacher says."""
        said = self.logits["teacher"][0] if self.logits["teacher"] else {}
        return {split: {"rows": len(one.labels)} | evaluate(one.logits, one.labels) for split, one in said.items()}

    def spread(self, model: str, split: str) -> dict[str, Any]:
        """The standard deviations over the seeds, where there are several."""
        if not self.result or model == "teacher" or self.config.seeds < 2:
            return {}
        return dict(self.result["spread"][model][split])


def read_runs(names: tuple[str, ...]) -> tuple[list[LoadedRun], dict[str, dict[str, Any]]]:
    """The students' runs in these folders and what `inspect` found there; a folder of runs stands for all in it.

    Without names all under `runs`. {fingerprint: what `inspect` found}: in a folder that is named, else the latest
    beside a run. Raises UsageError where there is no run, CacheError for a damaged one.
    """
    folders = [folder for name in names or ("runs",) for folder in _expand_folder(Path(name), bool(names))]
    runs = [_read(folder) for folder in dict.fromkeys(folders) if (folder / "settings.json").is_file()]
    if not runs:
        raise UsageError(f"there is no run of a student in {', '.join(names) or 'runs'}: name folders of runs")
    beside = {path.parent for run in runs for path in run.folder.parent.glob("*/inspect.json")}
    latest = sorted(beside, key=lambda folder: -(folder / "inspect.json").stat().st_mtime)
    named = [folder for folder in folders if (folder / "inspect.json").is_file()]
    inspections: dict[Any, dict[str, Any]] = {}
    for folder in [*(named if names else ()), *latest]:
        record = read_json(folder / "inspect.json")
        _check_inspection(record, f"'{folder}/inspect.json'")
        inspections.setdefault(record["fingerprint"], record)
    return runs, inspections


def _expand_folder(folder: Path, asked: bool) -> Iterator[Path]:
    """The folder itself, or the runs that lie in it."""
    if any((folder / name).is_file() for name in ("settings.json", "inspect.json")):
        if asked or (folder / "inspect.json").is_file() or _is_student_run(folder):
            yield folder
        return
    if asked and not folder.is_dir():
        raise UsageError(f"there is no folder '{folder}'")
    for path in sorted(folder.glob("*/*.json")):
        if path.name == "inspect.json" or (path.name == "settings.json" and _is_student_run(path.parent)):
            yield path.parent


def _is_student_run(folder: Path) -> bool:
    return "cache" in read_json(folder / "settings.json")


def _read(folder: Path) -> LoadedRun:
    if not _is_student_run(folder):
        raise UsageError(f"'{folder}' is a teacher's run: a report is of students, and has their teacher in it")
    config = read_config(folder, StudentConfig)
    result = read_json(folder / "result.json") if (folder / "result.json").is_file() else None
    if result is not None:
        _check(result, f"'{folder}/result.json'")
    seeds = [folder if config.seeds == 1 else folder / f"seed-{config.seed + i}" for i in range(config.seeds)]
    lines = {name: _lines(name, seeds) for name in TRAININGS}
    said = {
        "teacher": _said([folder / TEACHER_LOGITS]),
        "baseline": _said([one / "baseline" / LOGITS for one in seeds]),
        "student": _said([one / LOGITS for one in seeds]),
    }
    _check_same_rows(said, folder)
    path = folder / "cache.json"
    fingerprints = read_fingerprints(read_json(path), path) if path.is_file() else []
    return LoadedRun(str(folder), folder, config, result, fingerprints, lines, said)


def _lines(training: str, seeds: list[Path]) -> list[list[Line]]:
    """Of each seed that was begun. Raises CacheError for lines that are no record of epochs."""
    places = [one if training == "student" else one / training for one in seeds]
    found = [read_epoch_lines(place) for place in places if (place / METRICS_FILE).is_file()]
    for place, lines in zip(places, found, strict=False):
        for line in lines:
            if not isinstance(line, dict) or "epoch" not in line or not all(map(_is_number, line.values())):
                raise CacheError(f"'{place / METRICS_FILE}' is damaged: it is not a record of epochs")
    return [lines for lines in found if lines]


def _said(paths: list[Path]) -> list[dict[str, SplitLogits]]:
    return [read_logits(path) for path in paths if path.is_file()]


def _check_same_rows(said: dict[str, list[dict[str, SplitLogits]]], folder: Path) -> None:
    """Raise CacheError where student, baseline and teacher do not speak of the same rows and classes."""
    every = [seed for model in MODELS for seed in said[model]]
    for other in every[1:]:
        alike = other.keys() == every[0].keys() and all(
            (one.content, one.classes, one.logits.shape) == (kept.content, kept.classes, kept.logits.shape)
            and np.array_equal(one.labels, kept.labels)
            for one, kept in zip(every[0].values(), (other[split] for split in every[0]), strict=True)
        )
        if not alike:
            raise CacheError(f"'{folder}': its files of logits are not all of the same rows and classes")


def _check(result: dict[str, Any], name: str) -> None:
    """Raise CacheError for what is not a result.json of a student: everything that a report reads is looked at
    here."""
    try:
        for model in MODELS:
            if model == "baseline" and model not in result:
                continue
            for split in ("val", "test"):
                if split in result[model]:
                    _check_figures(result[model][split])
                    if model != "teacher":
                        _check_figures(result["spread"][model][split])
        for member in result.get("members", ()):
            _check_figures(next(iter(member[split] for split in ("test", "val") if split in member)))
            if not isinstance(member["arch"], str):
                raise TypeError("no arch")
        one = result["student"]
        for model in ("baseline", "student"):
            if model in result:
                InputSpec.from_json(result[model]["preparation"])
        numbers = [one[key] for key in ("parameters", "multiply_adds", "seconds")]
        numbers += [result["cache"][key] for key in ("rows", "draws", "seconds")]
        bill = result["bill"]
        words = (one["arch"], result["teacher"]["arch"], result["cache"]["manifest"], result["machine"]["device"])
        if not all(isinstance(word, str) for word in (*words, *result["versions"].values())):
            raise TypeError("no words")
        if not all(_is_number(number) and number is not None for number in numbers):
            raise TypeError("no numbers")
        if not all(map(_is_number, bill.values())) or not {"stage_one", "epoch", "saved", "live_epoch"} <= set(bill):
            raise TypeError("no bill")
        if not isinstance(result["seeds"], list):
            raise TypeError("no seeds")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise CacheError(f"{name} is not of a student's run") from None


def _check_inspection(record: dict[str, Any], name: str) -> None:
    try:
        numbers = [one["accuracy"] for one in record["taps"].values()]
        numbers += [one["importance"][key] for one in record["taps"].values() for key in ("mean", "sd")]
        numbers += [
            one[key] for tap in record["channels"].values() for one in tap for key in ("mean", "sd", "channel")
        ]
        if record["taps"]:
            numbers += [record["joint"]["teacher"], record["joint"]["majority"]]
        if not all(map(_is_number, numbers)) or not isinstance(record["fingerprint"], str) or None in numbers:
            raise TypeError("no numbers")
    except (KeyError, TypeError, AttributeError):
        raise CacheError(f"{name} is not what inspect found") from None


def _check_figures(figures: dict[str, Any]) -> None:
    if not all(_is_number(figures.get(name)) for name in _NUMBERS):
        raise TypeError("no numbers")
    lists = list(figures["per_class"].values()) if "per_class" in figures else []
    lists += figures.get("confusion") or []
    if not all(isinstance(one, list) and all(map(_is_number, one)) for one in lists) or len(set(map(len, lists))) > 1:
        raise TypeError("no table")


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))
