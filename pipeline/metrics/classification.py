"""What a result reports about a model's logits on a split."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics as sk

from softcache.data.transfer_set import Labels

Floats = NDArray[np.float64]
ECE_BINS = 15
_MATRIX = 100  # classes up to which a confusion matrix is part of a result: 10,000 numbers


def evaluate(
    logits: NDArray[np.floating],
    labels: Labels,
    teacher: NDArray[np.floating] | None = None,
    counts: Labels | None = None,
) -> dict[str, Any]:
    """Every figure of a split. logits [N, K]; labels [N], -1 where there is none; teacher [N, K] or None; counts [K]:
    training rows of each class.

    accuracy, top5 (None up to 5 classes), nll and brier (per row, in nats and 0 … 2), ece (15 equal bins, Guo et
    al. 2017), precision, recall and F1 (macro over the classes that occur; F1 also weighted by class), auroc_macro
    (one class against the rest, None when a class has no row), per_class (None where it has no row), confusion
    [K][K] (rows of the true class by guessed class; None over 100 classes), recall_head, _medium and _tail (see
    groups_of; None where training rows are about balanced); and, against the teacher, agreement and
    kl_to_teacher (KL(teacher || student) per row at temperature 1, in nats). Without labels only the last two.
    """
    known = labels >= 0
    log_p = log_softmax(logits)
    result: dict[str, Any] = {"rows": len(labels), "labelled": int(known.sum())}
    if teacher is not None:
        log_t = log_softmax(teacher)
        result["agreement"] = float((log_p.argmax(1) == log_t.argmax(1)).mean())
        result["kl_to_teacher"] = float((np.exp(log_t) * (log_t - log_p)).sum(1).mean())
    if known.any():
        result |= _label_metrics(log_p[known], labels[known])
        result |= _recall_by_group(result["per_class"]["recall"], counts)
    return result


def summarize(logits: NDArray[np.floating], labels: Labels) -> dict[str, float]:
    """The figures that are watched during training: accuracy, macro F1 and NLL, nothing without labels."""
    known = labels >= 0
    if not known.any():
        return {}
    labels, guess = labels[known], logits.argmax(1)[known]
    return {
        "accuracy": float((guess == labels).mean()),
        "f1_macro": _f1_macro(labels, guess),
        "nll": mean_nll(log_softmax(logits[known]), labels),
    }


def _f1_macro(labels: Labels, guess: Labels) -> float:
    """As scikit-learn's f1_score over the classes that occur, in 0.03 ms instead of 3: it is asked for in each epoch,
    and one of a small student takes 15."""
    K = int(max(labels.max(), guess.max())) + 1
    rows, guessed, right = (np.bincount(x, minlength=K) for x in (labels, guess, labels[labels == guess]))
    return float((2 * right / np.maximum(rows + guessed, 1))[rows > 0].mean())


def _label_metrics(log_p: Floats, labels: Labels) -> dict[str, Any]:
    p, guess, K = np.exp(log_p), log_p.argmax(1), log_p.shape[1]
    one_hot = np.eye(K)[labels]
    present = np.unique(labels)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, guess, labels=np.arange(K), zero_division=0
    )
    return {
        "accuracy": float(sk.accuracy_score(labels, guess)),
        "top5": float(sk.top_k_accuracy_score(labels, log_p, k=5, labels=np.arange(K))) if K > 5 else None,
        "nll": mean_nll(log_p, labels),
        "brier": float(((p - one_hot) ** 2).sum(1).mean()),
        "ece": calibration_error(p.max(1), guess == labels),
        "precision_macro": float(precision[present].mean()),
        "recall_macro": float(recall[present].mean()),
        "f1_macro": float(f1[present].mean()),
        "f1_weighted": float(sk.f1_score(labels, guess, average="weighted", zero_division=0)),
        "auroc_macro": _auroc(p, one_hot) if len(present) == K > 1 else None,
        "per_class": {
            "precision": _where_present(support, precision),
            "recall": _where_present(support, recall),
            "f1": _where_present(support, f1),
            "support": support.tolist(),
        },
        "confusion": np.bincount(K * labels + guess, minlength=K * K).reshape(K, K).tolist() if K <= _MATRIX else None,
    }


def _where_present(support: Labels, values: Floats) -> list[float | None]:
    """The values of classes that occur; nothing, not 0, is known of the others."""
    return [value if rows else None for rows, value in zip(support.tolist(), values.tolist(), strict=True)]


def group_classes(counts: Labels) -> dict[str, list[int]]:
    """{head, medium, tail: classes}: the third with the most training rows, the rest, the third with the fewest.

    counts [K]; of equals the first comes first. Nothing when the largest class has under twice the smallest's rows.
    """
    if len(counts) < 2 or not counts.any() or counts.max() < 2 * counts.min():
        return {"head": [], "medium": [], "tail": []}
    order, third = np.argsort(-counts, kind="stable").tolist(), max(1, len(counts) // 3)
    return {"head": order[:third], "medium": order[third:-third], "tail": order[-third:]}


def _recall_by_group(recall: list[float | None], counts: Labels | None) -> dict[str, float | None]:
    """Mean recall of the classes of each group that occur; None where there is none."""
    found: dict[str, float | None] = {}
    for name, classes in group_classes(np.zeros(0, np.int64) if counts is None else counts).items():
        some = [r for c in classes if (r := recall[c]) is not None]
        found[f"recall_{name}"] = float(np.mean(some)) if some else None
    return found


def _auroc(p: Floats, one_hot: Floats) -> float:
    return float(sk.roc_auc_score(one_hot, p, average="macro"))


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error: mean over rows of |accuracy - confidence| of the row's bin."""
    gap = np.bincount(assign_bins(confidence), right - confidence, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(right))


def assign_bins(confidence: Floats) -> NDArray[np.int64]:
    """The bin of each confidence, 0 … ECE_BINS - 1, of equal width; an edge belongs to the bin below it."""
    return np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def mean_nll(log_p: Floats, labels: Labels) -> float:
    """In nats. log_p [N, K]; labels [N], all known."""
    return 0.0 - float(log_p[np.arange(len(labels)), labels].mean())


def log_softmax(z: NDArray[np.floating]) -> Floats:
    """Over the last axis, in float64."""
    return np.asarray(torch.log_softmax(torch.from_numpy(np.asarray(z, np.float64)), -1))


def mean_and_spread(results: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and standard deviation (n - 1; 0 for one) of every number in equal nested records; words and None stay.

    A list is taken place by place, None where one of them has None.
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
        elif first is None or isinstance(first, str):
            mean[key] = spread[key] = first
        else:
            mean[key], spread[key] = float(np.mean(values)), float(_standard_deviation(np.array(values, float)))
    return mean, spread


def _to_list(places: Floats) -> list[Any]:
    """As a list, with None for NaN, which is what a None becomes."""
    listed = places.astype(object)
    listed[np.isnan(places)] = None
    return list(listed.tolist())


def _standard_deviation(values: Floats) -> Floats:
    return np.asarray(np.std(values, axis=0, ddof=1) if len(values) > 1 else 0 * values[0])
