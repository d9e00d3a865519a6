"""How far two outputs of a network are apart, row by row or number by number, in float64."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def binary_kl(logits: Floats, others: Floats) -> Floats:
    """Compute KL(sigmoid(logits) || sigmoid(others)) of each number, in nats."""
    p = np.exp(-np.logaddexp(0, -logits))
    positive = np.logaddexp(0, -others) - np.logaddexp(0, -logits)
    negative = np.logaddexp(0, others) - np.logaddexp(0, logits)
    return np.asarray(np.maximum(p * positive + (1 - p) * negative, 0.0))


def cosines(first: Floats, second: Floats) -> Floats:
    """Compute the cosine of each pair of rows [N, D]; 0 where a row is 0."""
    return np.asarray((normalize_rows(first) * normalize_rows(second)).sum(1))


def normalize_rows(rows: Floats) -> Floats:
    """Divide each row [N, D] by its Euclidean norm; rows of zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0))
