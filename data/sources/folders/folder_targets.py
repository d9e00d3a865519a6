"""The hard targets of a folder with a table of several labels an image, or of numbers."""

from collections.abc import Mapping, Sequence

import numpy as np

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.text import shorten_names
from softcache.data.sources.class_order import order_classes
from softcache.data.tasks import LABELS, NUMBERS, HardTargets

from .folder_layout import ANY, Layout, find_table
from .folder_rows import SplitRows
from .table_cells import find_fraction

_MANY_LABELS = 20  # from which a table with labels of its own for each image is taken for another table
_MAX_BYTES = 4 << 30  # of the hard targets of a split


def check_has_table(layout: Layout, task: str) -> None:
    """Check that a folder may have several labels an image, or numbers.

    Raises:
        UsageError: Its tables of labels are not read, or it has none.
    """
    if layout.kind != ANY:
        raise UsageError(
            f"--task {task} is read from labels.csv, which --layout {layout.kind} leaves out: use --layout {ANY}"
        )
    if layout.table is None and not any(find_table(folder) for folder in layout.folders.values()):
        raise UsageError(
            f"--task {task} is read from labels.csv or labels.tsv, and '{make_printable(layout.root)}' has none"
        )


def find_output_names(splits: Mapping[str, SplitRows], order: str | Sequence[str], task: str) -> tuple[str, ...]:
    """Find the names of the labels or numbers, in the order of the outputs.

    Args:
        splits: The rows of each split.
        order: See ReadingOptions.classes. By default names in cells are sorted by their text, and columns stay in the
            order of the table.
        task: "labels" or "numbers".

    Raises:
        UsageError: No image has a label, or the names do not fit the order.
        CacheError: The tables of two splits have other columns; a held-out split has a label that the training split
            lacks; the labels are no names.
    """
    labelled = {split: rows for split, rows in splits.items() if any(rows.labels)}
    if not labelled:
        table = next((rows.table for rows in splits.values() if rows.table), "the table")
        raise UsageError(f"--task {task} needs {task}, and no image has any by {table}")
    first = labelled.get("train") or next(iter(labelled.values()))
    for split, rows in labelled.items():
        if rows.has_values != first.has_values or (first.has_values and set(rows.classes) != set(first.classes)):
            raise CacheError(
                f"the split {split} has the columns {shorten_names(rows.classes)} by {rows.table}, and another split"
                f" has {shorten_names(first.classes)} by {first.table}: all splits have the same"
            )
        if unknown := sorted(set(rows.classes) - set(first.classes)):
            raise CacheError(
                f"{rows.table} has {task} of the split {split} that the training split does not have:"
                f" {shorten_names(unknown)}: take them out, or add images of them for training"
            )
    if not first.has_values:
        _check_names(first)
    for name in first.classes:
        if not name.isprintable():
            raise UsageError(f"{first.table} has the label {name!a}, which cannot be printed: rename it")
    return order_classes(first.classes, order)


def encode_targets(rows: SplitRows, names: tuple[str, ...], task: str) -> HardTargets:
    """Return the hard targets of a split in the order of its images: int8 [N, K] or float32 [N, D].

    Args:
        rows: Of the split.
        names: Of the labels or numbers, in the order of the outputs.
        task: "labels" or "numbers".

    Raises:
        CacheError: They would not fit in memory.
    """
    is_labels = task == LABELS
    if (size := len(rows.labels) * len(names) * (1 if is_labels else 4)) > _MAX_BYTES:
        raise CacheError(
            f"{len(names):,} {task} of {len(rows.labels):,} images take {size / 1e9:.1f} GB: leave out rare ones"
        )
    targets: HardTargets = np.full((len(rows.labels), len(names)), -1 if is_labels else np.nan, np.float32)
    column_of = {name: column for column, name in enumerate(names)}
    columns = [column_of[name] for name in rows.classes] if rows.has_values and any(rows.labels) else []
    for row, label in enumerate(rows.labels):
        if rows.has_values and label:
            targets[row, columns] = label
        elif label:
            targets[row] = 0
            targets[row, [column_of[str(name)] for name in label]] = 1
    return np.where(np.isnan(targets), -1, targets).astype(np.int8) if is_labels else targets


def check_are_classes(classes: tuple[str, ...], splits: Mapping[str, SplitRows]) -> None:
    """Check that the labels of a table, of which it was not said that they are classes, are no numbers to predict.

    Raises:
        UsageError: All are numbers, and one has a fraction.
    """
    table = next((rows.table for rows in splits.values() if rows.table), "")
    if table and (fraction := find_fraction(classes)):
        raise UsageError(
            f"all labels in {table} are numbers, such as {fraction}: say --task {NUMBERS} where they are to be"
            " predicted, or --task classes where each is the name of a class"
        )


def _check_names(rows: SplitRows) -> None:
    """Check that names of labels are those of several images, and no values of a column.

    Raises:
        CacheError: They are not.
    """
    if set(rows.classes) <= {"-1", "0", "1"}:
        raise CacheError(
            f"all labels in {rows.table} are {' or '.join(rows.classes)}: expected their names; of a column for each"
            " label a table has two or more, without one that is called label"
        )
    uses = sum(len(label) for label in rows.labels)
    if len(rows.classes) == uses >= _MANY_LABELS:
        raise CacheError(f"each label in {rows.table} is that of one image: it is no column of labels")
