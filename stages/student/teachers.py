"""What the student's teacher says: one cache or several as one, and the map of its distribution, kept with the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import publish_json
from softcache.data.transfer_set import Labels, TransferSet, count_classes
from softcache.pipeline.batch import LinearHead
from softcache.pipeline.cache.identity import format_differences
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.teachers.combine import Combination, fit_combination, parse_combination
from softcache.pipeline.teachers.distribution_map import DistributionMap, fit_map
from softcache.pipeline.teachers.ensemble import MissingTargets, TeacherEnsemble, check_same_views, list_missing_runs
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import progress_bar
from softcache.stages.distributed.ranks import first_rank_first
from softcache.stages.runs.data import load_cache_data
from softcache.stages.runs.folder import read_json

TARGETS_FILE = "targets.json"
_STEPS = 500  # of a fit, about
SplitOutputs = dict[str, torch.Tensor]


def open_caches(folders: tuple[str, ...]) -> tuple[Cache, ...]:
    """The caches, of the same rows and views. Raises CacheError or UsageError."""
    if not folders:
        raise CacheError("the run's settings name no cache: say where it is with --cache")
    caches = tuple(Cache(Path(folder)) for folder in folders)
    check_same_views(caches)
    return caches


def load_shared_data(caches: tuple[Cache, ...], config: StudentConfig) -> TransferSet:
    """The transfer set of all of them, which each compares with its own rows."""
    transfer_set = first_rank_first(lambda: load_cache_data(caches[0], config.data, Path(config.data_root)))
    for other in caches[1:]:
        other.check_transfer_set(transfer_set)
    return transfer_set


def load_teachers(
    caches: tuple[Cache, ...], config: StudentConfig, transfer_set: TransferSet, gaps: MissingTargets
) -> tuple[TeacherEnsemble, SplitOutputs]:
    """The caches as one teacher, as a run has kept it or fitted to validation; and {split: what each said}."""
    plain = TeacherEnsemble(caches, missing=gaps)
    said: SplitOutputs = {
        split: plain.read_held_out(split) for split in ("val", "test") if split in transfer_set.splits
    }
    if config.out and (Path(config.out) / TARGETS_FILE).is_file():
        return _read_targets_record(Path(config.out), plain, config), said
    labels, val = transfer_set.splits["val"].labels, said["val"]
    combine = resolve_combination(_combination_spec(config), val, labels) if len(caches) > 1 else None
    maps: tuple[DistributionMap, ...] = ()
    if config.map:
        counts = count_classes(transfer_set.splits["train"].labels, caches[0].classes)
        heard = TeacherEnsemble(caches, combine).combine_logits(val)
        each = heard.unbind(1) if heard.ndim == 3 else (heard,)
        with progress_bar(_STEPS, f"fitting --map {config.map}", "step") as shown:
            maps = tuple(fit_map(config.map, z.numpy(), labels, counts, shown.update) for z in each)
    return TeacherEnsemble(caches, combine, maps, gaps), said


def resolve_combination(spec: str, val: torch.Tensor, labels: Labels) -> Combination:
    """The way to combine that is asked for; `learned` is fitted to validation. val: logits [N, M, K]; labels [N]."""
    if spec != "learned":
        return parse_combination(spec, val.shape[1])
    with progress_bar(_STEPS, "fitting --combine learned", "step") as shown:
        return fit_combination(val.numpy(), labels, shown.update)


def _combination_spec(config: StudentConfig) -> str:
    return config.combine or "mean_probability"


def _read_targets_record(folder: Path, plain: TeacherEnsemble, config: StudentConfig) -> TeacherEnsemble:
    """As the run has it: a fit on another machine may differ in the last bit."""
    record = read_json(folder / TARGETS_FILE)
    members, spec = len(plain.members), _combination_spec(config)
    try:
        combine = Combination.from_json(record["combine"]) if record["combine"] is not None else None
        maps = tuple(DistributionMap.from_json(one) for one in record["maps"])
        if (combine is not None) != (members > 1) or (combine and len(combine.weights) != members):
            raise ValueError(f"it is not of {members} caches")
        if combine and (combine.name != spec if spec == "learned" else combine != parse_combination(spec, members)):
            raise ValueError(f"it is not of --combine {spec}")
        if len(maps) != (bool(config.map) * (members if combine and combine.is_per_teacher else 1)):
            raise ValueError(f"{len(maps)} maps")
        if any(one.spec != config.map for one in maps):
            raise ValueError(f"a map that is not --map {config.map}")
        if any(len(one.bias) != plain.members[0].classes for one in maps):
            raise ValueError("a map of other classes")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, CacheError, UsageError) as error:
        raise CacheError(f"'{folder / TARGETS_FILE}' is damaged: {make_printable(error, 80)}") from None
    return TeacherEnsemble(plain.members, combine, maps, plain.missing)


def save_targets_record(teachers: TeacherEnsemble, folder: Path) -> None:
    """Publish targets.json, where there is more to say than one cache's logits."""
    if teachers.is_single_cache or (folder / TARGETS_FILE).is_file():
        return
    combine = teachers.combine.to_json() if teachers.combine else None
    publish_json(folder / TARGETS_FILE, {"combine": combine, "maps": [one.to_json() for one in teachers.maps]})


def check_same_shards(teachers: TeacherEnsemble, config: StudentConfig, taps: tuple[str, ...], folder: Path) -> None:
    """Write down which shards the run is trained from; a run that goes on must find the same ones."""
    first, *others = teachers.members
    used: dict[str, Any] = {
        "fingerprint": first.manifest.fingerprint,
        "draws": config.draws,
        "taps": list(taps),
        "shards": first.list_used_shards(config.draws, taps),
    }
    if others:
        used["others"] = [
            {"fingerprint": c.manifest.fingerprint, "shards": c.list_used_shards(config.draws, ())} for c in others
        ]
    if gaps := teachers.missing:
        used["missing"] = list_missing_runs(gaps)
    if not (folder / "cache.json").is_file():
        return publish_json(folder / "cache.json", used)
    begun = read_json(folder / "cache.json")
    if begun != used:
        fields = format_differences(used, begun, ("here", "begun with"))
        named = ", ".join(f"'{cache.folder}'" for cache in teachers.members)
        raise CacheError(f"'{folder}' was begun with other shards than {named} now has:{fields}")


def map_head(teachers: TeacherEnsemble, head: LinearHead | None) -> LinearHead | None:
    """The teacher's last linear layer with the map behind it."""
    return teachers.maps[0].map_head(head) if head and teachers.maps else head


def describe_teachers(teachers: TeacherEnsemble, members: list[dict[str, Any]], one: dict[str, Any]) -> list[str]:
    """Each member and what becomes of them, by the figures of each held-out split."""
    lines = [f"teacher {m['arch']} as cached: {_figures(m)}" for m in members]
    how = []
    if combine := teachers.combine:
        fitted = format_weights(combine.weights, combine.temperatures) if combine.name == "learned" else ""
        how.append(combine.name + (f" ({fitted}, fitted to val)" if fitted else ""))
    for mapping in teachers.maps:
        fitted = "" if mapping.spec.startswith("prior") else ", fitted to val"
        if mapping.spec == "temperature":
            fitted = f" {1 / float(mapping.weight[0]):.3f}{fitted}"
        how.append(f"map {mapping.spec}{fitted}")
    each = " (each)" if len(teachers.maps) > 1 else ""
    return [*lines, f"what students learn from, {'; '.join(dict.fromkeys(how))}{each}: {_figures(one)}"] if how else []


def format_weights(weights: Sequence[float], temperatures: Sequence[float]) -> str:
    """What each teacher weighs in a fitted blend, and its temperature."""
    return ", ".join(f"{w:.3f} at T = {t:.3f}" for w, t in zip(weights, temperatures, strict=True))


def _figures(record: dict[str, Any]) -> str:
    words = []
    for split in ("val", "test"):
        if (found := record.get(split)) and "nll" in found:
            words.append(f"{split} NLL {found['nll']:.4f}, accuracy {found['accuracy']:.4f}")
    return "; ".join(words) or "no labels to compare with"
