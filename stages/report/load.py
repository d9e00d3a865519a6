"""Read the runs of a report: each folder as one record, also of a run that is not finished."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, TASKS, have_same_values
from softcache.pipeline.metrics.tasks import TASK_FIGURES, evaluate_task
from softcache.pipeline.models.prepared_model import InputSpec
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.figures import TITLES, get_task
from softcache.stages.runs.folder import read_config, read_fingerprints, read_json
from softcache.stages.runs.logits import LOGITS, TEACHER_LOGITS, SplitLogits, read_logits
from softcache.stages.training.checkpoint import METRICS_FILE, read_epoch_lines

MODELS = ("teacher", "baseline", "student")
TRAININGS = ("distilled", "student", "baseline")
# Figures of a split that are numbers or absent, of all tasks.
_METRICS = (
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
    *(name for name in TITLES if name not in ("accuracy", "nll", "f1_macro", "agreement", "kl_to_teacher")),
    "f1_samples",
    "centroid_1",
    "centroid_5",
)
AT_THRESHOLDS = "at_thresholds.f1_macro"  # of labels: macro F1 at the thresholds that were chosen on validation
# The lists of figures of each task: of the classes, labels or outputs.
LISTS = {CLASSES: "per_class", LABELS: "per_label", NUMBERS: "per_output"}
_MAX_DEPTH = 3  # of folders with runs: runs/METHODS/RUN, runs/SEVERAL/ARCH/SEED
_CLASS_METRICS = {"precision", "recall", "f1", "support"}
_COSTS = {"stage_one", "epoch", "teacher_epoch", "live_epoch", "saved", "paid_after_epochs", "paid_after_students"}
EpochMetrics = dict[str, Any]


@dataclass(frozen=True)
class LoadedRun:
    """A student's run.

    Attributes:
        name: Its folder, as it was named.
        folder: The same as a path.
        config: Its options.
        result: Its result.json; None while it is not finished.
        fingerprints: Of its caches.
        epoch_metrics: {training: of each seed the metrics of each epoch}, for the names in TRAININGS. With
            fine-tuning, `distilled` is the training before it and `student` the fine-tuning.
        logits: {model: of each seed {split: logits}}, for the names in MODELS; the teacher as one seed.
    """

    name: str
    folder: Path
    config: StudentConfig
    result: dict[str, Any] | None
    fingerprints: list[str]
    epoch_metrics: dict[str, list[list[EpochMetrics]]]
    logits: dict[str, list[dict[str, SplitLogits]]]

    @cached_property
    def task(self) -> str:
        """What was learned, by result.json or the files of logits; of a run that has neither, by its metrics."""
        if self.result:
            return get_task(self.result)
        stored = [split for model in MODELS for splits in self.logits[model] for split in splits.values()]
        if stored:
            return stored[0].task
        lines = [line for seeds in self.epoch_metrics.values() for lines in seeds for line in lines]
        mains = {f"val_{figures.main}": task for task, figures in TASK_FIGURES.items()}
        return next((mains[name] for line in lines for name in line if name in mains), CLASSES)

    @property
    def epochs(self) -> int:
        """Number of epochs of one training, including fine-tuning."""
        return self.config.epochs + self.config.finetune_epochs

    @cached_property
    def state(self) -> str:
        """`finished`, or what was trained last: `unfinished: student, seed 1 of 2, epoch 3 of 3`."""
        if self.result:
            return "finished"
        latest_seed = max(len(seeds) for seeds in self.epoch_metrics.values())
        if latest_seed == 0:
            return "unfinished: no epoch completed"
        training = [name for name in TRAININGS if len(self.epoch_metrics[name]) == latest_seed][-1]
        epoch = len(self.epoch_metrics[training][-1])
        if training == "student" and self.epoch_metrics["distilled"]:
            epoch += len(self.epoch_metrics["distilled"][latest_seed - 1])
        seed = f", seed {latest_seed} of {self.config.seeds}" if self.config.seeds > 1 else ""
        epochs = self.config.epochs if training == "distilled" else self.epochs
        return f"unfinished: {training}{seed}, epoch {epoch} of {epochs}"

    def get_metrics(self, model: str, split: str) -> dict[str, Any] | None:
        """Return the metrics of a model on a split, means over the seeds; None where the run has none.

        Args:
            model: "teacher", "baseline" or "student".
            split: "val" or "test".
        """
        if self.result:
            return dict(self.result[model][split]) if split in self.result.get(model, {}) else None
        return self._teacher_metrics.get(split) if model == "teacher" else None

    @cached_property
    def _teacher_metrics(self) -> dict[str, Any]:
        """{split: metrics} of the teacher, computed from its logits: for a run without a result."""
        splits = self.logits["teacher"][0] if self.logits["teacher"] else {}
        return {
            split: {"rows": len(stored.labels)} | evaluate_task(stored.task, stored.logits, stored.labels)
            for split, stored in splits.items()
        }

    def get_spread(self, model: str, split: str) -> dict[str, Any]:
        """Return the standard deviations of the metrics over the seeds; an empty dict for a single seed."""
        if not self.result or model == "teacher" or self.config.seeds < 2:
            return {}
        return dict(self.result["spread"][model][split])


def read_runs(names: tuple[str, ...]) -> tuple[list[LoadedRun], dict[str, dict[str, Any]]]:
    """Read the runs of students, and the results of `inspect` for their caches.

    Args:
        names: Folders of runs, or folders that contain such folders; `runs` when empty.

    Returns:
        The runs, and {fingerprint of a cache: inspect.json}. Of several inspections of a cache, the first in a folder
        of `names` counts, else the latest one beside a run.

    Raises:
        UsageError: There is no run of a student.
        CacheError: A run or an inspection is damaged.
    """
    folders = [folder for name in names or ("runs",) for folder in _expand_folder(Path(name), bool(names))]
    run_folders = [folder for folder in dict.fromkeys(folders) if (folder / "settings.json").is_file()]
    runs = []
    for folder in run_folders:
        try:
            runs.append(_read_run(folder))
        except CacheError as error:
            advice = ". To leave this run out, name the other ones" if len(run_folders) > 1 else ""
            raise CacheError(f"{error}{advice}") from None
    if not runs:
        raise UsageError(f"there is no run of a student in {', '.join(names) or 'runs'}: name folders of runs")
    inspected = [folder for folder in folders if (folder / "inspect.json").is_file()]
    others = {path.parent for run in runs for path in run.folder.parent.glob("*/inspect.json")}
    if not names:
        others, inspected = others | set(inspected), []
    inspected += sorted(others, key=lambda folder: -(folder / "inspect.json").stat().st_mtime)
    inspections: dict[Any, dict[str, Any]] = {}
    for folder in inspected:
        record = read_json(folder / "inspect.json")
        _check_inspection(record, f"'{folder}/inspect.json'")
        inspections.setdefault(record["fingerprint"], record)
    return runs, inspections


def _expand_folder(folder: Path, is_explicit: bool) -> Iterator[Path]:
    """Yield the folder if it is one of a run or an inspection, else those in it and in the folders below it.

    Folders that were not named on the command line are left out where they are not of a student.
    """
    if any((folder / name).is_file() for name in ("settings.json", "inspect.json")):
        if is_explicit or (folder / "inspect.json").is_file() or _is_student_run(folder):
            yield folder
        return
    if is_explicit and not folder.is_dir():
        raise UsageError(f"there is no folder '{folder}'")
    if folder.is_dir():
        yield from _find_folders(folder, _MAX_DEPTH)


def _find_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the runs of students and the inspections below a folder: of a command that trained several students too.

    The trials of a search are left out; they are found where the folder of the search is named.
    """
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        if (path / "inspect.json").is_file():
            yield path
        elif (path / "settings.json").is_file():
            if _is_student_run(path):
                yield path
        elif depth > 1 and not (path / "search.json").is_file():
            yield from _find_folders(path, depth - 1)


def _is_student_run(folder: Path) -> bool:
    return "cache" in read_json(folder / "settings.json")


def _read_run(folder: Path) -> LoadedRun:
    if not _is_student_run(folder):
        raise UsageError(f"'{folder}' is a teacher's run: name runs of students, whose reports include their teacher")
    config = read_config(folder, StudentConfig)
    result = read_json(folder / "result.json") if (folder / "result.json").is_file() else None
    if result is not None:
        _check_result(result, f"'{folder}/result.json'")
    seeds = [folder if config.seeds == 1 else folder / f"seed-{config.seed + i}" for i in range(config.seeds)]
    epoch_metrics = {training: _read_epoch_metrics(training, seeds) for training in TRAININGS}
    logits = {
        "teacher": _read_existing_logits([folder / TEACHER_LOGITS]),
        "baseline": _read_existing_logits([seed / "baseline" / LOGITS for seed in seeds]),
        "student": _read_existing_logits([seed / LOGITS for seed in seeds]),
    }
    _check_same_rows(logits, folder)
    path = folder / "cache.json"
    fingerprints = read_fingerprints(read_json(path), path) if path.is_file() else []
    return LoadedRun(
        name=str(folder),
        folder=folder,
        config=config,
        result=result,
        fingerprints=fingerprints,
        epoch_metrics=epoch_metrics,
        logits=logits,
    )


def _read_epoch_metrics(training: str, seeds: list[Path]) -> list[list[EpochMetrics]]:
    """Read metrics.jsonl of each seed that has one with an epoch in it. Raises CacheError for a damaged one."""
    trainings = []
    for seed in seeds:
        folder = seed if training == "student" else seed / training
        if not (folder / METRICS_FILE).is_file():
            continue
        epochs = read_epoch_lines(folder)
        for metrics in epochs:
            is_record = isinstance(metrics, dict) and type(metrics.get("epoch")) is int
            if not is_record or not all(map(_is_number, metrics.values())):
                raise CacheError(f"'{folder / METRICS_FILE}' is damaged: it is not a record of epochs")
        if epochs:  # null stands for a metric that is not known
            trainings.append([{key: value for key, value in line.items() if value is not None} for line in epochs])
    return trainings


def _read_existing_logits(paths: list[Path]) -> list[dict[str, SplitLogits]]:
    return [read_logits(path) for path in paths if path.is_file()]


def _check_same_rows(logits: dict[str, list[dict[str, SplitLogits]]], folder: Path) -> None:
    """Raise CacheError where student, baseline and teacher are not of the same rows and classes."""
    seeds = [splits for model in MODELS for splits in logits[model]]
    for splits in seeds[1:]:
        first = seeds[0]
        if splits.keys() != first.keys() or not all(_has_same_rows(splits[name], first[name]) for name in splits):
            raise CacheError(f"'{folder}': its files of logits are not all of the same rows and classes")


def _has_same_rows(a: SplitLogits, b: SplitLogits) -> bool:
    has_any_width = a.task == EMBEDDING  # a student may have another one than its teacher
    same_shape = a.logits.shape == b.logits.shape or (has_any_width and len(a.logits) == len(b.logits))
    same_content = a.content == b.content and a.classes == b.classes and same_shape
    return same_content and have_same_values(a.labels, b.labels)


# The files can come from anyone: all values that a report uses are checked here.


def _check_result(result: dict[str, Any], name: str) -> None:
    """Raise CacheError for what is not a result.json of a student."""
    try:
        if (task := get_task(result)) not in TASKS:
            raise TypeError(f"there is no task {task}")
        for model in MODELS:
            if model == "baseline" and model not in result:
                continue
            if model != "teacher":
                InputSpec.from_json(result[model]["preparation"])
            for split in _list_splits(result["teacher"]):
                classes = _check_metrics(result[model][split])
                if classes not in (None, _check_metrics(result["teacher"][split])):
                    raise TypeError("the metrics by class are not of the teacher's classes")
                if model != "teacher":
                    _check_metrics(result["spread"][model][split])
        for member in result.get("members", ()):
            for split in _list_splits(member):
                _check_metrics(member[split])
            if not isinstance(member["arch"], str):
                raise TypeError("the arch of a member is not text")
        student, cache, cost = result["student"], result["cache"], result["bill"]
        numbers = [student[key] for key in ("parameters", "multiply_adds", "seconds")]
        numbers += [cache[key] for key in ("rows", "draws", "seconds")]
        if None in numbers or not all(map(_is_number, numbers)):
            raise TypeError("parameters, rows or seconds are not numbers")
        if not set(cost) >= _COSTS or not all(map(_is_number, cost.values())):
            raise TypeError("the cost is not complete")
        texts = [student["arch"], result["teacher"]["arch"], cache["manifest"], result["machine"]["device"]]
        texts += result["versions"].values()
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("an arch, digest, device or version is not text")
        if not isinstance(result["seeds"], list):
            raise TypeError("the seeds are not a list")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CacheError(f"{name} is not of a student's run, or is damaged: {make_printable(reason)}") from None


def _list_splits(record: dict[str, Any]) -> list[str]:
    """List the splits that a network was measured on. Raises KeyError where there is none."""
    splits: list[str] = [split for split in ("val", "test") if split in record]
    if not splits:
        raise KeyError("val")
    return splits


def _check_metrics(metrics: dict[str, Any]) -> int | None:
    """Check the metrics of a split, or their spread.

    Returns:
        The number of classes of the metrics by class; None where there are none.

    Raises:
        KeyError, TypeError, AttributeError: They are not numbers and lists of equal length, or incomplete.
    """
    if not all(_is_number(metrics.get(name)) for name in (*_METRICS, "rows")):
        raise TypeError("a metric is not a number")
    confusion, per_class = metrics.get("confusion") or [], metrics.get("per_class") or {}
    if not _is_number((metrics.get("at_thresholds") or {}).get("f1_macro")):
        raise TypeError("a metric at thresholds is not a number")
    for name, needed in (("per_label", _CLASS_METRICS), ("per_output", {"rmse", "mae", "r2", "spearman"})):
        if lists := metrics.get(name):
            _check_lists(lists, needed, name)
    if per_class and not set(per_class) >= _CLASS_METRICS:
        raise KeyError("per_class")
    lists = [*per_class.values(), *confusion]
    if not all(isinstance(values, list) and all(map(_is_number, values)) for values in lists):
        raise TypeError("a metric by class is not a list of numbers")
    sizes = set(map(len, lists)) | ({len(confusion)} if confusion else set())
    if len(sizes) > 1:
        raise TypeError("the metrics by class are not of the same classes")
    if any(None in values for values in (*confusion, per_class.get("support", []))):
        raise TypeError("a number of rows is not known")
    return next(iter(sizes), None)


def _check_lists(lists: dict[str, Any], needed: set[str], name: str) -> None:
    """Check the figures of each label or output. Raises KeyError or TypeError for what are not equally long lists."""
    if not set(lists) >= needed:
        raise KeyError(name)
    if not all(isinstance(lists[key], list) and all(map(_is_number, lists[key])) for key in needed):
        raise TypeError(f"{name} has no lists of numbers")
    if len({len(lists[key]) for key in needed}) > 1 or None in lists.get("support", []):
        raise TypeError(f"{name} is not of the same labels or outputs")


def _check_inspection(record: dict[str, Any], name: str) -> None:
    """Raise CacheError for what is not an inspect.json."""
    try:
        taps = record["taps"].values()
        channels = [channel for tap in record["channels"].values() for channel in tap]
        numbers = [tap["accuracy"] for tap in taps]
        numbers += [tap["importance"][key] for tap in taps for key in ("mean", "sd")]
        numbers += [channel[key] for channel in channels for key in ("mean", "sd", "channel")]
        if taps:
            numbers += [record["joint"]["teacher"], record["joint"]["majority"]]
            if not all(isinstance(text, str) for text in (record["best"], record["joint"]["split"])):
                raise TypeError("the best tap or the split is not text")
            if not channels or not all(isinstance(tap, list) for tap in record["channels"].values()):
                raise TypeError("there are no channels")
        if None in numbers or not all(map(_is_number, numbers)) or not isinstance(record["fingerprint"], str):
            raise TypeError("a value is not a number")
    except (KeyError, TypeError, AttributeError):
        raise CacheError(f"{name} is not an inspection of a cache") from None


def _is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number, or null for one that is not known."""
    return value is None or (type(value) in (int, float) and math.isfinite(value))
