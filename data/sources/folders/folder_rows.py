"""The rows of each split of a folder: its images, each with the name of its class or none."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.progress import Progress
from softcache.base.text import shorten_names
from softcache.data.sources.class_order import order_classes
from softcache.data.tasks import CLASSES, NUMBERS

from .folder_layout import ANY, BASIC, UNLABELLED, Layout, find_table
from .folder_listing import (
    BESIDE_CLASSES,
    BESIDE_SPLITS,
    EXTENSIONS,
    WITHOUT_LABEL,
    LeftOut,
    list_folders,
    list_images,
    list_loose_images,
    note_loose_files,
)
from .labels_table import LabelsTable, RowLabel, read_labels
from .table_cells import find_fraction

_MANY_CLASSES = 20  # from which a table with a label of its own for each image is taken for another table


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split.

    Attributes:
        folder: Where they are.
        images: Paths of their files relative to the whole folder, with slashes.
        labels: The name of the class of each, "" where it has none; or its several labels or numbers, see TableRow.
        classes: The names of the classes, also of those without an image, sorted by text; of the several labels; or of
            the columns with values.
        table: The table of labels from which they are, with its columns; empty where they are of class folders.
        is_basic: Whether the layout BASIC gives the same rows, if it takes the folder for this split.
        has_values: Whether `labels` are values, one for each of `classes`, in this order.
    """

    folder: Path
    images: list[str]
    labels: list[RowLabel]
    classes: tuple[str, ...] = ()
    table: str = ""
    is_basic: bool = True
    has_values: bool = False

    def select(self, is_kept: Mapping[str, bool]) -> "SplitRows":
        """Return the rows whose image is mapped to True, in the same order."""
        pairs = [pair for pair in zip(self.images, self.labels, strict=True) if is_kept[pair[0]]]
        return replace(self, images=[image for image, _ in pairs], labels=[label for _, label in pairs])

    def count_unlabelled(self) -> int:
        """Return the number of rows without a label."""
        return sum(not label for label in self.labels)


def list_rows(layout: Layout, left_out: LeftOut, progress: Progress, task: str = "") -> dict[str, SplitRows]:
    """List the rows of each split. Unlabelled rows of a held-out split that has labels are left out.

    Args:
        layout: Of the folder.
        left_out: The files that are no rows are added to it.
        progress: Shows how many rows of a table of labels are read.
        task: What the labels are, see data/tasks.py; "" for classes.

    Returns:
        The splits train, test and val, as far as there are such rows. With val alone, it is the split test.

    Raises:
        UsageError: No row is for training, or there are two tables of labels.
        CacheError: A table of labels cannot be used.
    """
    if layout.table is not None:
        splits = _list_by_table(layout, layout.table, left_out, progress, task)
    else:
        if layout.has_split_folders:
            note_loose_files(layout.root, {path.name for path in layout.folders.values()}, BESIDE_SPLITS, left_out)
        splits = {
            split: _list_folder(split, folder, layout.kind, left_out, progress, task)
            for split, folder in layout.folders.items()
        }
    for split, rows in splits.items():
        if split != "train" and any(rows.labels) and not all(rows.labels):
            has_label = {image: bool(label) for image, label in zip(rows.images, rows.labels, strict=True)}
            for image in rows.images:
                if not has_label[image]:
                    left_out.add(WITHOUT_LABEL, os.path.join(layout.root, image))
            splits[split] = rows.select(has_label)
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    return splits


def find_classes(splits: dict[str, SplitRows], order: str | Sequence[str]) -> tuple[str, ...]:
    """Find the names of the classes, in the order of the labels; none where no image has a label.

    They are those of the training split, or of the others where it has no labels.

    Args:
        splits: The rows of each split.
        order: See ReadingOptions.classes.

    Raises:
        UsageError: There is one class, or the training split lacks a class of another split; the name of a class
            cannot be printed; the classes do not fit the order.
        CacheError: Each label of a table is that of one image.
    """
    source = next((rows for rows in splits.values() if rows.classes), splits["train"])
    classes = source.classes
    if source is not splits["train"]:
        classes = tuple(sorted({name for rows in splits.values() for name in rows.classes}))
    folder = make_printable(source.folder)
    if len(classes) == 1:
        name = make_printable(classes[0])
        advice = "" if source.table else f". Images without labels are read as folder:{folder}/{name}"
        raise UsageError(f"'{folder}' has one class, '{name}': at least two are needed{advice}")
    if source.table and len(classes) == len(source.labels) - source.count_unlabelled() >= _MANY_CLASSES:
        hint = f"; numbers to predict are --task {NUMBERS}" if find_fraction(classes) else ""
        raise CacheError(
            f"'{folder}': each label in {source.table} is that of one image: it is no column of classes{hint}"
        )
    for split, rows in splits.items():
        if unknown := sorted(set(rows.classes) - set(classes)):
            raise UsageError(
                f"the classes of '{make_printable(rows.folder)}' ({split}) are not those of the training split, which"
                f" has no {shorten_names(unknown)}: move them away, or add images of them for training"
            )
    kind = "class" if source.table else "class folder"
    for name in classes:
        if not name.isprintable():
            raise UsageError(
                f"the {kind} '{make_printable(name)}' in '{folder}' has a character that cannot be printed"
                f" ({name!a}): rename it"
            )
    return order_classes(classes, order)


def check_rows(splits: dict[str, SplitRows], classes: tuple[str, ...]) -> list[str]:
    """Check that there are images of each class to train on.

    Returns:
        A line for each held-out split that lacks some of the classes, and for names that differ in case alone.

    Raises:
        UsageError: A split has no image, or the training split none of a class.
    """
    notes, looked_for = [], f"(looked for {' '.join(sorted(EXTENSIONS))})"
    first_spelling: dict[str, str] = {}
    for name in classes:
        other = first_spelling.setdefault(name.casefold(), name)
        if other != name:
            notes.append(f"the classes {make_printable(other)} and {make_printable(name)} differ in case alone")
    for split, rows in splits.items():
        if not rows.images:
            raise UsageError(f"there is no image in '{make_printable(rows.folder)}' {looked_for}")
        with_images = set(rows.labels)
        missing = [name for name in classes if name not in with_images] if rows.classes else []
        if missing and split != "train":
            notes.append(
                f"the split {split} has no image of {len(missing)} of {len(classes)} classes: {shorten_names(missing)}"
            )
        elif missing and rows.table:
            raise UsageError(f"{rows.table} has no image of the class '{make_printable(missing[0])}' to train on")
        elif missing:
            raise UsageError(
                f"there is no image in '{make_printable(rows.folder / missing[0])}' {looked_for}: each folder in"
                f" '{make_printable(rows.folder)}' is a class, move it away if it is none"
            )
    return notes


def _list_folder(split: str, folder: Path, kind: str, left_out: LeftOut, progress: Progress, task: str) -> SplitRows:
    """List the rows of a folder of one split, which has a table of labels, class folders, or images alone."""
    table = find_table(folder) if kind == ANY else None
    if table is not None:
        left_out.tables.add(str(table))
        images = list_images(folder, left_out)
        labels = read_labels(table, images, left_out.root, progress, task)
        for image, row in labels.rows.items():
            if row.split not in ("", split):
                raise UsageError(
                    f"{make_printable(table)} puts {make_printable(os.path.basename(image))} into the split"
                    f" {row.split}, and is in the folder of {split}: a table of all splits belongs beside the folders"
                )
        of_images = [labels.rows[image].label if image in labels.rows else "" for image in images]
        return _make_table_rows(folder, images, of_images, table, labels)
    has_classes = kind != UNLABELLED and task in ("", CLASSES)
    class_folders = list_folders(folder) if has_classes else ()
    if not class_folders:
        images = list_images(folder, left_out)
        return SplitRows(folder, images, [""] * len(images))
    loose = list_loose_images(folder, left_out.root) if split == "train" and kind != BASIC else []
    note_loose_files(folder, {*class_folders, *map(os.path.basename, loose)}, BESIDE_CLASSES, left_out)
    images, labels_of_images = list[str](), list[RowLabel]()
    for name in class_folders:
        of_class = list_images(folder / name, left_out)
        images += of_class
        labels_of_images += [name] * len(of_class)
    return SplitRows(folder, images + loose, labels_of_images + [""] * len(loose), class_folders, is_basic=not loose)


def _list_by_table(
    layout: Layout, table: Path, left_out: LeftOut, progress: Progress, task: str
) -> dict[str, SplitRows]:
    """List the rows of a folder with a table of labels beside the folders of its splits, or beside its images.

    A row's split is that of the table, else that of the folder it is in; images without both are for training, or left
    out where there are folders of splits.
    """
    left_out.tables.add(str(table))
    for folder in set(layout.folders.values()) - {layout.root}:
        if (second := find_table(folder)) is not None:
            raise UsageError(f"there are two tables of labels, {make_printable(table)} and {make_printable(second)}")
    images = list_images(layout.root, left_out)
    labels = read_labels(table, images, layout.root, progress, task)
    split_of_folder = {path.name: split for split, path in layout.folders.items() if path != layout.root}
    found: dict[str, tuple[list[str], list[RowLabel]]] = {split: ([], []) for split in ("train", "test", "val")}
    for image in images:
        row = labels.rows.get(image)
        split = row.split if row is not None else ""
        split = split or split_of_folder.get(image.partition("/")[0], "")
        if not split and layout.has_split_folders:
            left_out.add(BESIDE_SPLITS, os.path.join(layout.root, image))
            continue
        of_split = found[split or "train"]
        of_split[0].append(image)
        of_split[1].append(row.label if row is not None else "")
    if not found["train"][0]:
        raise UsageError(f"by {make_printable(table)}, no image in '{make_printable(layout.root)}' is for training")
    return {
        split: _make_table_rows(layout.root, paths, names, table, labels)
        for split, (paths, names) in found.items()
        if paths
    }


def _make_table_rows(
    folder: Path, images: list[str], of_images: list[RowLabel], table: Path, labels: LabelsTable
) -> SplitRows:
    names = {name for label in of_images for name in ([label] if isinstance(label, str) else map(str, label))}
    return SplitRows(
        folder=folder,
        images=images,
        labels=of_images,
        classes=labels.names or tuple(sorted(names - {""})),
        table=f"{table.name} ({labels.columns})",
        is_basic=False,
        has_values=bool(labels.names),
    )
