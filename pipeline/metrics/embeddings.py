"""Metrics of embeddings: how near they are to the teacher's."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError

from .arrays import Array, check_finite, to_numpy

Floats = NDArray[np.float64]


def evaluate_embeddings(outputs: Array, labels: Array, teacher_outputs: Array | None = None) -> dict[str, Any]:
    """Compute what can be said of an embedding without other rows.

    Args:
        outputs: float [N, D].
        labels: int [N], the class of each row, -1 where it is unknown.
        teacher_outputs: float [N, D of the teacher]; None where there is no teacher.

    Returns:
        rows, labelled: Numbers of rows.
        cosine: Mean cosine to the teacher's embedding; None where their widths differ. Absent without a teacher.

    Raises:
        UsageError: An argument has another shape or type, or outputs are not finite.
    """
    z, y = to_numpy("outputs", outputs).astype(np.float64), to_numpy("labels", labels)
    teacher = None if teacher_outputs is None else to_numpy("teacher_outputs", teacher_outputs).astype(np.float64)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise UsageError(f"outputs {list(z.shape)} and labels {list(y.shape)} are not [N, D] and [N]")
    check_finite("student", z, "outputs")
    result: dict[str, Any] = {"rows": len(y), "labelled": int((y >= 0).sum())}
    if teacher is not None:
        check_finite("teacher", teacher, "outputs")
        result["cosine"] = float(cosines(z, teacher).mean()) if z.shape == teacher.shape else None
    return result


def cosines(first: Floats, second: Floats) -> Floats:
    """Compute the cosine of each pair of rows [N, D]; 0 where a row is 0."""
    return np.asarray((normalize_rows(first) * normalize_rows(second)).sum(1))


def normalize_rows(rows: Floats) -> Floats:
    """Divide each row [N, D] by its Euclidean norm; rows of zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0))
