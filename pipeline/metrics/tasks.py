"""The figures of each task: what a result reports, what is shown during training, and which figure is the main one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.progress import Progress, no_progress
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, HardTargets

from . import classification
from .arrays import Array
from .embedding_bank import EmbeddingBank
from .embeddings import evaluate_embeddings
from .labels import evaluate_labels, summarize_labels
from .numbers import evaluate_numbers, summarize_numbers

Outputs = NDArray[np.floating]


@dataclass(frozen=True)
class TaskFigures:
    """The figures of one task.

    Attributes:
        main: The figure by which models are compared.
        select: Figures by which the weights of an epoch may be selected, besides "last".
        summarize: (outputs [N, K], hard targets) -> figures that are shown after each epoch; {} where there are none.
    """

    main: str
    select: tuple[str, ...]
    summarize: Callable[[Outputs, HardTargets], dict[str, float]]


def _summarize_nothing(outputs: Outputs, labels: HardTargets) -> dict[str, float]:
    return {}


TASK_FIGURES: dict[str, TaskFigures] = {
    CLASSES: TaskFigures("accuracy", ("accuracy", "f1_macro", "nll"), classification.summarize),
    LABELS: TaskFigures("map", ("map", "f1_macro", "nll"), summarize_labels),
    NUMBERS: TaskFigures("rmse", ("rmse", "mae", "r2"), summarize_numbers),
    EMBEDDING: TaskFigures("cosine", ("cosine",), _summarize_nothing),
}

LOWER_IS_BETTER = ("nll", "rmse", "mae", "brier", "ece", "kl_to_teacher", "rmse_to_teacher")


def evaluate_task(
    task: str,
    outputs: Array,
    labels: Array,
    teacher_outputs: Array | None = None,
    counts: Array | None = None,
    bank: EmbeddingBank | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compute every figure of a split for a task.

    Args:
        task: See data/tasks.py.
        outputs: float [N, K] of the model.
        labels: Hard targets of the task, see data/tasks.py.
        teacher_outputs: float [N, K]; None where there is no teacher.
        counts: int [K], the training rows of each class; None where they are not known.
        bank: The model's embeddings of labelled training rows, for an embedding; None without.
        progress: Shows how far figures of an embedding are that take long.

    Returns:
        {name: value}, as of `classification.evaluate`, `labels.evaluate_labels`, `numbers.evaluate_numbers` or
        `embeddings.evaluate_embeddings`.

    Raises:
        UsageError: An argument has another shape or type, or outputs are not finite.
    """
    if task == CLASSES:
        return classification.evaluate(outputs, labels, teacher_outputs, counts)
    if task == EMBEDDING:
        return evaluate_embeddings(outputs, labels, teacher_outputs, bank, progress)
    evaluate = {LABELS: evaluate_labels, NUMBERS: evaluate_numbers}[task]
    return evaluate(outputs, labels, teacher_outputs)
