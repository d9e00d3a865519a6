"""`softcache blend`: what several caches make of one another, before any student is trained."""

import json
from typing import Any

import numpy as np
import torch

from softcache.base.errors import CacheError, UsageError
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.teachers.combine import PER_TEACHER, SINGLE_OUTPUT, Combination, parse_combination
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from softcache.stages.cli.configs import BlendConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command

from .teachers import format_weights, open_caches, resolve_combination

_COLUMNS = ("nll", "accuracy", "f1_macro")


def run(config: BlendConfig) -> None:
    """Each cache alone and each way to combine them, by the figures of the held-out splits."""
    console = Console(config.json)
    if len(config.cache) < 2:
        raise UsageError("blend compares several caches: --cache A --cache B")
    if config.combine in PER_TEACHER:
        raise UsageError(f"--combine {config.combine} blends losses, not teachers: it has no row here")
    caches = open_caches(config.cache)
    teachers = TeacherEnsemble(caches)
    splits: list[str] = [split for split in ("val", "test") if split in caches[0].manifest.splits]
    said = {split: teachers.read_held_out(split) for split in splits}
    labels = {split: _labels(caches[0], split) for split in splits}
    if "val" not in splits or not all((of_split >= 0).any() for of_split in labels.values()):
        raise CacheError(f"'{caches[0].folder}' has no labels to compare with")
    rows: list[dict[str, Any]] = [
        {"name": f"{cache.teacher} ({cache.folder})", **_figures({s: said[s][:, k] for s in splits}, labels)}
        for k, cache in enumerate(caches)
    ]
    for combine in _ways(config, said["val"], labels["val"]):
        figures = _figures({split: combine(logits) for split, logits in said.items()}, labels)
        rows.append({"name": combine.name, **combine.to_json(), **figures})
    if config.json:
        return console.print_json(json.dumps({"caches": list(config.cache), "rows": rows}))
    _print(rows, splits, console)
    best = min(rows[len(caches) :], key=lambda row: row["val"]["nll"])["name"]  # the least NLL on validation
    student = StudentConfig(cache=config.cache, combine=config.combine if best == "weighted" else best)
    console.print(f"next:  {format_command('student', student)}")


def _labels(cache: Cache, split: str) -> Any:
    """int64 [N] by index, from the cache: no image is read."""
    labels = np.empty(cache.manifest.splits[split], np.int64)
    labels[cache.row_order(split)] = cache.read_column(split, 0, "label")
    return labels


def _ways(config: BlendConfig, val: torch.Tensor, labels: Any) -> list[Combination]:
    """Every way to combine that has no knobs, and the one that is asked for."""
    plain = [name for name in SINGLE_OUTPUT if name not in ("weighted", "learned")]
    names = plain if config.combine in ("", "learned", *plain) else [*plain, config.combine]
    members = val.shape[1]
    return [*(parse_combination(name, members) for name in names), resolve_combination("learned", val, labels)]


def _figures(logits: dict[str, torch.Tensor], labels: dict[str, Any]) -> dict[str, Any]:
    found = {split: evaluate(z.numpy(), labels[split]) for split, z in logits.items()}
    return {split: {key: figures.get(key) for key in _COLUMNS} for split, figures in found.items()}


def _print(rows: list[dict[str, Any]], splits: list[str], console: Console) -> None:
    width = max(len(row["name"]) for row in rows)
    titles = {"nll": "NLL", "accuracy": "accuracy", "f1_macro": "macro F1"}
    console.print(" " * width + "".join(f"{f'{split} {titles[key]}':>15}" for split in splits for key in _COLUMNS))
    for row in rows:
        cells = "".join(f"{row[split][key]:>15.4f}" for split in splits for key in _COLUMNS)
        console.print(f"{row['name']:<{width}}{cells}")
    learned = rows[-1]
    console.print(f"learned, on val: {format_weights(learned['weights'], learned['temperatures'])}")
    console.print("per_teacher and ca_mkd blend losses, not teachers: they have no row here")
