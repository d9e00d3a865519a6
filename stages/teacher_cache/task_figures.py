"""The figures of a teacher on the validation split, read from its complete cache, for tasks other than classes."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, HardTargets, find_known
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading.cache import Cache
from softcache.pipeline.loading.training_embeddings import read_bank
from softcache.pipeline.metrics.tasks import evaluate_task
from softcache.pipeline.teachers.ensemble import TeacherEnsemble
from softcache.stages.cli.console import Console, progress
from softcache.stages.runs.figures import Figures

_PRINTED = {LABELS: ("map", "f1_macro"), NUMBERS: ("r2", "rmse"), EMBEDDING: ("knn", "centroid_5")}
_MAX_ROWS, _MAX_BYTES = 16_384, 64 << 20  # of validation, as float32


def print_task_figures(folder: Path, transfer_set: TransferSet, console: Console) -> None:
    """Print the teacher's figures on validation in one line, where there are labels; nothing for classes.

    They are mAP and macro F1 of several labels, R² and RMSE of numbers, and of an embedding the accuracies of nearest
    neighbours and of nearest centroids of 5 rows a class. Of more than 16,384 validation rows only so many are read.

    Args:
        folder: Of a complete cache.
        transfer_set: Its data.
        console: Prints the line.
    """
    if transfer_set.task == CLASSES:
        return
    reader = CacheReader(folder)
    most = min(_MAX_ROWS, max(1, _MAX_BYTES // (4 * reader.classes)))
    positions = np.arange(min(most, reader.manifest.splits["val"]))
    labels = transfer_set.splits["val"].labels[reader.index_at("val", positions)]
    is_known = find_known(labels)
    if not is_known.any():
        return
    outputs, labels = reader.read_stored("val", 0, positions[is_known])[0].numpy(), labels[is_known]
    if transfer_set.task == EMBEDDING:
        figures = _evaluate_embedding(Cache.from_parts(TeacherEnsemble((reader,)), transfer_set), outputs, labels)
    else:
        figures = evaluate_task(transfer_set.task, outputs, labels)
    if text := Figures(figures).describe(_PRINTED[transfer_set.task], absent=""):
        console.print(f"teacher on {len(labels):,} labelled rows of val: {text}")


def _evaluate_embedding(cache: Cache, outputs: NDArray[np.float32], labels: HardTargets) -> dict[str, Any]:
    """Compute kNN and centroid accuracies alone: the linear probe takes longer than many a cache."""
    bank = read_bank(cache, cache.teachers)
    if bank is None:
        return {}
    z = outputs.astype(np.float64)
    return {
        "knn": float((bank.predict_by_neighbours(z, progress) == labels).mean()),
        "centroid_5": bank.measure_centroids(z, labels, 5),
    }
