"""Embeddings of labelled training rows, of the teacher and of a student, for figures such as kNN accuracy."""

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from softcache.base.progress import Progress, no_progress
from softcache.data.tasks import EMBEDDING
from softcache.pipeline.batch import Batch
from softcache.pipeline.metrics.embedding_bank import EmbeddingBank
from softcache.pipeline.teachers.ensemble import TeacherEnsemble

if TYPE_CHECKING:
    from .cache import Cache

Rows = NDArray[np.int64]
Outputs = NDArray[np.float32]
MAX_BANK_ROWS, MAX_BANK_BYTES = 50_000, 256 << 20  # of training rows, as float32
_BATCH_SIZE = 512
_CHUNK_ROWS = 4096


def select_bank_positions(cache: "Cache") -> Rows:
    """Select the training rows whose embeddings predict the classes of held-out rows.

    They are the first labelled rows in the order of the cache, which is random: up to 50,000, and up to 256 MiB of the
    teacher's outputs.

    Args:
        cache: The cache and its data.

    Returns:
        int64 [M], positions in the training split; empty for another task than "embedding", where no training row has
        a class, and where views are mixtures of two images, which have no one class.
    """
    reader = cache.reader
    if cache.task != EMBEDDING or reader.views.mixes_images:
        return np.zeros(0, np.int64)
    positions = np.flatnonzero(cache.transfer_set.splits["train"].labels[reader.row_order("train")] >= 0)
    return positions[: min(MAX_BANK_ROWS, max(1, MAX_BANK_BYTES // (4 * reader.classes)))]


def read_bank(cache: "Cache", teachers: TeacherEnsemble, val_outputs: Outputs | None = None) -> EmbeddingBank | None:
    """Read a teacher's embeddings of labelled training rows in draw 0.

    Args:
        cache: The cache and its data.
        teachers: The teacher: that of the cache, or a member of it.
        val_outputs: float32 [V, D] of the teacher for all validation rows; None where no probe is fitted.

    Returns:
        The embeddings; None where no row is selected, see `select_bank_positions`.

    Raises:
        CacheError: A shard is missing or damaged.
    """
    positions = select_bank_positions(cache)
    if not len(positions):
        return None
    parts = np.array_split(positions, -(-len(positions) // _CHUNK_ROWS))
    outputs = torch.cat([teachers.read_targets("train", 0, part)[0] for part in parts])
    outputs = teachers.merge_members(outputs)
    return _make_bank(cache, positions, np.asarray(outputs.numpy(), np.float32), val_outputs)


def compute_bank(
    cache: "Cache",
    model: nn.Module,
    compute: Callable[[Batch], torch.Tensor],
    val_outputs: Outputs,
    *,
    workers: int,
    device: str | torch.device,
    progress: Progress = no_progress,
) -> EmbeddingBank | None:
    """Run a model over labelled training rows in draw 0, in eval mode and without gradients.

    Args:
        cache: The cache and its data.
        model: The model, on the device.
        compute: batch -> the model's outputs [B, D].
        val_outputs: float32 [V, D] of the model for all validation rows.
        workers: Processes that decode and render; 0 for a thread of this process.
        device: Where the model is.
        progress: Shows how many batches are done.

    Returns:
        The embeddings; None where no row is selected, see `select_bank_positions`.

    Raises:
        CacheError: An image cannot be read, or is not the one that the teacher saw.
    """
    positions = select_bank_positions(cache)
    if not len(positions):
        return None
    index = cache.reader.index_at("train", positions)
    stream = cache.loader(
        "train", _BATCH_SIZE, subset=index, draws=1, workers=workers, device=device, targets=False
    ).stream
    row_of_index = np.zeros(len(stream.split), np.int64)
    row_of_index[index] = np.arange(len(index))
    steps, rows, values = stream.steps_per_epoch, [], []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), closing(stream.batches(0, steps)) as batches:
            for batch in progress(batches, steps, "embedding training rows"):
                rows.append(row_of_index[batch.index.cpu().numpy()])
                values.append(compute(batch).float().cpu().numpy())
    finally:
        model.train(was_training)
    outputs = np.empty((len(index), values[0].shape[1]), np.float32)
    outputs[np.concatenate(rows)] = np.concatenate(values)
    return _make_bank(cache, positions, outputs, val_outputs)


def _make_bank(cache: "Cache", positions: Rows, outputs: Outputs, val_outputs: Outputs | None) -> EmbeddingBank:
    """Make a bank of a model's outputs, float32 [M, D], for the training rows at some positions [M]."""
    labels = cache.transfer_set.splits["train"].labels
    return EmbeddingBank(
        outputs,
        labels[cache.reader.index_at("train", positions)],
        val_outputs,
        None if val_outputs is None else cache.transfer_set.splits["val"].labels,
        int((labels >= 0).sum()),
    )
