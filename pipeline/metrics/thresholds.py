"""A threshold for each of several labels: the probability above which it is predicted, chosen for F1 on validation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.data.tasks import LABELS, HardTargets

from .labels import count_f1

Floats = NDArray[np.float64]
NO_POSITIVE = 0.5  # the threshold of a label without a positive row
TUNED_FIGURES = ("f1_macro", "f1_micro", "f1_weighted", "f1_samples", "precision_macro", "recall_macro")


def to_probabilities(logits: NDArray[np.floating]) -> Floats:
    """Compute the sigmoid of logits in float64, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits.astype(np.float64))))


def choose_thresholds(logits: NDArray[np.floating], labels: HardTargets) -> Floats:
    """Choose the threshold of each label that maximises its F1; a label is predicted where p > threshold.

    A threshold lies halfway between two neighbouring probabilities of the rows, the lowest one halfway between 0 and
    the smallest. Of several with the same F1 it is the one nearest to 0.5, of two as near the larger.

    Args:
        logits: float [N, K] of a model on the validation rows.
        labels: int8 [N, K] of 0, 1, and -1 where unknown; rows in which a label is unknown do not count for it.

    Returns:
        float64 [K], 0 < threshold < 1; 0.5 for a label without a positive row.
    """
    probabilities = to_probabilities(logits)
    return np.array([_choose(p[y >= 0], y[y >= 0]) for p, y in zip(probabilities.T, labels.T, strict=True)])


def _choose(probabilities: Floats, labels: HardTargets) -> float:
    if not (labels == 1).any():
        return NO_POSITIVE
    order = np.argsort(-probabilities, kind="stable")
    p, hits = probabilities[order], np.cumsum(labels[order] == 1)
    is_last = np.append(p[1:] != p[:-1], True)  # equal probabilities are predicted together
    upper, claims = p[is_last], np.flatnonzero(is_last) + 1
    lower = np.append(upper[1:], 0.0)
    middle = (lower + upper) / 2
    thresholds = np.where(middle < upper, middle, lower)  # of two neighbouring floats the middle is one of them
    f1 = 2 * hits[is_last] / (claims + hits[-1])
    f1[upper == 0] = 0  # no threshold predicts a probability that has been rounded to 0
    thresholds[upper == 0] = NO_POSITIVE
    best = thresholds[f1 == f1.max()]
    return float(best[np.argmin(np.abs(best - NO_POSITIVE))])


def evaluate_at_thresholds(
    logits: NDArray[np.floating], labels: HardTargets, thresholds: Floats
) -> dict[str, float] | None:
    """Compute precision, recall and the averages of F1 at a threshold of each label.

    Args:
        logits: float [N, K].
        labels: int8 [N, K] of 0, 1, and -1 where unknown.
        thresholds: float64 [K].

    Returns:
        {name: value} of TUNED_FIGURES, as of `labels.evaluate_labels`; None where no label has a positive row.
    """
    counts = count_f1(labels, to_probabilities(logits) > thresholds)
    if counts["f1_macro"] is None:
        return None
    return {name: counts[name] for name in TUNED_FIGURES}


def add_thresholds(
    task: str,
    figures: dict[str, Any],
    outputs: Mapping[str, NDArray[np.floating]],
    labels: Mapping[str, HardTargets],
) -> dict[str, Any]:
    """Add thresholds that are chosen on `val`, and the figures of each split at them, for the task "labels".

    Those of `val` itself are of the rows on which the thresholds were chosen.

    Args:
        task: See data/tasks.py; of another one the figures are returned as they are.
        figures: {split: figures}, and other keys.
        outputs: {split: logits float [N, K]}.
        labels: {split: hard targets}.

    Returns:
        The figures with `thresholds`, a list of K probabilities, and in each split `at_thresholds`; without them where
        no row of `val` has a label.
    """
    if task != LABELS or "val" not in outputs or not (labels["val"] >= 0).any():
        return figures
    thresholds = choose_thresholds(outputs["val"], labels["val"])
    tuned = {split: evaluate_at_thresholds(z, labels[split], thresholds) for split, z in outputs.items()}
    with_tuned = {split: figures[split] | {"at_thresholds": values} for split, values in tuned.items() if values}
    return figures | with_tuned | {"thresholds": thresholds.tolist()}
