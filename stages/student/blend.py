"""`softcache blend`: compare the ways to combine several caches into one teacher, before a student is trained."""

import json
from typing import Any

import numpy as np
import torch

from softcache.base.errors import CacheError, UsageError
from softcache.data.sources import format_placeholder, has_argument
from softcache.data.tasks import CLASSES
from softcache.data.transfer_set import Labels
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.metrics.classification import evaluate
from softcache.pipeline.teachers.combine import PER_TEACHER, SINGLE_OUTPUT, Combination, parse_combination
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from softcache.pipeline.teachers.fit import resolve_combination
from softcache.stages.cli.configs import BlendConfig, StudentConfig
from softcache.stages.cli.console import Console
from softcache.stages.cli.copied_commands import format_command
from softcache.stages.runs.figures import TITLES, Figures

from .teachers import format_weights, open_caches, show_fit

_COLUMNS = ("nll", "accuracy", "f1_macro")


def run(config: BlendConfig) -> None:
    """Print the figures of each cache alone and of each way to combine them, on the held-out splits.

    Raises:
        CacheError: when the validation split has no labels. A test split without labels is left out.
        UsageError: for fewer than two caches, or a way to combine losses instead of teachers.
    """
    console = Console(config.json)
    if len(config.cache) < 2:
        raise UsageError("blend compares several caches: --cache A --cache B")
    if config.combine in PER_TEACHER:
        raise UsageError(f"--combine {config.combine} combines losses, not teachers: it has no row here")
    if config.combine:
        parse_combination(config.combine, len(config.cache))
    caches = open_caches(config.cache)
    if caches[0].task != CLASSES:
        raise UsageError(
            f"blend combines teachers of one class an image, and the task of '{caches[0].folder}' is"
            f" {caches[0].task}: train a student from each cache, and compare them"
        )
    ensemble = TeacherEnsemble(caches)
    held_out: list[str] = [split for split in ("val", "test") if split in caches[0].manifest.splits]
    labels = {split: _read_labels(caches[0], split) for split in held_out}
    labels = {split: split_labels for split, split_labels in labels.items() if (split_labels >= 0).any()}
    if "val" not in labels:
        raise CacheError(
            f"'{caches[0].folder}' has no labels to compare with: the ways to combine that fit nothing, such as"
            " --combine mean_probability, can be trained from as they are, and students be compared by their agreement"
        )
    splits = list(labels)
    logits = {split: ensemble.read_held_out(split) for split in splits}

    rows: list[dict[str, Any]] = []
    for k, cache in enumerate(caches):
        figures = _evaluate({split: logits[split][:, k] for split in splits}, labels)
        rows.append({"name": f"{cache.teacher} ({cache.folder})", **figures})
    for combination in _list_combinations(config, logits["val"], labels["val"]):
        figures = _evaluate({split: combination(logits[split]) for split in splits}, labels)
        rows.append({"name": combination.name, **combination.to_json(), **figures})

    if config.json:
        return console.print_json(json.dumps({"caches": list(config.cache), "rows": rows}))
    _print_table(rows, splits, console)
    best = min(rows[len(caches) :], key=lambda row: row["val"]["nll"])["name"]  # the least NLL on validation
    student_config = StudentConfig(
        cache=config.cache,
        data=format_placeholder(caches[0].data) if has_argument(caches[0].data) else "",
        combine=config.combine if best == "weighted" else best,
    )
    console.print(f"next:  {format_command('student', student_config)}")


def _read_labels(cache: CacheReader, split: str) -> Labels:
    """Read the labels of a held-out split from the cache, int64 [N] by index, without decoding an image."""
    labels = np.empty(cache.manifest.splits[split], np.int64)
    labels[cache.row_order(split)] = cache.read_column(split, 0, "label")
    return labels


def _list_combinations(config: BlendConfig, logits: torch.Tensor, labels: Labels) -> list[Combination]:
    """Every way to combine that has no parameters, that of --combine, and `learned`, fitted to validation.

    Args:
        config: `combine`.
        logits: float32 [N, M, K] of M caches on the validation split.
        labels: int64 [N].
    """
    names = [name for name in SINGLE_OUTPUT if name not in ("weighted", "learned")]
    if config.combine not in ("", "learned", *names):
        names.append(config.combine)
    combinations = [parse_combination(name, logits.shape[1]) for name in names]
    return [*combinations, resolve_combination("learned", logits, labels, show_fit)]


def _evaluate(logits: dict[str, torch.Tensor], labels: dict[str, Labels]) -> dict[str, Any]:
    """{split: {figure: value}} of the figures that the table shows. logits: {split: [N, K]}; labels: {split: [N]}."""
    figures = {split: evaluate(z.numpy(), labels[split]) for split, z in logits.items()}
    return {split: {name: figures[split].get(name) for name in _COLUMNS} for split in figures}


def _print_table(rows: list[dict[str, Any]], splits: list[str], console: Console) -> None:
    width = max(len(row["name"]) for row in rows)
    titles = "".join(f"{f'{split} {TITLES[name]}':>15}" for split in splits for name in _COLUMNS)
    console.print(" " * width + titles)
    for row in rows:
        cells = "".join(f"{Figures(row[split]).format(name):>15}" for split in splits for name in _COLUMNS)
        console.print(f"{row['name']:<{width}}{cells}")
    learned = rows[-1]
    console.print(f"learned, on val: {format_weights(learned['weights'], learned['temperatures'])}")
    console.print("per_teacher and ca_mkd combine losses, not teachers: they have no row here")
