"""The form of hard targets in arrays, of any source: several labels, numbers, or the class of each row."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES, LABELS, NUMBERS, HardTargets

MAX_OUTPUTS = 1 << 20


class TargetValues(NamedTuple):
    """The hard targets of one split, as their source has them.

    Attributes:
        name: What has them, for messages, such as "'y_train'".
        advice: How they become the class of each row, for messages, such as "save y_train.argmax(1)".
        values: [N] or [N, D].
    """

    name: str
    advice: str
    values: NDArray[Any]


def find_task(targets: Iterable[TargetValues]) -> str:
    """Find the form of hard targets.

    Args:
        targets: Those of all splits.

    Returns:
        "numbers" where a value is no whole number, "labels" where there are several columns of 0, 1 and -1, else
        "classes".

    Raises:
        UsageError: They may be the classes of rows, one-hot, or several labels; or are integers in several columns.
    """
    arrays = [part for part in targets if part.values.dtype.kind in "biuf"]
    wide = [part for part in arrays if part.values.ndim == 2 and part.values.shape[1] > 1]
    if not wide:
        return NUMBERS if any(not are_whole(part.values) for part in arrays) else CLASSES
    name, advice, values = wide[0]
    if not all(_are_labels(part.values) for part in wide):
        if all(part.values.dtype.kind == "f" for part in wide):
            return NUMBERS
        raise UsageError(
            f"{name} has {values.shape[1]} columns of integers: say --task {NUMBERS} where they are numbers to"
            f" predict; several labels are 0, 1, and -1 where unknown; of one class {advice}"
        )
    if all((part.values == 1).sum(1).max(initial=0) <= 1 and _has_one_each(part.values) for part in wide):
        raise UsageError(
            f"{name} has exactly one 1 in each row: {advice} where that is the class of the row, or say"
            f" --task {LABELS} where rows may have several labels"
        )
    return LABELS


def convert_targets(targets: Mapping[str, TargetValues], task: str) -> dict[str, HardTargets]:
    """Convert hard targets into those of a task.

    Args:
        targets: {split: its hard targets}.
        task: "labels" or "numbers".

    Returns:
        {split: int8 [N, K] or float32 [N, D]}, see data/tasks.py.

    Raises:
        UsageError: A value is not of this form, or the splits have other numbers of columns.
    """
    columns = {split: _to_columns(part.name, part.values) for split, part in targets.items()}
    names = {split: part.name for split, part in targets.items()}
    first = next(iter(columns))
    for split, values in columns.items():
        if values.shape[1] != columns[first].shape[1]:
            raise UsageError(
                f"{names[first]} has {columns[first].shape[1]} columns, and {names[split]} has {values.shape[1]}: all"
                " splits have as many"
            )
    convert = _to_several_labels if task == LABELS else _to_numbers
    return {split: convert(names[split], values) for split, values in columns.items()}


def are_whole(values: NDArray[Any]) -> bool:
    """Return whether all known values are whole numbers; infinite ones count as such, and are refused elsewhere."""
    if values.dtype.kind != "f":
        return True
    known = values[~np.isnan(values)]
    return bool(np.isinf(known).any() or (known == np.rint(known)).all())


def _are_labels(values: NDArray[Any]) -> bool:
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return bool(np.isin(known, (-1, 0, 1)).all())


def _has_one_each(values: NDArray[Any]) -> bool:
    return bool(((values == 1).sum(1) == 1).all() and ((values == 0).sum(1) == values.shape[1] - 1).all())


def _to_columns(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return values [N] or [N, D] as [N, D]."""
    if values.dtype.kind not in "biuf":
        raise UsageError(f"{name} is {values.dtype}: expected numbers, [N] or [N, D]")
    if values.ndim not in (1, 2) or (values.ndim == 2 and not 1 <= values.shape[1] <= MAX_OUTPUTS):
        raise UsageError(
            f"{name} has the shape {list(values.shape)}: expected [N] or [N, D] with D from 1 to {MAX_OUTPUTS:,}"
        )
    return values[:, None] if values.ndim == 1 else values


def _to_several_labels(name: str, values: NDArray[Any]) -> HardTargets:
    """Return several labels as int8 [N, K] of 0, 1 and -1."""
    known = np.where(np.isnan(values), -1, values) if values.dtype.kind == "f" else values
    is_valid = np.isin(known, (-1, 0, 1))
    if not is_valid.all():
        row, column = np.argwhere(~is_valid)[0].tolist()
        raise UsageError(
            f"{name} has {values[row, column]:g} in row {row}, column {column}: several labels are 0, 1, and -1 where"
            f" unknown; numbers to predict are --task {NUMBERS}"
        )
    return known.astype(np.int8)


def _to_numbers(name: str, values: NDArray[Any]) -> HardTargets:
    """Return numbers as float32 [N, D], NaN where unknown."""
    with np.errstate(over="ignore"):
        numbers: NDArray[np.float32] = values.astype(np.float32)
    if np.isinf(numbers).any():
        row, column = np.argwhere(np.isinf(numbers))[0].tolist()
        raise UsageError(
            f"{name} has {values[row, column]:g} in row {row}, column {column}, which is no finite float32"
        )
    return numbers
