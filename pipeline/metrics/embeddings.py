"""Metrics of embeddings: how near they are to the teacher's, and how well they tell classes apart."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import UsageError
from softcache.base.progress import Progress, no_progress

from .arrays import Array, check_finite, to_numpy
from .distances import cosines
from .embedding_bank import EmbeddingBank
from .neighbours import compute_overlap

Floats = NDArray[np.float64]
_SAMPLE_ROWS = 10_000  # of a split, of which CKA and overlap are computed: 10 s at 1,280 numbers on two cores
_SAMPLE_KEY = 62  # what a random number is for
_CHUNK_ROWS = 4096


def evaluate_embeddings(
    outputs: Array,
    labels: Array,
    teacher_outputs: Array | None = None,
    bank: EmbeddingBank | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compute every metric of an embedding.

    Args:
        outputs: float [N, D].
        labels: int [N], the class of each row, -1 where it is unknown.
        teacher_outputs: float [N, D of the teacher]; None where there is no teacher.
        bank: The same model's embeddings of labelled training rows; None without.
        progress: Shows how far each figure is that takes long.

    Returns:
        {name: value}.

        rows, labelled: Numbers of rows.
        cosine: Mean cosine to the teacher's embedding; None where their widths differ. Absent without a teacher, as
            the next two.
        cka: Linear CKA with the teacher's embedding, 0 … 1, see `compute_cka`; None where one of them is constant.
        overlap: Share of the 10 nearest neighbours within the split that both embeddings have, see `compute_overlap`;
            None for 11 rows or fewer.
        cka_rows, overlap_rows: 10,000, the rows of a seeded sample, only where the split has more.
        knn, probe, centroid_1, centroid_5, bank_rows, probe_rows: See `EmbeddingBank.evaluate`; absent without a bank
            or labels.

    Raises:
        UsageError: An argument has another shape or type, or outputs are not finite.
    """
    z, y = to_numpy("outputs", outputs).astype(np.float64), to_numpy("labels", labels)
    teacher = None if teacher_outputs is None else to_numpy("teacher_outputs", teacher_outputs).astype(np.float64)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise UsageError(f"outputs {list(z.shape)} and labels {list(y.shape)} are not [N, D] and [N]")
    check_finite("student", z, "outputs")
    is_labelled = y >= 0
    result: dict[str, Any] = {"rows": len(y), "labelled": int(is_labelled.sum())}
    if teacher is not None:
        if teacher.ndim != 2 or len(teacher) != len(z):
            raise UsageError(f"outputs {list(z.shape)} and the teacher's {list(teacher.shape)} differ in rows")
        check_finite("teacher", teacher, "outputs")
        result |= _compare_with_teacher(z, teacher, progress)
    if bank is not None and is_labelled.any():
        result |= bank.evaluate(z[is_labelled], y[is_labelled], progress)
    return result


def _compare_with_teacher(z: Floats, teacher: Floats, progress: Progress) -> dict[str, Any]:
    """Compute cosine, cka and overlap, see `evaluate_embeddings`."""
    figures: dict[str, Any] = {"cosine": mean_cosine(z, teacher)}
    is_sampled = len(z) > _SAMPLE_ROWS
    if is_sampled:
        rows = np.sort(rng.permutation((0, _SAMPLE_KEY), len(z))[:_SAMPLE_ROWS])
        z, teacher = z[rows], teacher[rows]
    figures["cka"] = compute_cka(z, teacher)
    figures["overlap"] = compute_overlap(z, teacher, progress)
    if is_sampled:
        figures |= {"cka_rows": len(z), "overlap_rows": len(z)}
    return figures


def mean_cosine(outputs: Floats, teacher: Floats) -> float | None:
    """Compute the mean cosine to the teacher's embedding, of the rows in which that is not 0.

    Args:
        outputs: float64 [N, D].
        teacher: float64 [N, D of the teacher].

    Returns:
        The mean; None where the widths differ, or the teacher's embedding is 0 in all rows.
    """
    if outputs.shape != teacher.shape:
        return None
    has_direction = teacher.any(1)
    return float(cosines(outputs, teacher)[has_direction].mean()) if has_direction.any() else None


def compute_cka(first: Floats, second: Floats) -> float | None:
    """Compute the linear centred kernel alignment of two embeddings of the same rows.

    With both centred, |YᵀX|² / (|XᵀX| |YᵀY|) of Frobenius norms: 1 where one is a rotation of the other times a
    number. The products are of D numbers, not of N rows, so memory does not grow with the square of the rows.

    Args:
        first: X, float64 [N, D].
        second: Y, float64 [N, E].

    Returns:
        0 … 1; None where X or Y is the same in all rows.

    Source:
        Kornblith et al. 2019, "Similarity of neural network representations revisited", arXiv 1905.00414, equation 3
        and section 3.
    """
    x_mean, y_mean = first.mean(0), second.mean(0)
    if (np.ptp(first, 0) == 0).all() or (np.ptp(second, 0) == 0).all():
        return None
    D, E = first.shape[1], second.shape[1]
    xx, yy, yx = np.zeros((D, D)), np.zeros((E, E)), np.zeros((E, D))
    for start in range(0, len(first), _CHUNK_ROWS):
        x, y = first[start : start + _CHUNK_ROWS] - x_mean, second[start : start + _CHUNK_ROWS] - y_mean
        xx += x.T @ x
        yy += y.T @ y
        yx += y.T @ x
    scale = float(np.linalg.norm(xx)) * float(np.linalg.norm(yy))
    return min(float(np.linalg.norm(yx)) ** 2 / scale, 1.0) if scale > 0 else None
