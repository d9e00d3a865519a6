"""The classes of data whose labels stand beside the images: numbers or text, with or without recorded names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UsageError, make_printable
from softcache.base.text import shorten_names
from softcache.data.sources.class_order import SORTED_ORDERS, check_class_names, order_classes, read_name_lines
from softcache.data.sources.source_data import ReadingOptions

from .file_rows import FileRows


class NamedLabels(NamedTuple):
    """Labels as numbers of classes.

    Attributes:
        classes: The names of the classes in the order of the labels; empty where no row has a label.
        labels: {split: int64 [N]}, -1 where a row has none.
    """

    classes: tuple[str, ...]
    labels: dict[str, NDArray[np.int64]]


def name_classes(splits: Mapping[str, Sequence[FileRows]], options: ReadingOptions) -> NamedLabels:
    """Number the classes of all files in one way.

    Args:
        splits: {split: rows of its files}.
        options: `classes`, the order of labels that are text, or the names of labels that are numbers.

    Raises:
        UsageError: Labels are numbers in one file and text in another, files record other classes, a held-out split
            has a class that the training rows do not have, or there is one class alone.
        CacheError: The file with the names cannot be read.
    """
    every = [rows for files in splits.values() for rows in files]
    has_texts = any(rows.label_texts for rows in every)
    if has_texts and any((rows.labels >= 0).any() for rows in every if not rows.label_texts):
        raise UsageError("labels are text in some files and numbers in others: one of both is expected for all")
    named = _name_texts(splits, options) if has_texts else _name_numbers(splits, options)
    if len(named.classes) == 1:
        raise UsageError(f"the data have one class, '{make_printable(named.classes[0])}': at least two are needed")
    check_class_names(named.classes)
    return named


def _name_texts(splits: Mapping[str, Sequence[FileRows]], options: ReadingOptions) -> NamedLabels:
    """Number labels that are text, in the order of their text or that of --classes."""
    train = {text for rows in splits["train"] for text in rows.label_texts}
    known = train or {text for files in splits.values() for rows in files for text in rows.label_texts}
    for split, files in splits.items():
        if unknown := sorted({text for rows in files for text in rows.label_texts} - known):
            raise UsageError(f"the {split} rows have classes that no training row has: {shorten_names(unknown)}")
    classes = order_classes(tuple(sorted(known)), options.classes)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = {}
    for split, files in splits.items():
        # One more entry, for the index -1 of rows without a label.
        tables = [np.array([*(numbers[text] for text in rows.label_texts), -1], np.int64) for rows in files]
        labels[split] = np.concatenate([table[rows.labels] for table, rows in zip(tables, files, strict=True)])
    return NamedLabels(classes, labels)


def _name_numbers(splits: Mapping[str, Sequence[FileRows]], options: ReadingOptions) -> NamedLabels:
    """Name labels that are numbers: as the files record, as --classes names them, or by the numbers themselves."""
    labels = {split: np.concatenate([rows.labels for rows in files]) for split, files in splits.items()}
    largest = (
        int(labels["train"].max()) if (labels["train"] >= 0).any() else max(int(x.max()) for x in labels.values())
    )
    if largest < 0:
        return NamedLabels((), labels)
    recorded = {rows.classes for files in splits.values() for rows in files if rows.classes}
    if len(recorded) > 1:
        first, second, *_ = sorted(recorded)
        raise UsageError(
            f"the files record other classes ({shorten_names(first)}) than others of them"
            f" ({shorten_names(second)}): the label of a class must be the same number in every file"
        )
    classes = _choose_names(next(iter(recorded), ()), options.classes) or tuple(map(str, range(largest + 1)))
    for split, values in labels.items():
        if int(values.max()) >= len(classes):
            raise UsageError(
                f"a {split} row has the label {values.max()}, but there are {len(classes)} classes"
                f" ({shorten_names(classes)}): labels are numbers from 0"
            )
    return NamedLabels(classes, labels)


def _choose_names(recorded: tuple[str, ...], option: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names that the files record, or those of the option; empty for the numbers themselves."""
    if not isinstance(option, str):
        return recorded or tuple(option)
    if option and recorded:
        raise UsageError(
            f"--classes {option}: the files record the classes, in the order of their labels"
            f" ({shorten_names(recorded)}): leave it out"
        )
    if option in SORTED_ORDERS:
        raise UsageError(f"--classes {option}: the labels are numbers, whose order is fixed; a file can name them")
    return _read_names(Path(option)) if option else recorded


def _read_names(path: Path) -> tuple[str, ...]:
    """Read the names of the classes from a file, in the order of the labels."""
    names = read_name_lines(path)
    if repeated := sorted({name for name in names if names.count(name) > 1}) if len(names) < 1 << 16 else []:
        raise UsageError(f"--classes: '{make_printable(path)}' names twice {len(repeated)}: {shorten_names(repeated)}")
    return tuple(names)
