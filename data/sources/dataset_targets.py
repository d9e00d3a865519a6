"""The hard targets of a user's own dataset: the labels of its items, of which all rows have one form."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError, make_printable
from softcache.data.images.dataset_items import Label, describe_row, describe_value, label_to_array
from softcache.data.tasks import CLASSES, LABELS, NUMBERS, HardTargets

from .array_labels import to_labels
from .target_values import TargetValues, convert_targets, find_task

_MAX_CLASSES = 1 << 20
_LARGEST_INTEGER = (1 << 63) - 1


class TargetCollector:
    """The labels of all rows of a dataset, in the order in which they are added.

    What they are is decided when all are known: see `read_targets`.
    """

    def __init__(self) -> None:
        self._labels: dict[str, list[int | float | NDArray[Any] | None]] = {}
        self._form: type | tuple[int, ...] | None = None  # of a number its type, of an array its shape
        self._first = ""  # describes the first label that is known

    def add(self, split: str, row: int, label: Label) -> None:
        """Add the label of the next row of a split.

        Raises:
            UsageError: It has another form than that of a row before it, or is too large.
        """
        values = label if label is None or isinstance(label, int | float) else label_to_array(label)
        self._labels.setdefault(split, []).append(values)
        if values is None:
            return
        form = values.shape if isinstance(values, np.ndarray) else type(values)
        if self._form is None:
            self._form, self._first = form, f"{describe_row(split, row)} has {describe_value(label)}"
        elif form != self._form:
            raise UsageError(
                f"{describe_row(split, row)} has {describe_value(label)} as its label, and {self._first}: all labels"
                " have one form, and None is a label that is unknown"
            )
        if isinstance(values, int) and abs(values) > _LARGEST_INTEGER:
            raise _make_size_error(split, row, values)

    def read_targets(self, names: tuple[str, ...], task: str) -> tuple[tuple[str, ...], dict[str, HardTargets]]:
        """Return the hard targets of each split.

        Args:
            names: The names of the classes, labels or numbers; () where they have none.
            task: Which form they have, see data/tasks.py; "" to find it. An int is the number of a class, a float is a
                number to predict; arrays and lists are taken as arrays y are, see `target_values.find_task`.

        Returns:
            The names, "0" to "K-1" where there are none, and {split: hard targets}. Of classes there are no names
            where no row has a label.

        Raises:
            UsageError: The labels have no such form, it is not clear which one, or the names do not fit.
        """
        if self._form is None and task in (LABELS, NUMBERS):
            raise UsageError(f"--task {task} needs the label of an item, and no row of the dataset has one")
        task = task or self._find_task()
        if task == CLASSES:
            classes = {split: self._read_classes(split) for split in self._labels}
            return _name_classes(classes, names), dict(classes)
        values = {split: self._describe(split, self._fill_unknown(split)) for split in self._labels}
        targets = convert_targets(values, task)
        if names and len(names) != self._width:
            raise UsageError(
                f"classes has {len(names)} names ({_shorten(names)}), and a label of the dataset has"
                f" {self._width} {task}: one name for each"
            )
        return names or tuple(map(str, range(self._width))), targets

    @property
    def _width(self) -> int:
        """The number of values of a label."""
        return self._form[0] if isinstance(self._form, tuple) else 1

    def _find_task(self) -> str:
        known = {split: [label for label in labels if label is not None] for split, labels in self._labels.items()}
        targets = [self._describe(split, np.array(labels)) for split, labels in known.items() if labels]
        if self._width == 1:
            return NUMBERS if any(part.values.dtype.kind == "f" for part in targets) else CLASSES
        return find_task(targets)

    def _describe(self, split: str, values: NDArray[Any]) -> TargetValues:
        return TargetValues(f"the target of the {split} dataset", "return label.argmax()", values)

    def _fill_unknown(self, split: str) -> NDArray[np.float64]:
        """Return the labels of a split as float64 [N, D], NaN in rows without one."""
        values = np.full((len(self._labels[split]), self._width), np.nan)
        for row, label in enumerate(self._labels[split]):
            if label is not None:
                values[row] = label
        return values

    def _read_classes(self, split: str) -> NDArray[np.int64]:
        """Return the class of each row of a split, -1 where it is unknown."""
        if self._form not in (int, None):
            if self._width > 1:
                raise UsageError(f"--task {CLASSES} needs the number of a class as label, and {self._first}")
            return np.asarray(to_labels(f"the target of the {split} dataset", self._fill_unknown(split)).values)
        labels = np.array([-1 if label is None else label for label in self._labels[split]], np.int64)
        if labels.max() >= _MAX_CLASSES:
            row = int(np.argmax(labels >= _MAX_CLASSES))
            raise _make_size_error(split, row, int(labels[row]))
        return np.maximum(labels, -1)


def _make_size_error(split: str, row: int, label: int) -> UsageError:
    return UsageError(f"{describe_row(split, row)} has the label {label}: the largest is {_MAX_CLASSES - 1}")


def _name_classes(labels: dict[str, NDArray[np.int64]], names: tuple[str, ...]) -> tuple[str, ...]:
    """Check labels against the names of the classes, and return these: "0" to "K-1" where there are none.

    K is the largest label of the training split + 1, or that of all splits where no training image has a label. There
    are no names where no image has a label.
    """
    largest = int(labels["train"].max())
    if largest < 0:
        largest = max(int(part.max()) for part in labels.values())
    if largest < 0:
        return ()
    names = names or tuple(str(label) for label in range(largest + 1))
    if len(names) < 2:
        raise UsageError(
            "the dataset has one class: at least two are needed. Where labels are unknown, return the image alone, or"
            " None as its label"
        )
    for split, part in labels.items():
        if len(rows := np.flatnonzero(part >= len(names))):
            row = int(rows[0])
            raise UsageError(
                f"{describe_row(split, row)} has the label {part[row]}, but there are {len(names)} classes"
                f" ({_shorten(names)})"
            )
    return names


def _shorten(names: tuple[str, ...]) -> str:
    return make_printable(", ".join(names[:5]) + (", …" if len(names) > 5 else ""), 120)
