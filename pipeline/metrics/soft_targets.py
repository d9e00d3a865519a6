"""What a teacher's logits say as targets: calibration, which classes look alike, what a temperature shows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from softcache.data.transfer_set import Labels

from .classification import ECE_BINS, assign_bins, calibration_error, log_softmax, mean_nll

TEMPERATURES = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20)
Floats = NDArray[np.float64]


def calibration(logits: NDArray[np.floating], labels: Labels) -> dict[str, Any]:
    """Figures of the rows with a label, of which there is one at least. logits [N, K]; labels [N], -1 for none.

    accuracy, mean confidence, ece (Guo et al. 2017), nll in nats; bins: of equal width, from low to high, each with
    its rows, accuracy and mean confidence; class_accuracy [K]. What is of no row is None.
    """
    known = labels >= 0
    log_p, labels = log_softmax(logits[known]), labels[known]
    confidence, right = np.exp(log_p.max(1)), log_p.argmax(1) == labels
    bin_of = assign_bins(confidence)
    edges = np.linspace(0, 1, ECE_BINS + 1)
    return {
        "rows": len(labels),
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "ece": calibration_error(confidence, right),
        "nll": mean_nll(log_p, labels),
        "bins": [
            {
                "low": float(edges[b]),
                "high": float(edges[b + 1]),
                "rows": int((bin_of == b).sum()),
                "accuracy": _mean(right[bin_of == b]),
                "confidence": _mean(confidence[bin_of == b]),
            }
            for b in range(ECE_BINS)
        ],
        "class_accuracy": [_mean(right[labels == c]) for c in range(logits.shape[1])],
    }


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def similarity(logits: NDArray[np.floating], labels: Labels, temperature: float) -> Floats:
    """[K, K]: the mean probability of class j at a temperature over the rows of true class i.

    logits [N, K]; labels [N], -1 for none. The row of a class that does not occur is NaN.
    """
    p = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    K = p.shape[1]
    found = np.full((K, K), np.nan)
    for c in np.unique(labels[labels >= 0]):
        found[c] = p[labels == c].mean(0)
    return found


def most_confused(matrix: Floats, most: int) -> list[tuple[int, int, float]]:
    """The pairs (true class, other class, mean probability) off the diagonal, the largest first."""
    off = np.where(np.eye(len(matrix), dtype=bool) | np.isnan(matrix), -1.0, matrix)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, off.shape), strict=True)]
    return [(i, j, float(off[i, j])) for i, j in pairs if off[i, j] >= 0]


def soft_target_statistics(logits: NDArray[np.floating], target: Labels, temperature: float) -> dict[str, Any]:
    """The soft targets of a temperature. logits [N, K]; target [N], the class of each row.

    entropy: mean over the rows, in nats; share: of log K, None for one class; others: mean total probability of the
    classes beside the target; information: see `information`, in nats.
    """
    K, rows = logits.shape[1], np.arange(len(logits))
    p = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    entropy = max(0.0, -float(xlogy(p, p).sum(1).mean()))
    beside = p.copy()
    beside[rows, target] = 0
    return {
        "temperature": temperature,
        "entropy": entropy,
        "share": entropy / float(np.log(K)) if K > 1 else None,
        "others": float(beside.sum(1).mean()),
        "information": mutual_information(p),
    }


def mutual_information(p: Floats) -> float:
    """What the probabilities beside the teacher's first class say about a row that this class does not, in nats.

    p [N, K]: soft targets. Without its first class, a row n has the mass m_n and the distribution q_n over the others.
    It is the mean over the first classes c, by their rows, of

        m_c (H(q_c) - sum over the rows n of class c of m_n / (N_c m_c) H(q_n)),

    m_c the mean mass and q_c the mean of q_n by mass: the mutual information between the row and a label drawn from
    its soft target, given the first class, of the labels beside it. A sharp target has no mass there, a flat one no
    difference between rows: both are 0. (Of q_n alone it would fall with temperature from 0 on: the runner-up is
    sharpest where it weighs nothing. And of the true class in place of the first, rows that the teacher gets wrong
    would make the sharpest targets say most.)
    """
    first, others = p.argmax(1), p.copy()
    others[np.arange(len(p)), first] = 0
    total = 0.0
    for c in np.unique(first):
        rows = others[first == c]
        mass, summed = rows.sum(1), rows.sum(0)
        of_mean = xlogy(mass.sum(), mass.sum()) - xlogy(summed, summed).sum()  # sum(m) H(mean of q by mass)
        of_rows = xlogy(mass, mass).sum() - xlogy(rows, rows).sum()  # sum of m H(q)
        total += float(of_mean - of_rows)
    return max(0.0, total / len(others))
