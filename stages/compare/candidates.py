"""The candidates of a comparison: a run's student or baseline with its options, its seeds and its predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.data.transfer_set import Labels
from softcache.pipeline.cache.identity import find_differences
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.folder import IGNORED_OPTIONS, read_fingerprints, read_json
from softcache.stages.runs.logits import LOGITS, read_logits

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
        accuracies: Of each seed on the split, by its result.json; None without labels.
        logits_files: Of each seed.
    """

    name: str
    folder: Path
    split: str
    config: dict[str, Any]
    seeds: tuple[int, ...]
    accuracies: tuple[float | None, ...]
    logits_files: tuple[Path, ...]


@dataclass(frozen=True)
class Predictions:
    """The predictions of a candidate on the N rows of a split that have a label.

    Attributes:
        content: Digest of the split's images and labels.
        classes: Names, in the order of the class numbers.
        labels: [N].
        predictions: Predicted classes [seeds, N].
    """

    content: str
    classes: tuple[str, ...]
    labels: Labels
    predictions: NDArray[np.int64]

    def has_same_rows(self, other: "Predictions") -> bool:
        """Whether the images, labels and classes are the same."""
        same_content = self.content == other.content and self.classes == other.classes
        return same_content and np.array_equal(self.labels, other.labels)


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
    folder, split = Path(name), "test" if "test" in result[model] else "val"
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
        accuracies=tuple(record[model][split].get("accuracy") for record in result["seeds"]),
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
        CacheError: One is damaged, or its accuracy is not that of the run's result.json.
    """
    seeds = [
        _read_seed(path, candidate.split, accuracy)
        for path, accuracy in zip(candidate.logits_files, candidate.accuracies, strict=True)
    ]
    for path, seed in zip(candidate.logits_files, seeds, strict=True):
        if not seed.has_same_rows(seeds[0]):
            raise CacheError(f"'{path}' and '{candidate.logits_files[0]}' are not of the same rows")
    return replace(seeds[0], predictions=np.concatenate([seed.predictions for seed in seeds]))


def _read_seed(path: Path, split: str, recorded_accuracy: Any) -> Predictions:
    """Read the predictions of one seed. recorded_accuracy: by result.json, not yet checked."""
    splits = read_logits(path)
    if split not in splits:
        raise CacheError(f"'{path}' is damaged: it has no {split} split")
    split_logits = splits[split]
    has_label = split_logits.labels >= 0
    labels, predictions = split_logits.labels[has_label], split_logits.logits.argmax(1)[has_label]
    accuracy = float((predictions == labels).mean()) if has_label.any() else None
    if not _is_same_accuracy(accuracy, recorded_accuracy):
        raise CacheError(
            f"'{path}' has an accuracy of {accuracy}, its result.json one of {make_printable(recorded_accuracy)}"
        )
    return Predictions(split_logits.content, split_logits.classes, labels, predictions[None])


def _is_same_accuracy(accuracy: float | None, recorded_accuracy: Any) -> bool:
    if accuracy is None:
        return recorded_accuracy is None
    return isinstance(recorded_accuracy, int | float) and isclose(accuracy, recorded_accuracy, abs_tol=1e-9)


def pair_candidates(runs: Sequence[dict[str, Candidate]]) -> list[tuple[Candidate, Candidate]]:
    """Pair the first run's student with each other one; of a single run, its baseline with its student.

    Args:
        runs: {"student": …, "baseline": …} of each run, the baseline where it has one.
    """
    first, *others = runs
    if others:
        return [(first["student"], other["student"]) for other in others]
    return [(first["baseline"], first["student"])] if "baseline" in first else []
