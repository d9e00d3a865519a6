"""Nearest neighbours of embeddings by cosine, with bounded memory and a fixed order of equally near rows."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from softcache.base.progress import Progress, no_progress

from .distances import normalize_rows

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
OVERLAP_NEIGHBOURS = 10
_CHUNK_ENTRIES = 1 << 23  # of the matrix of cosines that is computed at once: 64 MiB in float64
_DIGITS = 12  # to which cosines are compared: the last bits of equal rows differ with their place in a matrix product
_SPARE = 16  # candidates beyond the k nearest, among which rows at the same distance are put in order


def iterate_cosines(
    queries: Floats, directions: Floats, progress: Progress = no_progress, description: str = ""
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the cosines of some queries at a time with all rows.

    Args:
        queries: float64 [N, D] of norm 1.
        directions: float64 [M, D] of norm 1.
        progress: Shows how many parts are done.
        description: Of the work, for progress.

    Yields:
        Which queries, a slice of n; and their cosines, float64 [n, M].
    """
    size = max(1, _CHUNK_ENTRIES // len(directions))
    transposed = torch.from_numpy(directions).T
    starts = range(0, len(queries), size)
    for start in progress(starts, len(starts), description):
        part = slice(start, min(start + size, len(queries)))
        yield part, torch.from_numpy(queries[part]) @ transposed


def find_nearest(cosines: torch.Tensor, k: int) -> tuple[Floats, Rows]:
    """Find the columns of the k largest cosines of each row, the nearest first; of equal ones the first columns.

    Args:
        cosines: float64 [n, M].
        k: 1 … M.

    Returns:
        The cosines, float64 [n, k], rounded to 12 digits, and the columns, int64 [n, k].
    """
    width = min(k + _SPARE, cosines.shape[1])
    values, columns = (tensor.numpy() for tensor in cosines.topk(width))
    values = np.round(values, _DIGITS)
    order = np.lexsort((columns, -values))[:, :k]
    nearest, nearest_columns = np.take_along_axis(values, order, 1), np.take_along_axis(columns, order, 1)
    if width < cosines.shape[1]:
        for row in np.flatnonzero(values.min(1) == nearest[:, -1]):  # more equal cosines than candidates
            all_values = np.round(cosines[row].numpy(), _DIGITS)
            nearest_columns[row] = np.argsort(-all_values, kind="stable")[:k]
            nearest[row] = all_values[nearest_columns[row]]
    return nearest, nearest_columns


def compute_overlap(first: Floats, second: Floats, progress: Progress = no_progress) -> float | None:
    """Compute the mean share of a row's 10 nearest neighbours by cosine that two embeddings have in common.

    Neighbours are rows of the same embedding, without the row itself.

    Args:
        first, second: float64 [N, D] and [N, E], of the same N rows.
        progress: Shows how many rows are done.

    Returns:
        0 … 1; None where there are no more than 11 rows, of which each has all others as its neighbours.
    """
    k, rows = OVERLAP_NEIGHBOURS, len(first)
    if rows <= k + 1:
        return None
    directions = [normalize_rows(first), normalize_rows(second)]
    parts = zip(
        iterate_cosines(directions[0], directions[0], progress, "neighbours in both embeddings"),
        iterate_cosines(directions[1], directions[1]),
        strict=True,
    )
    common = 0
    for (part, first_cosines), (_, second_cosines) in parts:
        columns = []
        for cosines in (first_cosines, second_cosines):
            cosines[np.arange(len(cosines)), np.arange(part.start, part.stop)] = -np.inf
            columns.append(find_nearest(cosines, k)[1])
        common += int((columns[0][:, :, None] == columns[1][:, None, :]).sum())
    return common / (rows * k)
