"""Transfer sets: the images and labels on which a teacher is run, in training, validation and test splits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UnreadableImageError, UsageError, make_printable, unknown_name_error
from softcache.base.progress import Progress, no_progress
from softcache.base.text import shorten_names
from softcache.data.images.dataset_items import Data
from softcache.data.images.image_folder import ImageFolder
from softcache.data.images.row_arrays import RowArrays
from softcache.data.images.unreadable import find_all_unreadable

from .content_index import ContentIndex, open_index
from .file_digests import FileDigests
from .long_tail import parse_imbalance, select_long_tail
from .sampling import draw_stratified
from .sources import get_source_name, has_argument, load_source, short_name
from .sources.source_data import Images, LabelledImages, ReadingOptions
from .tasks import (
    CLASSES,
    EMBEDDING,
    LABELS,
    NUMBERS,
    TASKS,
    HardTargets,
    find_form,
    find_known,
    find_strata,
    require_classes,
)

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    Attributes:
        images: N images, or rows of numbers.
        labels: The hard targets of each image: int64 [N], the class, -1 where it is unknown; or those of another task,
            see tasks.py.
        content: Digest of images and labels, in hexadecimal.
        source_rows: int64 [N], the row of each image in the data as they were loaded, before validation rows were cut
            off: where validation rows are drawn, those of "train" and "val" are rows of the same training data.
    """

    images: Images
    labels: HardTargets
    content: str
    source_rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TransferSet:
    """The splits of one data set.

    Attributes:
        name: The name of its source, see data/sources; "dataset" for a dataset in memory of this process.
        classes: Names of the classes in the order of the labels; empty where no image has a label. Of the task
            "labels" those of the labels, and of "numbers" those of the numbers.
        channels: 1 for grey images, 3 for RGB; of rows of numbers, the length of their first axis.
        size: Side of the images in pixels; 0 where they differ, and for rows of numbers.
        splits: "train", "val", and "test" where the data have one.
        cut: The arguments of `load_transfer_set` that decided which rows are in which split, and how a folder of
            images was read where that is not the default.
        left_out: A line that counts and names the files of a folder that are no rows; empty where there are none.
        notes: Lines about the data that a user should see before a teacher is trained or run on them.
        source_sizes: {split: rows} of the data as they were loaded, before rows were drawn or left out: a split that
            is missing here was drawn from "train". Empty where that is not known.
        shape: Of a row of numbers; () for images.
        task: What the hard targets are, and what a teacher outputs, see tasks.py.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    splits: dict[str, Split]
    cut: dict[str, Any]
    left_out: str = ""
    notes: tuple[str, ...] = ()
    source_sizes: dict[str, int] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    task: str = CLASSES

    def identity(self) -> dict[str, object]:
        """Return what a cache must agree with: name, classes in order, content of each split, the cut, the task."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "content": {split: rows.content for split, rows in self.splits.items()},
            "cut": dict(self.cut),
            **({} if self.task == CLASSES else {"task": self.task}),  # the first caches had no other task
        }

    def count_labelled(self) -> dict[str, int]:
        """Return {split: number of rows that have a label}."""
        return {split: int(find_known(rows.labels).sum()) for split, rows in self.splits.items()}


def load_transfer_set(
    data: Data,
    root: Path,
    *,
    val_fraction: float,
    seed: int = 0,
    train_size: int = 0,
    imbalance: str = "",
    head_size: int = 0,
    test_fraction: float = 0.0,
    classes: str | Sequence[str] = "",
    exif: str = "stored",
    unreadable: str | Sequence[str] = "error",
    layout: str = "any",
    columns: str = "",
    task: str = "",
    index: ContentIndex | None = None,
    progress: Progress = no_progress,
) -> TransferSet:
    """Load a data set and split it: validation rows are drawn from the training data, test rows are as published.

    The same arguments always give the same rows.

    Args:
        data: The name of a source, `folder:PATH`, a map-style dataset of training images, or a mapping
            {"train": dataset, "val": dataset, "test": dataset} of which val and test may be absent. For what a dataset
            returns see dataset_items.read_item.
        root: Folder of the data sets that torchvision reads.
        val_fraction: Share of the training data for validation, drawn by class, between 0 and 1. Unused where the
            data come with a validation split.
        seed: Seed of all draws.
        train_size: Number of training rows to keep, drawn by class; 0 keeps all.
        imbalance: Keep a long-tailed part of the training rows, see long_tail.parse_imbalance; "" keeps all.
        head_size: Rows of the largest class with `imbalance`; 0 is as many as the data allow.
        test_fraction: Share of the training data that becomes the test split, drawn by class; 0 draws none. Only for
            data without a test split.
        classes, exif, unreadable, layout: How files of images are read, see ReadingOptions. Of a dataset, `classes`
            are the names of the classes, see sources.dataset.load_dataset.
        columns: Which columns of a table hold images and labels, see sources.table_columns.parse_columns.
        task: What the hard targets are, a name of tasks.TASKS; "" for what the data have.
        index: Where it is recorded what the files hold; None for the folder in the user's cache folder.
        progress: Shows how many images of a folder or a dataset have been read.

    Raises:
        UsageError: There is no such source, or an argument is outside its range or does not fit the data.
        CacheError: Files of the data set are missing or damaged.
    """
    name = get_source_name(data)
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction:g} is outside 0 to 1")
    if not 0 <= test_fraction < 1:
        raise UsageError(f"--test-fraction {test_fraction:g} is outside 0 to 1")
    if task and task not in TASKS:
        raise unknown_name_error("task", task, TASKS)
    index = open_index() if index is None else index
    options = ReadingOptions(root, classes, exif, unreadable, layout=layout, columns=columns, task=task, index=index)
    source = load_source(data, options, progress)
    loaded, class_names = dict(source.splits), source.classes
    source_rows = {split: np.arange(len(part.labels)) for split, part in loaded.items()}
    if test_fraction and "test" in loaded:
        raise UsageError(f"--test-fraction {test_fraction:g}: the data have a test split already")
    if test_fraction:
        _cut_split(loaded, source_rows, "test", test_fraction, key=(seed, 13))
    if "val" not in loaded:
        _cut_split(loaded, source_rows, "val", val_fraction, key=(seed, 10))
    labels = loaded["train"].labels
    task = EMBEDDING if task == EMBEDDING else find_form(labels)
    if imbalance:
        require_classes(task, f"--imbalance {imbalance}")
    rows, long_tail = _select_training_rows(labels, len(class_names), train_size, imbalance, head_size, seed)
    if len(rows) < len(labels):
        loaded["train"], source_rows["train"] = loaded["train"].take(rows), source_rows["train"][rows]

    splits = _hash_splits(loaded, source_rows, index, progress)
    images = splits["train"].images
    cut = {"val_fraction": val_fraction, "seed": seed, "train_size": train_size, **long_tail}
    if test_fraction:
        cut["test_fraction"] = test_fraction
    if exif != "stored":
        cut["exif"] = exif
    if columns:
        cut["columns"] = columns
    if source.unreadable:
        cut["unreadable"] = list(source.unreadable)
    if source.layout:
        cut["layout"] = source.layout
    notes = source.notes
    if isinstance(data, str) and has_argument(name) and (test_fraction or name != "folder"):
        notes += (_describe_splits(short_name(data), splits, class_names, task),)
    if isinstance(data, str) and class_names and "test" not in splits:
        notes += ("there is no test split: --test-fraction 0.1 cuts one from the training data, by class",)
    return TransferSet(
        name=name,
        classes=class_names,
        channels=images.channels,
        size=images.size,
        splits=splits,
        cut=cut,
        left_out=source.left_out,
        notes=(*notes, *index.notes),
        source_sizes={split: len(part.labels) for split, part in source.splits.items()},
        shape=images.shape if isinstance(images, RowArrays) else (),
        task=task,
    )


def _describe_splits(name: str, splits: dict[str, Split], classes: tuple[str, ...], task: str) -> str:
    """Describe the splits that are used in one line: their rows, the classes, and rows without a label."""
    parts = [", ".join(f"{split} {len(rows):,}" for split, rows in splits.items()) + " rows"]
    if classes:
        kind = {NUMBERS: "numbers an image", LABELS: "labels, several an image"}.get(task, "classes")
        kind = "number an image" if task == NUMBERS and len(classes) == 1 else kind
        parts.append(f"{len(classes):,} {kind} ({shorten_names(classes)})")
    if unlabelled := sum(int((~find_known(rows.labels)).sum()) for rows in splits.values()):
        parts.append(f"{unlabelled:,} unlabelled")
    return f"'{make_printable(name, 80)}': {'; '.join(parts)}"


def _hash_splits(
    loaded: dict[str, LabelledImages],
    source_rows: dict[str, NDArray[np.int64]],
    index: ContentIndex,
    progress: Progress,
) -> dict[str, Split]:
    """Hash the content of each split, in the order in which they are reported."""
    splits: dict[str, Split] = {}
    recorded: dict[Path, FileDigests] = {}  # by folder
    try:
        for split in ("train", "val", "test"):
            if split in loaded:
                images, labels = loaded[split]
                if isinstance(images, ImageFolder):
                    images = replace(images, split=split)
                    digests = recorded.setdefault(images.root, FileDigests(images.root, index))
                    content = images.hash_content(labels, progress, digests)
                else:
                    content = images.hash_content(labels, progress)
                splits[split] = Split(images, labels, content, source_rows[split])
    except UnreadableImageError as error:
        raise find_all_unreadable((rows.images for rows in loaded.values()), error, progress) from None
    for digests in recorded.values():
        digests.save()
    return splits


def _cut_split(
    loaded: dict[str, LabelledImages],
    source_rows: dict[str, NDArray[np.int64]],
    split: str,
    fraction: float,
    key: tuple[int, ...],
) -> None:
    """Move a share of the training rows, drawn by class, into a split of their own; both stay in ascending order.

    Args:
        loaded, source_rows: Images and rows of each split, changed in place.
        split: "val" or "test".
        fraction: Share of the training rows, between 0 and 1.
        key: Key of the random numbers.
    """
    train, rows = loaded["train"], len(loaded["train"].labels)
    count = max(1, round(rows * fraction))
    if count >= rows:
        raise UsageError(f"--{split}-fraction {fraction:g} of {rows} training rows leaves none to train on")
    drawn = draw_stratified(find_strata(train.labels), count, key)
    rest = np.setdiff1d(np.arange(rows), drawn)
    loaded["train"], loaded[split] = train.take(rest), train.take(drawn)
    source_rows["train"], source_rows[split] = source_rows["train"][rest], source_rows["train"][drawn]


def _select_training_rows(
    labels: HardTargets, classes: int, train_size: int, imbalance: str, head_size: int, seed: int
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Return the training rows to keep, in ascending order, and the entries of the cut for a long tail, if any."""
    if not 0 <= train_size <= len(labels):
        raise UsageError(f"--train-size {train_size} is not between 0 and the {len(labels)} training rows there are")
    if imbalance:
        if train_size:
            raise UsageError("--train-size and --imbalance both select training rows: leave out one of them")
        rows, head = select_long_tail(labels, classes, imbalance, head_size, key=(seed, 12))
        return rows, {"imbalance": str(parse_imbalance(imbalance)), "head_size": head}
    if head_size:
        raise UsageError(f"--head-size {head_size} is the largest class of a long tail: give --imbalance as well")
    if train_size:
        return draw_stratified(find_strata(labels), train_size, key=(seed, 11)), {}
    return np.arange(len(labels)), {}


def count_classes(labels: HardTargets, classes: int) -> NDArray[np.int64]:
    """Return the number of rows of each class or label, int64 [classes]; 0 for numbers, which have none.

    Rows without a label are not counted.
    """
    if find_form(labels) == NUMBERS:
        return np.zeros(classes, np.int64)
    if labels.ndim == 2:
        return np.asarray((labels == 1).sum(0), np.int64)
    return np.bincount(labels[labels >= 0], minlength=classes)
