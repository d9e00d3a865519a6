"""The figures of each task: what a result reports, what is shown during training, and which figure is the main one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.progress import Progress, no_progress
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, NUMBERS, TASKS, HardTargets, find_form

from . import classification
from .arrays import Array, to_numpy
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


def evaluate(
    logits: Array, labels: Array, teacher_logits: Array | None = None, counts: Array | None = None, *, task: str = ""
) -> dict[str, Any]:
    """Compute every metric of a split, those of result.json.

    Args:
        logits: float [N, K], a NumPy array or a tensor on any device, as all arguments. Where the task is one of
            numbers or embeddings, these.
        labels: The hard targets: of classes int [N], -1 where there is none; of several labels int [N, K] of 0, 1, and
            -1 where unknown; of numbers float [N, K], NaN where unknown; of embeddings as of classes.
        teacher_logits: float [N, K]; None where there is no teacher.
        counts: int [K], the training rows of each class; None where they are not known. For classes alone.
        task: "classes", "labels", "numbers" or "embedding"; "" for the one whose hard targets have the form of
            `labels`. An embedding has to be named. Numbers may be [N] then, and labels of 0 and 1 be floats.

    Returns:
        {name: value}. Of classes, and without labels only rows, labelled, agreement and kl_to_teacher:

        rows, labelled: Numbers of rows.
        agreement: Share of rows in which the model and the teacher predict the same class; of several labels, of all
            pairs of row and label.
        kl_to_teacher: Mean of KL(teacher || model) at temperature 1, in nats; of several labels, of the sigmoids.
        accuracy, top5: Shares of rows; top5 is None up to 5 classes. Of equal logits the first class comes first.
        nll, brier: Means over the rows; in nats, and in 0 … 2.
        ece: Expected calibration error, 15 bins of equal width.
        precision_macro, recall_macro, f1_macro: Over the classes that occur.
        f1_weighted: F1 of each class, weighted by its rows.
        auroc_macro: One class against the rest; None when a class has no row.
        per_class: precision, recall, f1 and support, each [K]; None for a class that has no row.
        confusion: [K][K], rows of the true class by predicted class; None over 100 classes.
        recall_head, recall_medium, recall_tail: Mean recall of the classes of `group_classes`; None without groups.
        map, f1_micro, f1_samples, per_label: Of several labels, besides nll, precision, recall, F1 and AUROC.
        mae, rmse, r2, spearman, per_output: Of numbers; rmse_to_teacher and r2_to_teacher with a teacher.
        cosine: Of embeddings, to the teacher's.

    Raises:
        UsageError: An argument has another shape or type, logits are not finite, or a label is no class.

    Source:
        Guo et al. 2017, "On calibration of modern neural networks" (ece).
    """
    if task and task not in TASKS:
        raise unknown_name_error("task", str(task), TASKS)
    y = to_numpy("labels", labels)
    task = task or find_form(y)
    if task != CLASSES and counts is not None:
        raise UsageError(f"counts are of classes, and the task here is {task}: leave them out")
    if task == NUMBERS and y.ndim == 1:
        y = y[:, None]
    if task == LABELS and y.dtype.kind == "f" and np.isin(y, (-1, 0, 1)).all():
        y = y.astype(np.int8)
    return evaluate_task(task, logits, y, teacher_logits, counts)
