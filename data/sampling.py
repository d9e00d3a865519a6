"""Rows drawn by class: stratified subsets, and epochs in which rare classes come more often.

The draws are our own few lines because rows are part of a cache's identity: those of scikit-learn may change from
release to release, and its stratified draw refuses a class with a single row.
"""

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng

from .tasks import HardTargets, find_known, find_strata

SAMPLERS = {"balanced": 0.0, "sqrt": 0.5}  # the `power` of resample_rows


def draw_stratified(labels: NDArray[np.int64], n: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Draw rows without replacement so that each class keeps its share to within one row.

    Args:
        labels: int64 [N]; rows without a label, -1, count as one class.
        n: Number of rows to draw, 0 to N.
        key: The key of the random numbers, see softcache.base.rng. The same key always gives the same rows.

    Returns:
        int64 [n], in ascending order.
    """
    classes, class_of_row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota = apportion(counts * (n / len(labels)), n)
    order = rng.permutation(key, len(labels))
    rows_by_class = [order[class_of_row[order] == c][: quota[c]] for c in range(len(classes))]
    return np.sort(np.concatenate(rows_by_class))


def draw_labelled_rows(labels: HardTargets, n: int, seed: int) -> NDArray[np.int64]:
    """Draw the rows that keep their hard targets where only some do, by class.

    Args:
        labels: Hard targets of N rows, see tasks.py.
        n: Number of rows to draw, up to those whose hard targets are known.
        seed: On which depends which rows are drawn, not how many of a class.

    Returns:
        int64 [n], in ascending order.
    """
    known = np.flatnonzero(find_known(labels))
    return known[draw_stratified(find_strata(labels)[known], n, key=(seed, 50))]


def resample_rows(labels: NDArray[np.int64], power: float, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Draw the rows of one epoch, each class in proportion to a power of its number of rows.

    Within a class, every row comes once before one comes again, and which rows come once more differs from key to
    key: less noise than drawing each row independently.

    Args:
        labels: int64 [N].
        power: 0: every class equally often; 1: classes as they are.
        key: The key of the random numbers, see softcache.base.rng.

    Returns:
        int64 [N], rows with repetitions, grouped by class and in random order within a class.
    """
    classes, class_of_row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    share = counts**power
    quota = apportion(len(labels) * share / share.sum(), len(labels))
    order = rng.permutation(key, len(labels))
    return np.concatenate([np.resize(order[class_of_row[order] == c], quota[c]) for c in range(len(classes))])


def apportion(share: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """Round shares, float [K] with sum n, to whole numbers with sum n, int64 [K], each within one of its share."""
    quota: NDArray[np.int64] = np.floor(share).astype(np.int64)
    largest_remainders = np.argsort(-(share - quota), kind="stable")
    quota[largest_remainders[: n - quota.sum()]] += 1
    return quota
