"""Statistics of a teacher's logits as soft targets: calibration, similar classes, the effect of a temperature."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from softcache.data.transfer_set import Labels

from .classification import ECE_BINS, assign_bins, calibration_error, log_softmax, mean_nll

TEMPERATURES = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20)
Floats = NDArray[np.float64]


def calibration(logits: NDArray[np.floating], labels: Labels) -> dict[str, Any]:
    """Measure how well the confidence of a teacher matches its accuracy, on the rows that have a label.

    Args:
        logits: float [N, K].
        labels: int64 [N], -1 where there is none; at least one row has a label.

    Returns:
        rows, accuracy, confidence (its mean), ece, nll (in nats); bins: of equal width, from low to high, each with
        rows, accuracy and mean confidence; class_accuracy [K]. A figure of no row is None.

    Source:
        Guo et al. 2017, "On calibration of modern neural networks" (ece).
    """
    is_labelled = labels >= 0
    log_p, labels = log_softmax(logits[is_labelled]), labels[is_labelled]
    confidence, is_correct = np.exp(log_p.max(1)), logits[is_labelled].argmax(1) == labels
    bins = assign_bins(confidence)
    edges = np.linspace(0, 1, ECE_BINS + 1)
    return {
        "rows": len(labels),
        "accuracy": float(is_correct.mean()),
        "confidence": float(confidence.mean()),
        "ece": calibration_error(confidence, is_correct),
        "nll": mean_nll(log_p, labels),
        "bins": [
            {
                "low": float(edges[b]),
                "high": float(edges[b + 1]),
                "rows": int((bins == b).sum()),
                "accuracy": _mean(is_correct[bins == b]),
                "confidence": _mean(confidence[bins == b]),
            }
            for b in range(ECE_BINS)
        ],
        "class_accuracy": [_mean(is_correct[labels == c]) for c in range(logits.shape[1])],
    }


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def similarity(logits: NDArray[np.floating], labels: Labels, temperature: float) -> Floats:
    """Compute how similar the teacher finds each pair of classes.

    Args:
        logits: float [N, K].
        labels: int64 [N], -1 where there is none.
        temperature: > 0.

    Returns:
        float64 [K, K]: the mean probability of class j over the rows of true class i; NaN where i does not occur.
    """
    p = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    K = p.shape[1]
    matrix = np.full((K, K), np.nan)
    for c in np.unique(labels[labels >= 0]):
        matrix[c] = p[labels == c].mean(0)
    return matrix


def most_confused(matrix: Floats, most: int) -> list[tuple[int, int, float]]:
    """Return the largest entries off the diagonal: (true class, other class, mean probability), largest first.

    Args:
        matrix: [K, K], see `similarity`.
        most: Number of pairs.
    """
    off = np.where(np.eye(len(matrix), dtype=bool) | np.isnan(matrix), -1.0, matrix)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, off.shape), strict=True)]
    return [(i, j, float(off[i, j])) for i, j in pairs if off[i, j] >= 0]


def soft_target_statistics(logits: NDArray[np.floating], target: Labels, temperature: float) -> dict[str, Any]:
    """Measure the soft targets at a temperature.

    Args:
        logits: float [N, K].
        target: int64 [N], the class of each row.
        temperature: > 0.

    Returns:
        temperature; entropy: mean over the rows, in nats; share: entropy / log K, None for one class; others: mean
        total probability of the classes other than the target; information: see `mutual_information`, in nats.
    """
    K, rows = logits.shape[1], np.arange(len(logits))
    p = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    entropy = max(0.0, -float(xlogy(p, p).sum(1).mean()))
    others = p.copy()
    others[rows, target] = 0
    return {
        "temperature": temperature,
        "entropy": entropy,
        "share": entropy / float(np.log(K)) if K > 1 else None,
        "others": float(others.sum(1).mean()),
        "information": mutual_information(p),
    }


def mutual_information(p: Floats) -> float:
    """Measure the information about a row in the probabilities of all classes but the predicted one, in nats.

    Without its predicted class, a row n has the mass m_n and the distribution q_n over the other classes. The result
    is the mean over the predicted classes c, weighted by their N_c rows, of

        m_c (H(q_c) - sum over the rows n of class c of m_n / (N_c m_c) H(q_n)),

    where m_c is the mean mass and q_c the mean of q_n weighted by mass. This is the mutual information between the row
    and a label drawn from its soft target, given the predicted class, restricted to the other labels. A sharp target
    has no mass there, and flat ones do not differ between rows: both give 0. (With q_n alone the result would fall
    with temperature from 0 on, because the runner-up is sharpest where it has no mass. With the true class in place
    of the predicted one, wrongly predicted rows would make the sharpest targets the most informative.)

    Args:
        p: float64 [N, K], soft targets.
    """
    first, others = p.argmax(1), p.copy()
    others[np.arange(len(p)), first] = 0
    total = 0.0
    for c in np.unique(first):
        rows = others[first == c]
        mass, summed = rows.sum(1), rows.sum(0)
        entropy_of_mean = xlogy(mass.sum(), mass.sum()) - xlogy(summed, summed).sum()  # sum(m) H(mean of q by mass)
        entropy_of_rows = xlogy(mass, mass).sum() - xlogy(rows, rows).sum()  # sum of m H(q)
        total += float(entropy_of_mean - entropy_of_rows)
    return max(0.0, total / len(others))
