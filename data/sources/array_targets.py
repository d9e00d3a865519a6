"""The hard targets in arrays `y`: the class of each row, several labels of each row, or numbers."""

import numpy as np

from softcache.base.errors import UsageError
from softcache.data.tasks import CLASSES, EMBEDDING, LABELS, HardTargets

from .array_files import StoredArray
from .array_labels import check_names, encode_labels, read_class_names, to_labels
from .target_values import TargetValues, are_whole, convert_targets, find_task


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
    values = {
        split: TargetValues(f"'{array.name}'", f"save {array.name}.argmax(1)", array.read())
        for split, array in arrays.items()
    }
    task = task or find_task(values.values())
    if task in (CLASSES, EMBEDDING):
        labels = {split: to_labels(arrays[split].name, part.values) for split, part in values.items()}
        return encode_labels(labels, read_class_names(names))
    if not values:
        unknown = "-1" if task == LABELS else "NaN"
        raise UsageError(
            f"--task {task} needs an array y, and there is none: save one, with {unknown} where a value is unknown"
        )
    targets = convert_targets(values, task)
    return _name_outputs(names, next(iter(targets.values())).shape[1], task), targets


def hold_classes(arrays: dict[str, StoredArray]) -> bool:
    """Return whether arrays y have the form of classes: one name or whole number for each row."""
    values = [array.read() for array in arrays.values()]
    has_columns = any(y.ndim > 1 and y.shape[1] > 1 for y in values)
    return not has_columns and all(y.dtype.kind in "SU" or are_whole(y) for y in values)


def make_unknown(rows: int, targets: dict[str, HardTargets]) -> HardTargets:
    """Make the hard targets of a split without any, in the form of those of the others."""
    example = next(iter(targets.values()), np.zeros(0, np.int64))
    return np.full((rows, *example.shape[1:]), np.nan if example.dtype.kind == "f" else -1, example.dtype)


def _name_outputs(array: StoredArray | None, width: int, task: str) -> tuple[str, ...]:
    names = read_class_names(array)
    if names and len(names) != width:
        raise UsageError(f"'classes' has {len(names)} names, and y has {width} columns of {task}: one for each")
    names = names or tuple(map(str, range(width)))
    check_names(names, "classes")
    return names
