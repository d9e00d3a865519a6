"""The candidates of a comparison: a run's student or baseline with its options, its seeds and its predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.data.tasks import CLASSES, EMBEDDING, HardTargets, find_known, have_same_values
from softcache.pipeline.cache.identity import find_differences
from softcache.pipeline.metrics.distances import cosines
from softcache.pipeline.metrics.task_significance import measure_main
from softcache.pipeline.metrics.tasks import TASK_FIGURES
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.figures import get_task
from softcache.stages.runs.folder import IGNORED_OPTIONS, read_fingerprints, read_json
from softcache.stages.runs.logits import LOGITS, TEACHER_LOGITS, SplitLogits, read_logits

_SAME_COSINE = 0.99  # mean over the rows: a codec changes an embedding less
_SEED_OPTIONS = ("seed", "seeds", "order_seed")
# Options that say on which machine a run was trained; data, whose content is part of the cache; and recipe, which only
# sets other options.
UNCOMPARED_OPTIONS = (*IGNORED_OPTIONS, "data", "data_root", "device", "workers", "baseline", "keep_every", "recipe")


class OptionDifference(NamedTuple):
    """An option in which two candidates differ, and its two values."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Candidate:
    """A student or a baseline that is compared.

    Attributes:
        name: In the table.
        folder: Of its run.
        split: On which it was measured: test, or val where the run has no test split.
        config: Its options by name.
        seeds: That were trained.
        task: What was learned.
        main_figures: The task's main figure of each seed on the split, by its result.json; None without hard targets.
        logits_files: Of each seed.
    """

    name: str
    folder: Path
    split: str
    config: dict[str, Any]
    seeds: tuple[int, ...]
    task: str
    main_figures: tuple[float | None, ...]
    logits_files: tuple[Path, ...]


@dataclass(frozen=True)
class Predictions:
    """The predictions of a candidate on the N rows of a split that have a label.

    Attributes:
        content: Digest of the split's images and labels.
        classes: Names, in the order of the class numbers.
        labels: [N], or the hard targets of another task; of an embedding of all rows.
        predictions: Predicted classes [seeds, N]; of labels and numbers the outputs [seeds, N, K]; of an embedding the
            cosine of each row to the teacher's [seeds, N].
        teacher: Of an embedding the teacher's, float32 [N, D]; of other tasks None.
    """

    content: str
    classes: tuple[str, ...]
    labels: HardTargets
    predictions: NDArray[Any]
    teacher: NDArray[np.float32] | None = None

    def has_same_rows(self, other: "Predictions") -> bool:
        """Whether the images, labels and classes are the same."""
        same_content = self.content == other.content and self.classes == other.classes
        return same_content and have_same_values(self.labels, other.labels)

    def has_same_teacher(self, other: "Predictions") -> bool:
        """Whether the embeddings of both teachers are the same, apart from the rounding of a codec."""
        if self.teacher is None or other.teacher is None:
            return True
        if self.teacher.shape != other.teacher.shape:
            return False
        return bool(cosines(self.teacher.astype(np.float64), other.teacher.astype(np.float64)).mean() > _SAME_COSINE)


def read_candidate(name: str, title: str, result: dict[str, Any], model: str) -> Candidate:
    """Read the student or the baseline of a run.

    Args:
        name: Folder of the run.
        title: Name in the table.
        result: The run's result.json, not yet checked.
        model: "student" or "baseline".

    Raises:
        KeyError, TypeError, ValueError, OverflowError, AttributeError: `result` is not that of a student's run.
        CacheError: The run's cache.json is damaged.
    """
    folder, split, task = Path(name), "test" if "test" in result[model] else "val", get_task(result)
    seeds = tuple(int(record["seed"]) for record in result["seeds"])
    seed_folders = [folder] if len(seeds) == 1 else [folder / f"seed-{seed}" for seed in seeds]
    config = {field.name: field.default for field in fields(StudentConfig)} | result["settings"]
    if not seeds or not all(_is_option_value(value) for value in config.values()):
        raise ValueError("no seeds, or settings with values that no option has")
    config["cache"] = _describe_cache(folder, result)
    if model == "baseline":
        config |= {"loss": ["hard targets alone"], "finetune_epochs": 0}
    return Candidate(
        name=title,
        folder=folder,
        split=split,
        config=config,
        seeds=seeds,
        task=task,
        main_figures=tuple(record[model][split].get(TASK_FIGURES[task].main) for record in result["seeds"]),
        logits_files=tuple((path if model == "student" else path / model) / LOGITS for path in seed_folders),
    )


def _is_option_value(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float)


def _describe_cache(folder: Path, result: dict[str, Any]) -> str:
    """Name the cache by teacher and fingerprint, independently of its folder: `cnn (463d78409eab)`."""
    path = folder / "cache.json"
    record = read_json(path) if path.is_file() else result["cache"]
    fingerprints = [fingerprint[:12] for fingerprint in read_fingerprints(record, path)]
    return f"{result['teacher']['arch']} ({', '.join(fingerprints)})"


def find_differing_options(first: Candidate, second: Candidate) -> list[OptionDifference]:
    """List the options that can make two students different and have different values."""
    differences = (OptionDifference(*values) for values in find_differences(first.config, second.config))
    return [difference for difference in differences if difference.name not in UNCOMPARED_OPTIONS]


def only_seeds_differ(differences: Sequence[OptionDifference]) -> bool:
    """Whether all differing options are seeds; also true where none differs."""
    return all(difference.name in _SEED_OPTIONS for difference in differences)


def format_value(value: Any) -> str:
    """Format the value of an option as it is written on the command line; `-` for an empty one."""
    return make_printable(" ".join(map(str, value)) if isinstance(value, list | tuple) else value) or "-"


def read_predictions(candidate: Candidate) -> Predictions:
    """Read the predictions of all seeds from their files of logits.

    Raises:
        UsageError: A file of logits does not exist.
        CacheError: One is damaged, or its main figure is not that of the run's result.json.
    """
    teacher = None
    if candidate.task == EMBEDDING:
        teacher = _read_split(candidate, candidate.folder / TEACHER_LOGITS).logits
    seeds = [
        _read_seed(candidate, path, main_figure, teacher)
        for path, main_figure in zip(candidate.logits_files, candidate.main_figures, strict=True)
    ]
    for path, seed in zip(candidate.logits_files, seeds, strict=True):
        if not seed.has_same_rows(seeds[0]) or seed.predictions.shape != seeds[0].predictions.shape:
            raise CacheError(f"'{path}' and '{candidate.logits_files[0]}' are not of the same rows")
    return replace(seeds[0], predictions=np.concatenate([seed.predictions for seed in seeds]))


def _read_split(candidate: Candidate, path: Path) -> SplitLogits:
    """Read the logits of the split on which a candidate was measured."""
    splits = read_logits(path)
    if candidate.split not in splits:
        raise CacheError(f"'{path}' is damaged: it has no {candidate.split} split")
    split_logits = splits[candidate.split]
    if split_logits.task != candidate.task:
        raise CacheError(f"'{path}' is of the task {split_logits.task}, its result.json of {candidate.task}")
    return split_logits


def _read_seed(
    candidate: Candidate, path: Path, recorded_figure: Any, teacher: NDArray[np.float32] | None
) -> Predictions:
    """Read the predictions of one seed.

    Args:
        candidate: Whose seed it is.
        path: Of its logits.
        recorded_figure: The task's main figure by result.json, not yet checked.
        teacher: Of an embedding the teacher's [N, D].
    """
    split_logits = _read_split(candidate, path)
    labels, outputs = split_logits.labels, split_logits.logits
    values: NDArray[Any]
    if teacher is not None:
        if outputs.shape != teacher.shape:
            raise CacheError(
                f"'{path}' has embeddings of {outputs.shape[1]} numbers, its teacher of {teacher.shape[1]}: they have"
                " no cosine, by which embeddings are compared; compare students of the teacher's width, or look at"
                " kNN and CKA of one run at a time"
            )
        has_direction = teacher.any(1)  # an embedding of zeros has no cosine
        labels, outputs, teacher = labels[has_direction], outputs[has_direction], teacher[has_direction]
        values = cosines(outputs.astype(np.float64), teacher.astype(np.float64))
    else:
        is_known = find_known(labels)
        labels, outputs = labels[is_known], outputs[is_known]
        values = outputs.argmax(1) if candidate.task == CLASSES else outputs
    main = _measure_main(candidate.task, labels, values)
    if not _is_same_figure(main, recorded_figure):
        figure = TASK_FIGURES[candidate.task].main
        raise CacheError(
            f"'{path}' has {'an accuracy' if candidate.task == CLASSES else f'a figure {figure}'} of {main}, its"
            f" result.json one of {make_printable(recorded_figure)}"
        )
    return Predictions(split_logits.content, split_logits.classes, labels, values[None], teacher)


def _measure_main(task: str, labels: HardTargets, values: NDArray[Any]) -> float | None:
    """Compute the main figure of a task from the values of `Predictions.predictions` for one seed."""
    if not len(labels):
        return None
    return float((values == labels).mean()) if task == CLASSES else measure_main(task, labels, values)


def _is_same_figure(figure: float | None, recorded_figure: Any) -> bool:
    if figure is None:
        return recorded_figure is None
    is_number = isinstance(recorded_figure, int | float)
    return is_number and isclose(figure, recorded_figure, rel_tol=1e-9, abs_tol=1e-9)


def pair_candidates(runs: Sequence[dict[str, Candidate]]) -> list[tuple[Candidate, Candidate]]:
    """Pair the first run's student with each other one; of a single run, its baseline with its student.

    Args:
        runs: {"student": …, "baseline": …} of each run, the baseline where it has one.
    """
    first, *others = runs
    if others:
        return [(first["student"], other["student"]) for other in others]
    return [(first["baseline"], first["student"])] if "baseline" in first else []
