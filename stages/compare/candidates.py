"""What `softcache compare` holds against each other: a student or a baseline, its settings, and what its seeds say."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable
from softcache.data.transfer_set import Labels
from softcache.pipeline.cache.identity import find_differences
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.runs.folder import IGNORED_OPTIONS, read_fingerprints, read_json
from softcache.stages.runs.logits import LOGITS, read_logits

_SEEDS = ("seed", "seeds", "order_seed")
# And on which machine; data by what is in the cache; a recipe by what it sets.
_IGNORED_OPTIONS = (*IGNORED_OPTIONS, "data", "data_root", "device", "workers", "baseline", "keep_every", "recipe")
OptionDifference = tuple[str, Any, Any]  # a setting, and its value in the first and in the second


@dataclass(frozen=True)
class Candidate:
    """One line of the table. accuracies: of each seed on the split, None without labels; files: its logits; folder: of
    the run."""

    name: str
    folder: Path
    split: str
    config: dict[str, Any]
    seeds: tuple[int, ...]
    accuracies: tuple[float | None, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Predictions:
    """The rows of a split that have a label, and the class that each seed guesses: labels [N], guesses [seeds, N]."""

    content: str
    classes: tuple[str, ...]
    labels: Labels
    predictions: NDArray[np.int64]

    def has_same_rows(self, other: "Predictions") -> bool:
        """Whether these are the same images with the same labels."""
        same = self.content == other.content and self.classes == other.classes
        return same and np.array_equal(self.labels, other.labels)


def read_candidate(name: str, title: str, result: dict[str, Any], model: str) -> Candidate:
    """The student or the baseline of a run. Raises KeyError, TypeError, ValueError, OverflowError or AttributeError
    for what is no result of a student, CacheError for a cache.json that is none."""
    folder, split = Path(name), "test" if "test" in result[model] else "val"
    seeds = tuple(int(one["seed"]) for one in result["seeds"])
    places = [folder] if len(seeds) == 1 else [folder / f"seed-{seed}" for seed in seeds]
    config = {field.name: field.default for field in fields(StudentConfig)} | result["settings"]
    if not seeds or not all(_plain(value) for value in config.values()):
        raise ValueError("no seeds, or settings that no command could have given")
    config["cache"] = _cache(folder, result)
    if model == "baseline":
        config |= {"loss": ["hard targets alone"], "finetune_epochs": 0}
    return Candidate(
        title,
        folder,
        split,
        config,
        seeds,
        tuple(one[model][split].get("accuracy") for one in result["seeds"]),
        tuple((place if model == "student" else place / model) / LOGITS for place in places),
    )


def _plain(value: Any) -> bool:
    words = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return words or isinstance(value, str | int | float)


def _cache(folder: Path, result: dict[str, Any]) -> str:
    """What a run was trained from, wherever it lies: the teacher and the beginning of each fingerprint."""
    path = folder / "cache.json"
    record = read_json(path) if path.is_file() else result["cache"]
    prints = [one[:12] for one in read_fingerprints(record, path)]
    return f"{result['teacher']['arch']} ({', '.join(prints)})"


def find_differing_options(first: Candidate, second: Candidate) -> list[OptionDifference]:
    """The settings in which two differ."""
    return [one for one in find_differences(first.config, second.config) if one[0] not in _IGNORED_OPTIONS]


def only_seeds_differ(apart: Sequence[OptionDifference]) -> bool:
    """Whether nothing but seeds is apart."""
    return all(name in _SEEDS for name, _, _ in apart)


def format_value(value: Any) -> str:
    """A setting as people write it."""
    return make_printable(" ".join(map(str, value)) if isinstance(value, list | tuple) else value) or "-"


def read_predictions(side: Candidate) -> Predictions:
    """What the seeds of a side say. Raises UsageError when a file is not there, CacheError when it is damaged, or is
    not what the figures of the result are of."""
    seeds = [_read_seed(path, side.split, known) for path, known in zip(side.files, side.accuracies, strict=True)]
    for path, one in zip(side.files, seeds, strict=True):
        if not one.has_same_rows(seeds[0]):
            raise CacheError(f"'{path}' is of other rows than '{side.files[0]}'")
    return replace(seeds[0], predictions=np.concatenate([one.predictions for one in seeds]))


def _read_seed(path: Path, split: str, accuracy: Any) -> Predictions:
    """accuracy: as the result has it."""
    splits = read_logits(path)
    if split not in splits:
        raise CacheError(f"'{path}' is damaged: it has no {split} split")
    kept = splits[split]
    known = kept.labels >= 0
    labels, guess = kept.labels[known], kept.logits.argmax(1)[known]
    right = float((guess == labels).mean()) if known.any() else None
    if not _same(right, accuracy):
        raise CacheError(f"'{path}' has an accuracy of {right}, its result.json says {make_printable(accuracy)}")
    return Predictions(kept.content, kept.classes, labels, guess[None])


def _same(one: float | None, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return isclose(one, other, abs_tol=1e-9)
    return one is other


def pair_candidates(runs: Sequence[dict[str, Candidate]]) -> list[tuple[Candidate, Candidate]]:
    """Each student against that of the first run; that of one run against its baseline, where it has one."""
    first, *others = runs
    if others:
        return [(first["student"], other["student"]) for other in others]
    return [(first["baseline"], first["student"])] if "baseline" in first else []
