"""Embeddings of labelled training rows, of the teacher and of a student, for figures such as kNN accuracy."""

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.progress import Progress, no_progress
from softcache.data.tasks import EMBEDDING
from softcache.data.transfer_set import TransferSet
from softcache.pipeline.batch import Batch
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.metrics.embedding_bank import EmbeddingBank
from softcache.pipeline.teachers.ensemble import TeacherEnsemble

from .stream import BatchStream

Rows = NDArray[np.int64]
Outputs = NDArray[np.float32]
MAX_BANK_ROWS, MAX_BANK_BYTES = 50_000, 256 << 20  # of training rows, as float32
BATCH_SIZE = 512
_CHUNK_ROWS = 4096


def select_bank_positions(reader: CacheReader, transfer_set: TransferSet) -> Rows:
    """Select the training rows whose embeddings predict the classes of held-out rows.

    They are the first labelled rows in the order of the cache, which is random: up to 50,000, and up to 256 MiB of the
    teacher's outputs.

    Args:
        reader: The cache.
        transfer_set: Its data.

    Returns:
        int64 [M], positions in the training split; empty for another task than "embedding", where no training row has
        a class, and where views are mixtures of two images, which have no one class.
    """
    labels = transfer_set.splits["train"].labels
    if reader.task != EMBEDDING or reader.views.mixup > 0:
        return np.zeros(0, np.int64)
    positions = np.flatnonzero(labels[reader.row_order("train")] >= 0)
    return positions[: min(MAX_BANK_ROWS, max(1, MAX_BANK_BYTES // (4 * reader.classes)))]


def make_bank(
    reader: CacheReader,
    transfer_set: TransferSet,
    positions: Rows,
    outputs: Outputs,
    val_outputs: Outputs | None = None,
) -> EmbeddingBank:
    """Make the bank of a model from its outputs.

    Args:
        reader: The cache.
        transfer_set: Its data.
        positions: int64 [M], see `select_bank_positions`.
        outputs: float32 [M, D] of the model for draw 0 of these rows.
        val_outputs: float32 [V, D] of the model for all validation rows; None where no probe is fitted.
    """
    labels = transfer_set.splits["train"].labels
    return EmbeddingBank(
        outputs,
        labels[reader.index_at("train", positions)],
        val_outputs,
        None if val_outputs is None else transfer_set.splits["val"].labels,
        int((labels >= 0).sum()),
    )


def read_training_outputs(teachers: TeacherEnsemble, positions: Rows) -> Outputs:
    """Read the teacher's outputs for draw 0 of training rows, float32 [M, D].

    Args:
        teachers: The caches as one teacher.
        positions: int64 [M] of the rows.

    Raises:
        CacheError: A shard is missing or damaged.
    """
    parts: Sequence[Rows] = np.array_split(positions, -(-len(positions) // _CHUNK_ROWS))
    outputs = torch.cat([teachers.read_targets("train", 0, part)[0] for part in parts])
    if teachers.combine and teachers.combine.is_per_teacher:
        outputs = teachers.combine(outputs)
    return np.asarray(outputs.numpy(), np.float32)


def compute_training_outputs(
    compute: Callable[[Batch], torch.Tensor], stream: BatchStream, index: Rows, progress: Progress = no_progress
) -> Outputs:
    """Run a model over training rows in draw 0, without gradients.

    Args:
        compute: batch -> outputs [B, D] of the model, which is in eval mode.
        stream: Batches of these rows, of one draw.
        index: int64 [M] of the rows.
        progress: Shows how many batches are done.

    Returns:
        float32 [M, D], in the order of the index.

    Raises:
        CacheError: An image cannot be read, or is not the one that the teacher saw.
    """
    row_of_index = np.full(len(stream.split), -1)
    row_of_index[index] = np.arange(len(index))
    outputs: Outputs | None = None
    steps = stream.steps_per_epoch
    with torch.no_grad(), closing(stream.batches(0, steps)) as batches:
        for batch in progress(batches, steps, "embedding training rows"):
            values = compute(batch).float().cpu().numpy()
            if outputs is None:
                outputs = np.empty((len(index), values.shape[1]), np.float32)
            outputs[row_of_index[batch.index.cpu().numpy()]] = values
    assert outputs is not None
    return outputs
