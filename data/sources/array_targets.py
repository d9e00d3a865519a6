"""The hard targets in arrays `y`: the class of each row, several labels of each row, or numbers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES, LABELS, NUMBERS, HardTargets

from .array_files import StoredArray
from .array_labels import check_names, encode_labels, read_class_names, to_labels

_MAX_OUTPUTS = 1 << 20
Values = dict[str, tuple[str, NDArray[Any]]]  # {split: (name of the array, its values)}


def read_targets(
    arrays: dict[str, StoredArray], names: StoredArray | None, task: str
) -> tuple[tuple[str, ...], dict[str, HardTargets]]:
    """Read hard targets.

    Args:
        arrays: {split: the array y}.
        names: The names of the classes, labels or numbers; None where they have none.
        task: Which form they have, see data/tasks.py; "" to find it: numbers where a value is no whole number, several
            labels where y has several columns of 0, 1 and -1, else the class of each row.

    Returns:
        The names, "0" to "K-1" where there are none, and {split: hard targets}. Of classes there are no names where no
        row has a label.

    Raises:
        UsageError: They have no such form, or it is not clear which one.
    """
    values: Values = {split: (array.name, array.read()) for split, array in arrays.items()}
    task = task or _find_task(values)
    if task == CLASSES:
        labels = {split: to_labels(name, y) for split, (name, y) in values.items()}
        return encode_labels(labels, read_class_names(names))
    if not values:
        raise UsageError(
            f"--task {task} needs an array y, and there is none: save one, with {_describe_unknown(task)} where a"
            " value is unknown"
        )
    columns = {split: (name, _to_columns(name, y)) for split, (name, y) in values.items()}
    widths = {name: y.shape[1] for name, y in columns.values()}
    width = next(iter(widths.values()))
    if other := next((name for name in widths if widths[name] != width), ""):
        first = next(iter(widths))
        raise UsageError(f"'{first}' has {width} columns, and '{other}' has {widths[other]}: all splits have as many")
    convert = _to_several_labels if task == LABELS else _to_numbers
    targets = {split: convert(name, y) for split, (name, y) in columns.items()}
    return _name_outputs(names, width, task), targets


def make_unknown(rows: int, targets: dict[str, HardTargets]) -> HardTargets:
    """Make the hard targets of a split without any, in the form of those of the others."""
    example = next(iter(targets.values()), np.zeros(0, np.int64))
    return np.full((rows, *example.shape[1:]), np.nan if example.dtype.kind == "f" else -1, example.dtype)


def _describe_unknown(task: str) -> str:
    return "-1" if task == LABELS else "NaN"


def _find_task(values: Values) -> str:
    """Find the form of hard targets.

    Raises:
        UsageError: They may be the classes of rows, one-hot, or several labels; or are integers in several columns.
    """
    arrays = [(name, y) for name, y in values.values() if y.dtype.kind in "biuf"]
    wide = [(name, y) for name, y in arrays if y.ndim == 2 and y.shape[1] > 1]
    if not wide:
        return NUMBERS if any(not _are_whole(y) for _, y in arrays) else CLASSES
    name = wide[0][0]
    if not all(_are_labels(y) for _, y in wide):
        if all(y.dtype.kind == "f" for _, y in wide):
            return NUMBERS
        raise UsageError(
            f"'{name}' has {wide[0][1].shape[1]} columns of integers: say --task {NUMBERS} where they are numbers to"
            f" predict; several labels are 0, 1, and -1 where unknown; of one class save {name}.argmax(1)"
        )
    if all((y == 1).sum(1).max(initial=0) <= 1 and _has_one_each(y) for _, y in wide):
        raise UsageError(
            f"'{name}' has exactly one 1 in each row: save {name}.argmax(1) where that is the class of the row, or say"
            f" --task {LABELS} where rows may have several labels"
        )
    return LABELS


def _are_whole(y: NDArray[Any]) -> bool:
    if y.dtype.kind != "f":
        return True
    known = y[~np.isnan(y)]
    return bool(np.isinf(known).any() or (known == np.rint(known)).all())  # infinite values are refused as labels


def _are_labels(y: NDArray[Any]) -> bool:
    known = y[~np.isnan(y)] if y.dtype.kind == "f" else y
    return bool(np.isin(known, (-1, 0, 1)).all())


def _has_one_each(y: NDArray[Any]) -> bool:
    return bool(((y == 1).sum(1) == 1).all() and ((y == 0).sum(1) == y.shape[1] - 1).all())


def _to_columns(name: str, y: NDArray[Any]) -> NDArray[Any]:
    """Return values [N] or [N, D] as [N, D]."""
    if y.dtype.kind not in "biuf":
        raise UsageError(f"'{name}' is {y.dtype}: expected numbers, [N] or [N, D]")
    if y.ndim not in (1, 2) or (y.ndim == 2 and not 1 <= y.shape[1] <= _MAX_OUTPUTS):
        raise UsageError(
            f"'{name}' has the shape {list(y.shape)}: expected [N] or [N, D] with D from 1 to {_MAX_OUTPUTS:,}"
        )
    return y[:, None] if y.ndim == 1 else y


def _to_several_labels(name: str, y: NDArray[Any]) -> HardTargets:
    """Return several labels as int8 [N, K] of 0, 1 and -1."""
    known = np.where(np.isnan(y), -1, y) if y.dtype.kind == "f" else y
    is_valid = np.isin(known, (-1, 0, 1))
    if not is_valid.all():
        row, column = np.argwhere(~is_valid)[0].tolist()
        raise UsageError(
            f"'{name}' has {y[row, column]:g} in row {row}, column {column}: several labels are 0, 1, and -1 where"
            f" unknown; numbers to predict are --task {NUMBERS}"
        )
    return known.astype(np.int8)


def _to_numbers(name: str, y: NDArray[Any]) -> HardTargets:
    """Return numbers as float32 [N, D], NaN where unknown."""
    with np.errstate(over="ignore"):
        numbers: NDArray[np.float32] = y.astype(np.float32)
    if np.isinf(numbers).any():
        row, column = np.argwhere(np.isinf(numbers))[0].tolist()
        raise UsageError(f"'{name}' has {y[row, column]:g} in row {row}, column {column}, which is no finite float32")
    return numbers


def _name_outputs(array: StoredArray | None, width: int, task: str) -> tuple[str, ...]:
    names = read_class_names(array)
    if names and len(names) != width:
        raise UsageError(f"'classes' has {len(names)} names, and y has {width} columns of {task}: one for each")
    names = names or tuple(map(str, range(width)))
    check_names(names, "classes")
    return names
