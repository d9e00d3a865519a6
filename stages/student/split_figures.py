"""The figures of a student, or of its teacher, on the held-out splits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from softcache.data.transfer_set import Labels, TransferSet
from softcache.pipeline.loading.training_embeddings import compute_bank
from softcache.pipeline.metrics.embedding_bank import EmbeddingBank
from softcache.pipeline.metrics.tasks import evaluate_task
from softcache.pipeline.metrics.thresholds import add_thresholds
from softcache.pipeline.models.precision import autocast
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.console import progress

if TYPE_CHECKING:
    from .setup import DistillationSetup

Outputs = NDArray[np.float32]


def evaluate_splits(
    transfer_set: TransferSet,
    outputs: Mapping[str, Outputs],
    counts: Labels,
    bank: EmbeddingBank | None = None,
    teacher_outputs: Mapping[str, Outputs] | None = None,
) -> dict[str, Any]:
    """Compute every figure of a model on each held-out split.

    Args:
        transfer_set: with the hard targets.
        outputs: {split: float32 [N, K]} of the model, by index.
        counts: int64 [K], the training rows of each class or label.
        bank: the model's embeddings of training rows; None for another task.
        teacher_outputs: {split: float32 [N, K]} of the teacher; None for the teacher itself.

    Returns:
        {split: figures}; of several labels also `thresholds`, see `add_thresholds`.
    """
    labels = {split: transfer_set.splits[split].labels for split in outputs}
    figures = {
        split: evaluate_task(
            transfer_set.task,
            values,
            labels[split],
            None if teacher_outputs is None else teacher_outputs[split],
            counts,
            bank=bank,
            progress=progress,
        )
        for split, values in outputs.items()
    }
    return add_thresholds(transfer_set.task, figures, outputs, labels)


def compute_student_bank(
    setup: "DistillationSetup", model: nn.Module, outputs: Mapping[str, Outputs], config: StudentConfig
) -> EmbeddingBank | None:
    """Run a student over labelled training rows, from which the classes of held-out rows are predicted.

    Args:
        setup: what the student was trained from.
        model: views uint8 [B, C, S, S] -> embeddings [B, D], on the device.
        outputs: {split: float32 [N, D]} of the student, see `DistillationSetup.compute_logits`.
        config: precision of the forward pass, and workers that render views.

    Returns:
        The embeddings of at most 50,000 rows; None for another task, and where no row has one class.

    Raises:
        CacheError: when an image cannot be read, or is not the one that the teacher saw.
    """
    with autocast(setup.device, config.precision):
        return compute_bank(
            setup.source,
            model,
            lambda batch: model(batch.views),
            outputs["val"],
            workers=config.workers,
            device=setup.device,
            progress=progress,
        )
