"""Classification metrics: what a result reports about a model's logits on a split.

In NumPy, with the definitions of scikit-learn: importing that takes 1.2 s, a third of a small student's run.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.transfer_set import Labels

from .arrays import Array, check_finite, to_numpy

Floats = NDArray[np.float64]
ECE_BINS = 15
_MAX_MATRIX_CLASSES = 100  # up to which a confusion matrix is part of a result: 10,000 numbers


def evaluate(
    logits: Array, labels: Array, teacher_logits: Array | None = None, counts: Array | None = None
) -> dict[str, Any]:
    """Compute every metric of a split, those of result.json.

    Args:
        logits: float [N, K], a NumPy array or a tensor on any device, as all arguments.
        labels: int [N], -1 where there is none.
        teacher_logits: float [N, K]; None where there is no teacher.
        counts: int [K], the training rows of each class; None where they are not known.

    Returns:
        {name: value}. Without labels only rows, labelled, agreement and kl_to_teacher.

        rows, labelled: Numbers of rows.
        agreement: Share of rows in which the model and the teacher predict the same class.
        kl_to_teacher: Mean of KL(teacher || model) at temperature 1, in nats.
        accuracy, top5: Shares of rows; top5 is None up to 5 classes. Of equal logits the first class comes first.
        nll, brier: Means over the rows; in nats, and in 0 … 2.
        ece: Expected calibration error, 15 bins of equal width.
        precision_macro, recall_macro, f1_macro: Over the classes that occur.
        f1_weighted: F1 of each class, weighted by its rows.
        auroc_macro: One class against the rest; None when a class has no row.
        per_class: precision, recall, f1 and support, each [K]; None for a class that has no row.
        confusion: [K][K], rows of the true class by predicted class; None over 100 classes.
        recall_head, recall_medium, recall_tail: Mean recall of the classes of `group_classes`; None without groups.

    Raises:
        UsageError: An argument has another shape or type, logits are not finite, or a label is no class.

    Source:
        Guo et al. 2017, "On calibration of modern neural networks" (ece).
    """
    z, y = to_numpy("logits", logits), to_numpy("labels", labels)
    teacher = None if teacher_logits is None else to_numpy("teacher_logits", teacher_logits)
    rows_of_classes = None if counts is None else to_numpy("counts", counts)
    _check_arguments(z, y, teacher, rows_of_classes)
    is_labelled = y >= 0
    log_p = log_softmax(z)
    result: dict[str, Any] = {"rows": len(y), "labelled": int(is_labelled.sum())}
    if teacher is not None:
        log_t = log_softmax(teacher)
        result["agreement"] = float((z.argmax(1) == teacher.argmax(1)).mean())
        result["kl_to_teacher"] = float((np.exp(log_t) * (log_t - log_p)).sum(1).mean())
    if is_labelled.any():
        result |= _compute_label_metrics(z[is_labelled], log_p[is_labelled], y[is_labelled])
        result |= _compute_recall_by_group(result["per_class"]["recall"], rows_of_classes)
    return result


def _check_arguments(
    logits: NDArray[Any], labels: NDArray[Any], teacher: NDArray[Any] | None, counts: NDArray[Any] | None
) -> None:
    """Raise UsageError for what `evaluate` cannot work with."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.shape[1]:
        raise UsageError(f"logits {list(logits.shape)} and labels {list(labels.shape)} are not [N, K] and [N]")
    if teacher is not None and teacher.shape != logits.shape:
        raise UsageError(f"logits {list(logits.shape)} and the teacher's {list(teacher.shape)} differ in their shape")
    K = logits.shape[1]
    if labels.size and labels.dtype.kind not in "iu":
        raise UsageError(f"labels are {labels.dtype}: expected whole numbers, -1 where there is none")
    if labels.size and labels.max() >= K:
        raise UsageError(f"label {labels.max()} is not below the {K} classes of the logits")
    if counts is not None and (counts.shape != (K,) or counts.dtype.kind not in "iu"):
        raise UsageError(f"counts are {counts.dtype} {list(counts.shape)}: expected whole numbers [{K}]")
    for owner, values in (("student", logits), ("teacher", teacher)):
        if values is not None:
            check_finite(owner, values)


def summarize(logits: NDArray[np.floating], labels: Labels) -> dict[str, float]:
    """Compute the metrics that are shown during training: accuracy, f1_macro and nll; none without labels.

    Args:
        logits: float [N, K].
        labels: int64 [N], -1 where there is none.
    """
    is_labelled = labels >= 0
    if not is_labelled.any():
        return {}
    labels, predicted = labels[is_labelled], logits.argmax(1)[is_labelled]
    scores = _score_classes(labels, predicted, logits.shape[1])
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1_macro": float(scores.f1[scores.support > 0].mean()),
        "nll": mean_nll(log_softmax(logits[is_labelled]), labels),
    }


class _ClassScores(NamedTuple):
    """Scores of each class, [K]; 0 where nothing is to be divided by."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Labels


def _score_classes(labels: Labels, predicted: Labels, K: int) -> _ClassScores:
    """Compute scikit-learn's precision_recall_fscore_support, with 0 for a division by zero.

    It takes 0.03 ms where scikit-learn takes 3: every epoch needs it, and an epoch of a small student takes 15 ms.
    """
    support, claims, hits = (np.bincount(x, minlength=K) for x in (labels, predicted, labels[labels == predicted]))
    precision, recall = hits / np.maximum(claims, 1), hits / np.maximum(support, 1)
    return _ClassScores(precision, recall, 2 * hits / np.maximum(claims + support, 1), support)


def rank_labels(logits: NDArray[np.floating], labels: Labels) -> NDArray[np.int64]:
    """Return the place of each row's label among its classes, by falling logit: int64 [N], 0 for the largest logit.

    Of equal logits the first class comes first, as in argmax: a label has the place 0 exactly where it is predicted.

    Args:
        logits: float [N, K].
        labels: int64 [N], none hidden.
    """
    at_label = np.take_along_axis(logits, labels[:, None], 1)
    is_earlier_class = np.arange(logits.shape[1]) < labels[:, None]
    is_before = (logits > at_label) | ((logits == at_label) & is_earlier_class)
    return np.asarray(is_before.sum(1), np.int64)


def _compute_label_metrics(logits: NDArray[np.floating], log_p: Floats, labels: Labels) -> dict[str, Any]:
    """Compute the metrics that need labels. Predictions are read from the logits: rounding can tie probabilities."""
    p, predicted, K = np.exp(log_p), logits.argmax(1), log_p.shape[1]
    one_hot = np.eye(K)[labels]
    precision, recall, f1, support = _score_classes(labels, predicted, K)
    present = support > 0
    areas = [compute_auroc(p[:, k], labels == k) for k in range(K)] if present.all() and K > 1 else []
    return {
        "accuracy": float((predicted == labels).mean()),
        "top5": float((rank_labels(logits, labels) < 5).mean()) if K > 5 else None,
        "nll": mean_nll(log_p, labels),
        "brier": float(((p - one_hot) ** 2).sum(1).mean()),
        "ece": calibration_error(p.max(1), predicted == labels),
        "precision_macro": float(precision[present].mean()),
        "recall_macro": float(recall[present].mean()),
        "f1_macro": float(f1[present].mean()),
        "f1_weighted": float((f1 * support).sum() / len(labels)),
        "auroc_macro": float(np.mean(areas)) if areas else None,
        "per_class": {
            "precision": _mask_absent_classes(support, precision),
            "recall": _mask_absent_classes(support, recall),
            "f1": _mask_absent_classes(support, f1),
            "support": support.tolist(),
        },
        "confusion": np.bincount(K * labels + predicted, minlength=K * K).reshape(K, K).tolist()
        if K <= _MAX_MATRIX_CLASSES
        else None,
    }


def compute_auroc(scores: NDArray[np.floating], is_positive: NDArray[np.bool_]) -> float:
    """Compute the area under the ROC curve: the share of pairs of a positive and another row in the right order.

    Args:
        scores: float [N]; of equal scores, half a pair is in the right order.
        is_positive: bool [N], with at least one row of each kind.
    """
    _, place, rows = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(rows) - (rows - 1) / 2)[place]
    positive = int(is_positive.sum())
    above = ranks[is_positive].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(scores) - positive)))


def _mask_absent_classes(support: Labels, values: Floats) -> list[float | None]:
    """Return the values as a list, with None for a class that has no row: its value is unknown, not 0."""
    return [value if rows else None for rows, value in zip(support.tolist(), values.tolist(), strict=True)]


def group_classes(counts: Labels) -> dict[str, list[int]]:
    """Group the classes by their number of training rows.

    Args:
        counts: int64 [K], the rows of each class.

    Returns:
        {head, medium, tail: classes}: the third with the most rows, the rest, the third with the fewest; of classes
        with equally many the first comes first. All empty when the largest has less than twice the smallest's rows.
    """
    if len(counts) < 2 or not counts.any() or counts.max() < 2 * counts.min():
        return {"head": [], "medium": [], "tail": []}
    order, third = np.argsort(-counts, kind="stable").tolist(), max(1, len(counts) // 3)
    return {"head": order[:third], "medium": order[third:-third], "tail": order[-third:]}


def _compute_recall_by_group(recall: list[float | None], counts: Labels | None) -> dict[str, float | None]:
    """Compute the mean recall of the classes of each group that occur; None where none occurs."""
    recalls: dict[str, float | None] = {}
    for name, classes in group_classes(np.zeros(0, np.int64) if counts is None else counts).items():
        present = [r for c in classes if (r := recall[c]) is not None]
        recalls[f"recall_{name}"] = float(np.mean(present)) if present else None
    return recalls


def calibration_error(confidence: Floats, is_correct: NDArray[np.bool_]) -> float:
    """Compute the expected calibration error: the mean over the rows of |accuracy - confidence| of the row's bin.

    Args:
        confidence: float64 [N], the probability of the predicted class.
        is_correct: bool [N].
    """
    gap = np.bincount(assign_bins(confidence), is_correct - confidence, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(is_correct))


def assign_bins(confidence: Floats) -> NDArray[np.int64]:
    """Return the bin of each confidence, 0 … ECE_BINS - 1, of equal width; an edge belongs to the bin below it."""
    return np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def mean_nll(log_p: Floats, labels: Labels) -> float:
    """Compute the mean negative log-likelihood in nats. log_p: [N, K]; labels: [N], none hidden."""
    return 0.0 - float(log_p[np.arange(len(labels)), labels].mean())


def log_softmax(z: NDArray[np.floating]) -> Floats:
    """Compute log softmax over the last axis, in float64."""
    return np.asarray(torch.log_softmax(torch.from_numpy(np.asarray(z, np.float64)), -1))


def mean_and_spread(results: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the mean and the standard deviation of every number of several results.

    Args:
        results: Nested dicts of the same keys, one of each seed. Of a list, each place is averaged; a place is None
            where one of the results has None there, and so is a number. Text is taken from the first.

    Returns:
        Two dicts of the same form: means, and standard deviations with n - 1 in the denominator, 0 for one result.
    """
    mean: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for key, first in results[0].items():
        values = [r[key] for r in results]
        if isinstance(first, dict):
            mean[key], spread[key] = mean_and_spread(values)
        elif isinstance(first, list):
            places = np.array(values, float)
            mean[key], spread[key] = _to_list(places.mean(0)), _to_list(_standard_deviation(places))
        elif isinstance(first, str):
            mean[key] = spread[key] = first
        elif any(value is None for value in values):
            mean[key] = spread[key] = None
        else:
            mean[key], spread[key] = float(np.mean(values)), float(_standard_deviation(np.array(values, float)))
    return mean, spread


def _to_list(places: Floats) -> list[Any]:
    """Return a list with None for NaN: NumPy turns None into NaN."""
    listed = places.astype(object)
    listed[np.isnan(places)] = None
    return list(listed.tolist())


def _standard_deviation(values: Floats) -> Floats:
    return np.asarray(np.std(values, axis=0, ddof=1) if len(values) > 1 else 0 * values[0])
