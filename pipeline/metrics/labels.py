"""Metrics of several labels an image: each label is a question of its own, answered by the sign of its logit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.tasks import find_known

from .arrays import Array, check_outputs, mean_of_known, to_numpy
from .classification import compute_auroc
from .distances import binary_kl

Floats = NDArray[np.float64]


def evaluate_labels(outputs: Array, labels: Array, teacher_outputs: Array | None = None) -> dict[str, Any]:
    """Compute every metric of several labels.

    A label is predicted where its logit is above 0. Labels that are not known are left out.

    Args:
        outputs: Logits, float [N, K].
        labels: int [N, K] of 0, 1, and -1 where unknown.
        teacher_outputs: Logits of the teacher, float [N, K]; None where there is no teacher.

    Returns:
        {name: value}. Without labels only rows, labelled, agreement and kl_to_teacher.

        rows, labelled: Numbers of rows, and of those with a known label.
        agreement: Share of the labels of all rows on which the model and the teacher agree.
        kl_to_teacher: Mean over rows and labels of the KL between the two sigmoids at temperature 1, in nats.
        map: Mean average precision, over the labels that have a positive row.
        nll: Mean binary cross entropy of the known labels, in nats.
        f1_macro, precision_macro, recall_macro: Means over the labels that have a positive row.
        f1_micro, f1_weighted, f1_samples: F1 of all pairs of row and label; of each label, weighted by its positive
            rows; of each row with a known label, 0 where neither labels nor predictions are positive.
        auroc_macro: Mean over the labels that have a positive and a negative row; None where there is none.
        per_label: precision, recall, f1, average_precision, auroc and support, each [K]; None where not defined.

    Raises:
        UsageError: An argument has another shape or type, logits are not finite, or a label is not 0, 1 or -1.
    """
    z, y = to_numpy("outputs", outputs).astype(np.float64), to_numpy("labels", labels)
    teacher = None if teacher_outputs is None else to_numpy("teacher_outputs", teacher_outputs).astype(np.float64)
    check_outputs(z, y, teacher)
    if not np.isin(y, (-1, 0, 1)).all():
        raise UsageError("labels have a value that is not 0, 1, or -1 where it is unknown")
    result: dict[str, Any] = {"rows": len(y), "labelled": int(find_known(y).sum())}
    if teacher is not None:
        result["agreement"] = float(((z > 0) == (teacher > 0)).mean())
        result["kl_to_teacher"] = float(binary_kl(teacher, z).mean())
    if result["labelled"]:
        result |= _compute_label_metrics(z, y)
    return result


def summarize_labels(outputs: NDArray[np.floating], labels: NDArray[Any]) -> dict[str, float]:
    """Compute the metrics that are shown during training: map, f1_macro and nll; none without labels.

    Args:
        outputs: Logits, float [N, K].
        labels: int [N, K] of 0, 1, and -1 where unknown.
    """
    if not find_known(labels).any():
        return {}
    z = outputs.astype(np.float64)
    figures = {
        "map": mean_of_known(_average_precisions(z, labels)),
        "f1_macro": count_f1(labels, z > 0)["f1_macro"],
        "nll": _mean_nll(z, labels),
    }
    return {name: value for name, value in figures.items() if value is not None}


def count_f1(y: NDArray[Any], predicted: NDArray[np.bool_]) -> dict[str, Any]:
    """Compute precision, recall and F1 of each label, and the averages of F1, over the known labels.

    Args:
        y: int [N, K] of 0, 1, and -1 where unknown.
        predicted: bool [N, K].

    Returns:
        precision, recall, f1 and support, each [K], None of a label without a positive row; precision_macro,
        recall_macro, f1_macro, f1_micro, f1_weighted and f1_samples, None where no label has a positive row.
    """
    is_known, positive = y >= 0, y == 1
    hits, claims = positive & predicted, predicted & is_known
    support = positive.sum(0)
    precision = hits.sum(0) / np.maximum(claims.sum(0), 1)
    recall = hits.sum(0) / np.maximum(support, 1)
    f1 = 2 * hits.sum(0) / np.maximum(claims.sum(0) + support, 1)
    rows = is_known.any(1)
    f1_rows = 2 * hits.sum(1) / np.maximum(claims.sum(1) + positive.sum(1), 1)
    present = support > 0

    def average(values: Floats) -> float | None:
        return float(values[present].mean()) if present.any() else None

    return {
        "precision": _mask(precision, present),
        "recall": _mask(recall, present),
        "f1": _mask(f1, present),
        "support": support.tolist(),
        "precision_macro": average(precision),
        "recall_macro": average(recall),
        "f1_macro": average(f1),
        "f1_micro": float(2 * hits.sum() / max(claims.sum() + support.sum(), 1)) if present.any() else None,
        "f1_weighted": float((f1 * support).sum() / support.sum()) if present.any() else None,
        "f1_samples": float(f1_rows[rows].mean()) if present.any() else None,
    }


def _mask(values: Floats, present: NDArray[np.bool_]) -> list[float | None]:
    return [float(value) if is_present else None for value, is_present in zip(values, present, strict=True)]


def _compute_label_metrics(z: Floats, y: NDArray[Any]) -> dict[str, Any]:
    is_known = y >= 0
    counts = count_f1(y, z > 0)
    lists = {name: counts.pop(name) for name in ("precision", "recall", "f1", "support")}
    precisions = _average_precisions(z, y)
    areas: list[float | None] = []
    for k in range(y.shape[1]):
        labels, scores = y[is_known[:, k], k], z[is_known[:, k], k]
        is_known_area = (labels == 1).any() and (labels == 0).any()
        areas.append(compute_auroc(scores, labels == 1) if is_known_area else None)
    return {
        "map": mean_of_known(precisions),
        "nll": _mean_nll(z, y),
        **counts,
        "auroc_macro": mean_of_known(areas),
        "per_label": {**lists, "average_precision": precisions, "auroc": areas},
    }


def _average_precisions(z: Floats, y: NDArray[Any]) -> list[float | None]:
    """Compute the average precision of each label [K]; None of one without a positive row."""
    from sklearn.metrics import average_precision_score  # not at the top: classes need none of it, see classification

    is_known = y >= 0
    columns = [(y[is_known[:, k], k], z[is_known[:, k], k]) for k in range(y.shape[1])]
    return [
        float(average_precision_score(labels, scores)) if (labels == 1).any() else None for labels, scores in columns
    ]


def _mean_nll(z: Floats, y: NDArray[Any]) -> float:
    """Compute the mean binary cross entropy of the known labels, in nats."""
    return float(np.logaddexp(0, np.where(y == 1, -z, z))[y >= 0].mean())
