"""The rows of one data file that holds many encoded images, and how a reader of a format collects them."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, make_printable

_MAX_LABEL = (1 << 20) - 1
NO_IMAGE = "rows without an image"  # of a table


@dataclass
class FileRows:
    """The rows of one data file, in their order.

    Attributes:
        offsets, sizes: int64 [n], where the encoded image of each row is.
        digests: uint8 [n, 32], SHA-256 of its bytes.
        labels: int64 [n], -1 where there is none: a number of a class, or an index into `label_texts`.
        label_texts: The labels that are text, each once; empty where labels are numbers.
        classes: The names of the classes that the file itself records; empty where it records none.
        names: The name of each row, for messages; empty where rows have none.
        in_copy: Whether the offsets are those of the copy beside the index, not of the file.
        left_out: {what is left out: how often}.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    digests: NDArray[np.uint8]
    labels: NDArray[np.int64]
    label_texts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    in_copy: bool = False
    left_out: dict[str, int] = field(default_factory=dict)


# Reads a file, and yields how many bytes it has read from time to time; returns its rows.
RowReader = Callable[[Path], Generator[int, None, FileRows]]


class RowCollector:
    """Collects the rows of one file, in their order.

    Args:
        place: The file, for messages.
        classes: The names of the classes that the file records; empty where it records none.
    """

    def __init__(self, place: str, classes: tuple[str, ...] = ()):
        self._place, self._classes = place, classes
        self._places: list[tuple[int, int]] = []
        self._digests: list[bytes] = []
        self._names: list[str] = []
        self._labels = LabelCollector()
        self._left_out: dict[str, int] = {}

    def add(self, offset: int, content: bytes | memoryview, label: object, name: str = "") -> None:
        """Add a row.

        Args:
            offset: Where its encoded image begins.
            content: The bytes of the image.
            label: A number, a text, or None where there is none.
            name: Its name, which all rows of a file have or none.

        Raises:
            CacheError: The label is of another type, or of another one than those of rows before.
        """
        row = f"row {len(self._places)}{f' ({make_printable(name)})' if name else ''}"
        self._labels.add(label, f"{self._place}, {row}")
        self._places.append((offset, len(content)))
        self._digests.append(sha256(content).digest())
        if name:
            self._names.append(name)

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count what is no row of the set."""
        if count:
            self._left_out[reason] = self._left_out.get(reason, 0) + count

    def finish(self) -> FileRows:
        """Return the rows."""
        places = np.array(self._places, np.int64).reshape(-1, 2)
        return FileRows(
            offsets=places[:, 0],
            sizes=places[:, 1],
            digests=np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, 32),
            labels=self._labels.get_numbers(),
            label_texts=self._labels.get_texts(),
            classes=self._classes,
            names=tuple(self._names),
            left_out=self._left_out,
        )


class LabelCollector:
    """Collects labels, which are all numbers or all text."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._texts: dict[str, int] = {}
        self._kind: type | None = None

    def add(self, label: object, place: str) -> None:
        """Add the label of a row.

        Args:
            label: The number of a class, or its name. None, NaN and -1 stand for no label. A float counts as an int,
                as tables write them in a column in which a number is missing.
            place: The row, for messages.

        Raises:
            CacheError: It is of another type or no number of a class, or numbers and text are mixed.
        """
        if isinstance(label, float):
            label = None if math.isnan(label) else int(label) if label.is_integer() else label
        if label is None or label == -1:
            self._numbers.append(-1)
            return
        if type(label) not in (int, str):
            raise CacheError(
                f"{place} has the label {make_printable(repr(label), 60)}: the number of a class or a text is expected"
            )
        if isinstance(label, int) and label < 0:
            raise CacheError(f"{place} has the label {label}: expected a number from 0, or -1 where it is unknown")
        if self._kind not in (None, type(label)):
            raise CacheError(
                f"{place} has the label {make_printable(repr(label), 60)}, and rows before it have labels of another"
                " type: numbers or text are expected for all"
            )
        self._kind = type(label)
        if isinstance(label, str):
            self._numbers.append(self._texts.setdefault(label, len(self._texts)))
        elif isinstance(label, int):
            if label > _MAX_LABEL:
                raise CacheError(f"{place} has the label {label}: the largest is {_MAX_LABEL}")
            self._numbers.append(label)

    def get_numbers(self) -> NDArray[np.int64]:
        """Return the labels, int64 [n]: numbers of classes, or indices into `get_texts`; -1 where there is none."""
        return np.array(self._numbers, np.int64)

    def get_texts(self) -> tuple[str, ...]:
        """Return the labels that are text, each once."""
        return tuple(self._texts)
