"""The class of each row of an array `y`: the number of a class, or its name."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError, make_printable

from .array_files import StoredArray

_MAX_CLASSES = 1 << 20


class ArrayLabels(NamedTuple):
    """The labels of one array.

    Attributes:
        name: Of the array.
        values: int64 [N], -1 where unknown; or str [N], "" where unknown.
    """

    name: str
    values: NDArray[Any]

    @property
    def is_text(self) -> bool:
        return self.values.dtype.kind == "U"


def to_labels(name: str, values: NDArray[Any]) -> ArrayLabels:
    """Return the classes of rows as int64, -1 where unknown, or as text.

    Args:
        name: Of the array.
        values: Its values.

    Raises:
        UsageError: They are no classes, one for each row.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        hint = f": save {name}.argmax(1), the number of the class of each row" if values.ndim == 2 else ""
        raise UsageError(f"'{name}' has the shape {list(values.shape)}: expected one label for each row, [N]{hint}")
    if values.dtype.kind in "SU":
        return ArrayLabels(name, np.char.strip(to_text(values, name)))
    if values.dtype.kind not in "biuf":
        raise UsageError(f"'{name}' is {values.dtype}: expected the numbers or the names of the classes")
    if values.dtype.kind == "f":
        is_known = ~np.isnan(values)
        whole = np.where(is_known, values, -1)
        if (bad := np.flatnonzero(whole != np.rint(whole))).size or np.isinf(whole).any():
            row = int(bad[0]) if bad.size else int(np.flatnonzero(np.isinf(whole))[0])
            raise UsageError(
                f"'{name}' has the value {values[row]:g} in row {row}: expected the number of a class, 0 to K - 1;"
                " numbers to predict are --task numbers"
            )
        values = whole
    if (smallest := values.min(initial=0)) < -1:
        row = int(np.argmin(values))
        raise UsageError(
            f"'{name}' has the label {smallest:g} in row {row}: expected a number from 0, or -1 where it is unknown"
        )
    if (largest := values.max(initial=0)) >= _MAX_CLASSES:
        raise UsageError(f"'{name}' has the label {largest:g}: the largest is {_MAX_CLASSES - 1:,}")
    return ArrayLabels(name, values.astype(np.int64))


def to_text(values: NDArray[Any], name: str) -> NDArray[np.str_]:
    """Return text as str; raise UsageError for bytes that are no UTF-8."""
    if values.dtype.kind == "U":
        return values
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"'{name}' has text that is no UTF-8 ({make_printable(error)}): save it as str") from None


def read_class_names(array: StoredArray | None) -> tuple[str, ...]:
    """Read the names of the classes; none where there is no such array."""
    if array is None:
        return ()
    values = array.read()
    if values.ndim != 1 or values.dtype.kind not in "SU":
        raise UsageError(
            f"'classes' is {values.dtype} {list(values.shape)}: expected the names of the classes, str [K]"
        )
    names = tuple(to_text(values, "classes").tolist())
    check_names(names, "classes")
    if len(set(names)) < len(names):
        repeated = next(name for number, name in enumerate(names) if name in names[:number])
        raise UsageError(f"'classes' has the name {make_printable(repr(repeated))} more than once")
    return names


def encode_labels(
    labels: dict[str, ArrayLabels], classes: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int64]]]:
    """Return the names of the classes, and the number of the class of each row, {split: int64 [N]}."""
    if not labels:
        return (), {}
    if len({part.is_text for part in labels.values()}) > 1:
        raise UsageError("some labels are text and others are numbers: " + ", ".join(p.name for p in labels.values()))
    if all(part.is_text for part in labels.values()):
        names = classes or tuple(np.unique(np.concatenate([part.values for part in labels.values()])).tolist())
        names = names if classes else tuple(name for name in names if name)
        check_names(names, next(iter(labels.values())).name)
        numbers = {name: number for number, name in enumerate(names)} | {"": -1}
        if unknown := [(p.name, v) for p in labels.values() for v in np.unique(p.values).tolist() if v not in numbers]:
            raise UsageError(f"'{unknown[0][0]}' has the label {unknown[0][1]!r}, which 'classes' does not have")
        codes = {s: np.array([numbers[v] for v in p.values.tolist()], np.int64) for s, p in labels.items()}
    else:
        codes = {split: part.values for split, part in labels.items()}
        names = _name_numbers(labels, classes)
    largest = max(int(part.max(initial=-1)) for part in codes.values())
    if largest < 0:
        return (), codes
    if len(names) < 2:
        raise UsageError(f"all labels are of one class ({names[0]}): at least two are needed")
    return names, codes


def _name_numbers(labels: dict[str, ArrayLabels], classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of classes that are numbers: "0" to "K-1" where there are none."""
    largest = max(labels.values(), key=lambda part: int(part.values.max(initial=-1)))
    count = int(largest.values.max(initial=-1)) + 1
    if classes and count > len(classes):
        raise UsageError(f"'{largest.name}' has the label {count - 1}, but 'classes' has {len(classes)} names")
    known = [part.values[part.values >= 0] for part in labels.values()]
    smallest = min((int(part.min()) for part in known if part.size), default=0)
    if not classes and smallest > 0:
        raise UsageError(
            f"the labels of '{largest.name}' are {smallest} to {count - 1}: they begin at 0; save"
            f" {largest.name} - {smallest}, or labels as text; numbers to predict are --task numbers"
        )
    return classes or tuple(map(str, range(count)))


def check_names(names: tuple[str, ...], owner: str) -> None:
    """Raise UsageError for too many names, or one that is empty or cannot be printed. owner: of which array."""
    for name in names:
        if not (name and name.isprintable()):
            raise UsageError(f"'{owner}' has the class name {name!a}, which is empty or cannot be printed: rename it")
    if len(names) > _MAX_CLASSES:
        raise UsageError(f"'{owner}' has {len(names):,} classes: up to {_MAX_CLASSES:,} are possible")
