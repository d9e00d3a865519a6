"""Tasks: what the hard targets of a transfer set are, and what a teacher's output means.

    classes    one class an image: int64 [N], -1 where it is unknown; the output is K logits
    labels     several labels an image: int8 [N, K] of 0, 1 and -1 where unknown; the output is a logit of each label
    numbers    D numbers an image: float32 [N, D], NaN where unknown; the output is D numbers
    embedding  hard targets as of classes, for evaluation alone; the output is D numbers without names

The dtype of hard targets says which form they have, so a function that takes them needs no task besides.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError

CLASSES, LABELS, NUMBERS, EMBEDDING = "classes", "labels", "numbers", "embedding"
TASKS = (CLASSES, LABELS, NUMBERS, EMBEDDING)

HardTargets = NDArray[Any]  # int64 [N], int8 [N, K] or float32 [N, D], see above


def find_form(labels: HardTargets) -> str:
    """Return the task whose form hard targets have: "classes", "labels" or "numbers"."""
    if labels.ndim == 1:
        return CLASSES
    return NUMBERS if labels.dtype.kind == "f" else LABELS


def find_known(labels: HardTargets) -> NDArray[np.bool_]:
    """Return which rows have a hard target, bool [N]: of several labels or numbers at least one."""
    known = find_known_entries(labels)
    return known if labels.ndim == 1 else np.asarray(known.any(1))


def find_known_entries(labels: HardTargets) -> NDArray[np.bool_]:
    """Return which hard targets are known, bool, in the shape of the labels."""
    return np.asarray(~np.isnan(labels) if labels.dtype.kind == "f" else labels >= 0)


def hide_rows(labels: HardTargets, is_hidden: NDArray[np.bool_]) -> HardTargets:
    """Return hard targets in which some rows are unknown.

    Args:
        labels: Of N rows.
        is_hidden: bool [N].
    """
    hidden = labels.copy()
    hidden[is_hidden] = np.nan if labels.dtype.kind == "f" else -1
    return hidden


def find_strata(labels: HardTargets) -> NDArray[np.int64]:
    """Return the group of each row for draws that keep the shares of groups, int64 [N].

    The class, and -1 for rows without one. Of several labels or numbers, rows with a hard target are one group.
    """
    if labels.ndim == 1:
        return labels
    return np.where(find_known(labels), 0, -1)


def are_equal(first: HardTargets, second: HardTargets) -> NDArray[np.bool_]:
    """Return which rows of two arrays of hard targets are equal, bool [N]; unknown equals unknown."""
    equal = first == second
    if first.dtype.kind == "f":
        equal = equal | (np.isnan(first) & np.isnan(second))
    return equal if equal.ndim == 1 else np.asarray(equal.all(1))


def have_same_values(first: HardTargets, second: HardTargets) -> bool:
    """Return whether two arrays of hard targets are of one form and equal in all rows."""
    is_same_form = first.shape == second.shape and first.dtype == second.dtype
    return is_same_form and bool(are_equal(first, second).all())


def to_hashed_bytes(labels: HardTargets) -> bytes:
    """Return the bytes of hard targets that are part of a content digest: little-endian, with one form of NaN."""
    if labels.ndim == 1:
        return labels.astype("<i8").tobytes()
    if labels.dtype.kind != "f":
        return labels.astype("|i1").tobytes()
    return np.where(np.isnan(labels), np.float32(np.nan), labels).astype("<f4").tobytes()


def measure_targets(labels: HardTargets) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure mean and standard deviation of each number over the rows in which it is known.

    Args:
        labels: float [N, D], NaN where unknown; of each output one number is known or more.

    Returns:
        Two float64 [D]; a standard deviation of 0 is 1.
    """
    values = labels.astype(np.float64)
    std = np.nanstd(values, 0)
    return np.asarray(np.nanmean(values, 0)), np.where(std > 0, std, 1.0)


def get_task(identity: Mapping[str, Any]) -> str:
    """Return the task of a cache from its identity, which names none where it is "classes"."""
    return str(identity["transfer_set"].get("task", CLASSES))


def require_classes(task: str, what: str) -> None:
    """Check that the task is the one that something is for.

    Args:
        task: The task.
        what: What needs classes, for the message, such as "--imbalance 100".

    Raises:
        UsageError: The task is another one.
    """
    if task != CLASSES:
        raise UsageError(f"{what} is for one class an image, and the task here is {task}: leave it out")
