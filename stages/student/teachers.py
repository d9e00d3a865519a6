"""A student's teacher: one cache, or several combined as one, and the map of its distribution; recorded in the run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import publish_json
from softcache.data.content_index import open_index
from softcache.data.tasks import EMBEDDING
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.identity import format_differences
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.teachers.combine import Combination, choose_combination, parse_combination
from softcache.pipeline.teachers.distribution_map import DistributionMap
from softcache.pipeline.teachers.ensemble import MissingTargets, TeacherEnsemble, check_same_views, list_missing_runs
from softcache.pipeline.teachers.fit import fit_teachers
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import Console, progress_bar
from softcache.stages.distributed.ranks import first_rank_first, is_first
from softcache.stages.runs.data import load_cache_data
from softcache.stages.runs.figures import Figures
from softcache.stages.runs.folder import read_json

TARGETS_FILE = "targets.json"
SHARDS_FILE = "cache.json"
_FIT_STEPS = 500  # of a fit, roughly: the length of its progress bar


def open_caches(folders: tuple[str, ...]) -> tuple[CacheReader, ...]:
    """Open the caches that a student learns from.

    Raises:
        CacheError: when no folder is given, one holds no valid cache, or their rows or views differ.
        UsageError: when the same cache is given twice.
    """
    if not folders:
        raise CacheError("the run's settings name no cache: name it with --cache")
    caches = tuple(CacheReader(Path(folder)) for folder in folders)
    check_same_views(caches)
    return caches


def load_shared_data(caches: tuple[CacheReader, ...], config: StudentConfig) -> TransferSet:
    """Load the transfer set of the caches and compare it with each of them.

    Args:
        caches: of the same rows and views.
        config: `data` and `data_root`, where the images are on this machine, `index` and `rehash`. Files of a folder
            that are no rows are counted in a line on standard error.

    Raises:
        CacheError: when the images are not those of a cache.
    """
    index = open_index(config.index, config.rehash and is_first())
    transfer_set = first_rank_first(lambda: load_cache_data(caches[0], config.data, Path(config.data_root), index))
    for cache in caches[1:]:
        cache.check_transfer_set(transfer_set)
    for line in (transfer_set.left_out, *index.notes):
        if line:
            Console(config.json).note(line)
    return transfer_set


def load_teachers(
    caches: tuple[CacheReader, ...], config: StudentConfig, transfer_set: TransferSet, missing: MissingTargets
) -> tuple[TeacherEnsemble, dict[str, torch.Tensor]]:
    """Make one teacher of the caches.

    A run that was started before has a record of how they are combined and mapped, which is used as it is. Otherwise
    both are fitted to the validation split, where they need fitting.

    Args:
        caches: of the same rows and views.
        config: `combine` and `map`; `out`, the folder with the record.
        transfer_set: the images and labels.
        missing: {draw: bool [rows], which positions lack targets}.

    Returns:
        The teacher, and {val and test: logits by index, float32 [N, K] of one cache, [N, M, K] of M caches} before
        they are combined and mapped.

    Raises:
        CacheError: when the record is damaged.
        UsageError: when a fit needs labels and there are none.
    """
    members = TeacherEnsemble(caches, missing=missing)
    logits: dict[str, torch.Tensor] = {
        split: members.read_held_out(split) for split in ("val", "test") if split in transfer_set.splits
    }
    if config.out and (Path(config.out) / TARGETS_FILE).is_file():
        return _read_targets_record(Path(config.out), members, config), logits
    combine = choose_combination(config.combine, caches[0].task) if len(caches) > 1 else ""
    return fit_teachers(caches, transfer_set, logits["val"], combine, config.map, missing, show_fit), logits


@contextmanager
def show_fit(title: str) -> Iterator[Callable[[], object]]:
    """Show the steps of a fit on a progress bar."""
    with progress_bar(_FIT_STEPS, title, "step") as bar:
        yield bar.update


def _read_targets_record(folder: Path, members: TeacherEnsemble, config: StudentConfig) -> TeacherEnsemble:
    """Read the combination and maps of a run. (A fit on another machine may differ in the last bit.)"""
    path = folder / TARGETS_FILE
    record = read_json(path)
    try:
        combination = Combination.from_json(record["combine"]) if record["combine"] is not None else None
        maps = tuple(DistributionMap.from_json(map_record) for map_record in record["maps"])
        spec = choose_combination(config.combine, members.members[0].task) if len(members.members) > 1 else ""
        _check_combination(combination, spec, len(members.members))
        _check_maps(maps, config.map, combination, members)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, CacheError, UsageError) as error:
        raise CacheError(f"'{path}' is damaged: {make_printable(error, 80)}") from None
    return TeacherEnsemble(members.members, combination, maps, members.missing)


def _check_combination(combination: Combination | None, spec: str, caches: int) -> None:
    """Raise ValueError when a recorded combination is not the one that the run's options ask for."""
    if combination is None:
        if caches > 1:
            raise ValueError(f"it has no combination of the {caches} caches")
        return
    if caches == 1 or len(combination.weights) != caches:
        raise ValueError(f"it combines {len(combination.weights)} caches, and the run has {caches}")
    is_same = combination.name == spec if spec == "learned" else combination == parse_combination(spec, caches)
    if not is_same:
        raise ValueError(f"its combination is not --combine {spec}")


def _check_maps(
    maps: tuple[DistributionMap, ...], spec: str, combination: Combination | None, members: TeacherEnsemble
) -> None:
    """Raise ValueError when recorded maps are not those that the run's options ask for."""
    is_per_teacher = combination is not None and combination.is_per_teacher
    expected = 0
    if spec:
        expected = len(members.members) if is_per_teacher else 1
    if len(maps) != expected:
        raise ValueError(f"it has {len(maps)} maps instead of {expected}")
    for mapping in maps:
        if mapping.spec != spec:
            raise ValueError(f"it has the map {mapping.spec} instead of --map {spec}")
        if len(mapping.bias) != members.members[0].classes:
            raise ValueError(f"its map is for {len(mapping.bias)} classes instead of {members.members[0].classes}")


def save_targets_record(teachers: TeacherEnsemble, folder: Path) -> None:
    """Publish targets.json, once, unless the student learns from the logits of one cache as they are."""
    if teachers.is_single_cache or (folder / TARGETS_FILE).is_file():
        return
    combination = teachers.combine.to_json() if teachers.combine else None
    publish_json(
        folder / TARGETS_FILE, {"combine": combination, "maps": [mapping.to_json() for mapping in teachers.maps]}
    )


def save_shards_record(teachers: TeacherEnsemble, config: StudentConfig, taps: tuple[str, ...], folder: Path) -> None:
    """Publish cache.json, which lists the shards that the run is trained from, or compare with the one that exists.

    Args:
        teachers: the caches.
        config: `draws`, of which the shards are used.
        taps: the cached features that are read.
        folder: the folder of the run.

    Raises:
        CacheError: when a run to continue was trained from other shards, with the differences.
    """
    first, *others = teachers.members
    used: dict[str, Any] = {
        "fingerprint": first.manifest.fingerprint,
        "draws": config.draws,
        "taps": list(taps),
        "shards": first.list_used_shards(config.draws, taps),
    }
    if others:
        used["others"] = [
            {"fingerprint": cache.manifest.fingerprint, "shards": cache.list_used_shards(config.draws, ())}
            for cache in others
        ]
    if teachers.missing:
        used["missing"] = list_missing_runs(teachers.missing)
    path = folder / SHARDS_FILE
    if not path.is_file():
        return publish_json(path, used)
    saved = read_json(path)
    if saved != used:
        differences = format_differences(used, saved, ("now", "before"))
        folders = ", ".join(f"'{cache.folder}'" for cache in teachers.members)
        raise CacheError(f"'{folder}' was trained from other shards than {folders} now has:{differences}")


def describe_teachers(
    teachers: TeacherEnsemble, member_metrics: list[dict[str, Any]], metrics: dict[str, Any]
) -> list[str]:
    """Describe each cache, and what they are combined and mapped to, by the figures of the held-out splits.

    Args:
        teachers: the caches as one teacher.
        member_metrics: {arch, val, test} of each cache.
        metrics: the same of the one teacher that they make.

    Returns:
        Lines to print.
    """
    if teachers.members[0].task == EMBEDDING:
        lines = [f"teacher {cache.teacher}: an embedding of {cache.classes} numbers" for cache in teachers.members]
        return [*lines, "each loss is the mean over these teachers"]
    lines = [f"teacher {member['arch']} as cached: {_format_metrics(member)}" for member in member_metrics]
    changes = []
    if combination := teachers.combine:
        fit = ""
        if combination.name == "learned":
            fit = f" ({format_weights(combination.weights, combination.temperatures)}, fitted to val)"
        changes.append(combination.name + fit)
    for mapping in teachers.maps:
        fit = "" if mapping.spec.startswith("prior") else ", fitted to val"
        if mapping.spec == "temperature":
            fit = f" {1 / float(mapping.weight[0]):.3f}{fit}"
        changes.append(f"map {mapping.spec}{fit}")
    if changes:
        each = " (each)" if len(teachers.maps) > 1 else ""
        lines.append(f"targets of the student, {'; '.join(dict.fromkeys(changes))}{each}: {_format_metrics(metrics)}")
    return lines


def format_weights(weights: Sequence[float], temperatures: Sequence[float]) -> str:
    """Format the weight and the temperature of each teacher in a learned combination."""
    return ", ".join(f"{w:.3f} at T = {t:.3f}" for w, t in zip(weights, temperatures, strict=True))


def _format_metrics(metrics: dict[str, Any]) -> str:
    parts = []
    for split in ("val", "test"):
        figures = Figures(metrics.get(split) or {})
        if figures.has_labels():
            parts.append(f"{split} {figures.describe(('nll', 'accuracy'))}")
    return "; ".join(parts) or "no labels to compare with"
