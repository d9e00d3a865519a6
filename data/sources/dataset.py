"""A user's own map-style dataset, in memory of this process: every row is read once, and hashed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from softcache.base.errors import UsageError, make_printable
from softcache.base.progress import Progress, no_progress
from softcache.data.images.dataset_images import DatasetArrays, DatasetImages
from softcache.data.images.dataset_items import (
    MapDataset,
    are_same_labels,
    count_rows,
    describe_row,
    hash_image,
    holds_rows,
    read_classes,
    read_item,
    read_row,
)
from softcache.data.images.decoding import to_array
from softcache.data.images.row_arrays import make_rows

from .class_order import check_class_names
from .dataset_targets import TargetCollector
from .source_data import LabelledImages, SourceData

SPLITS = ("train", "val", "test")
MAX_IN_MEMORY = 2 << 30  # bytes of pixels that are kept; larger sets are read from the dataset for each view
_REPEATED_ROWS = 16  # of each split, read twice: of flips with probability 1/2, 1 in 65,536 datasets passes
_MAP_STYLE = "a map-style dataset, with __len__ and __getitem__"


def load_dataset(
    data: MapDataset | Mapping[str, MapDataset],
    classes: Sequence[str] = (),
    task: str = "",
    progress: Progress = no_progress,
) -> SourceData:
    """Read every row of a dataset once: its digest, its label, and its pixels where all fit in memory.

    Where the first item is an array or tensor with one axis, all are rows of numbers, which are kept in memory.

    The pixels are kept where all images are squares of one size and take at most MAX_IN_MEMORY bytes.

    Args:
        data: A dataset of training images, or {"train": …, "val": …, "test": …}, of which val and test may be absent.
            For items see dataset_items.read_item.
        classes: Names of the classes, in the order of the labels; () for those of the dataset, its attribute
            `classes`, or "0" to "K-1" where it has none.
        task: The form of the hard targets, see data/tasks.py; "" for that which the items have.
        progress: Shows how many rows of each split are read.

    Raises:
        UsageError: The data are no map-style dataset, a dataset is empty, raises an exception or returns another item
            when a row is read again; an item has another form; or labels and names of classes do not fit together.
        CacheError: A PIL image that a dataset returns cannot be decoded.
    """
    datasets = _list_splits(data)
    rows = {split: count_rows(dataset, split) for split, dataset in datasets.items()}
    names = _choose_class_names(data, classes)
    if holds_rows(datasets["train"], "train"):
        return _load_rows(datasets, rows, names, task, progress)
    for split, dataset in datasets.items():
        _check_repeatable(dataset, rows[split], split)
    images = _ImageCollector(sum(rows.values()))
    targets = TargetCollector()
    digests = {
        split: _read_split(dataset, rows[split], split, images, targets, progress)
        for split, dataset in datasets.items()
    }
    names, labels = targets.read_targets(names, task)
    mode, size = images.get_mode(), images.get_size()
    splits = {}
    for split, dataset in datasets.items():
        if images.is_kept:
            pixels = images.stack(split)
            splits[split] = LabelledImages(DatasetArrays(pixels, digests=digests[split]), labels[split])
        else:
            index = np.arange(rows[split])
            splits[split] = LabelledImages(
                DatasetImages(dataset, split, index, digests[split], mode, size), labels[split]
            )
    return SourceData(splits, names)


def _load_rows(
    datasets: dict[str, MapDataset], rows: dict[str, int], names: tuple[str, ...], task: str, progress: Progress
) -> SourceData:
    """Read all rows of numbers, of one length and dtype.

    Raises:
        UsageError: A row has another form or is another one when it is read again, or they do not fit in memory.
    """
    first, _ = read_row(datasets["train"], 0, "train")
    if not first.size:
        raise UsageError(f"{describe_row('train', 0)} is an array {[*first.shape]}: a row has 0 numbers")
    if (total := sum(rows.values()) * first.nbytes) > MAX_IN_MEMORY:
        raise UsageError(
            f"the rows of the dataset take {total / 1e9:,.1f} GB, more than {MAX_IN_MEMORY / 1e9:,.1f} GB: save them"
            " by numpy.save in a folder, and name it as data: 'arrays:FOLDER'"
        )
    values, targets = {}, TargetCollector()
    for split, dataset in datasets.items():
        values[split] = np.empty((rows[split], *first.shape), first.dtype)
        for row in progress(range(rows[split]), rows[split], "reading rows"):
            numbers, label = read_row(dataset, row, split)
            targets.add(split, row, label)
            if (numbers.shape, numbers.dtype) != (first.shape, first.dtype):
                raise UsageError(
                    f"{describe_row(split, row)} is {numbers.dtype} {list(numbers.shape)}, and train row 0 is"
                    f" {first.dtype} {list(first.shape)}: all rows have one length and dtype"
                )
            values[split][row] = numbers
        count = min(rows[split], _REPEATED_ROWS)
        for row in (np.arange(count) * rows[split] // count).tolist():
            if not np.array_equal(read_row(dataset, row, split)[0], values[split][row], equal_nan=True):
                raise UsageError(
                    f"{describe_row(split, row)} has other numbers when it is read twice: give the dataset without"
                    " random transforms. The views are made here, the same ones for the teacher and every student"
                )
    names, labels = targets.read_targets(names, task)
    return SourceData(
        {split: LabelledImages(make_rows(x, f"the {split} dataset"), labels[split]) for split, x in values.items()},
        names,
    )


def find_class_names(data: MapDataset | Mapping[str, MapDataset]) -> tuple[str, ...]:
    """Return the names in the attribute `classes` of a dataset; () where it has none.

    Raises:
        UsageError: The datasets of two splits have different names, or a name cannot be printed.
    """
    names: tuple[str, ...] = ()
    for split, dataset in _list_splits(data).items():
        value = read_classes(dataset, split)
        if names and value and value != names:
            raise UsageError(
                f"the {split} dataset has other classes ({_shorten(value)}) than the one of another split"
                f" ({_shorten(names)}): the label of a class must be the same number in every split"
            )
        names = names or check_class_names(value)
    return names


def _list_splits(data: Any) -> dict[str, MapDataset]:
    """Return the dataset of each split, in the order of SPLITS."""
    datasets = dict(data) if isinstance(data, Mapping) else {"train": data}
    if unknown := [key for key in datasets if key not in SPLITS]:
        raise UsageError(
            f"data has the key {make_printable(repr(unknown[0]))}: expected a dataset, or a mapping with the keys"
            " 'train' and, where there are such rows, 'val' and 'test'"
        )
    if "train" not in datasets:
        raise UsageError("data is a mapping without the key 'train'")
    for split, dataset in datasets.items():
        kind = make_printable(type(dataset).__name__)
        if isinstance(dataset, DataLoader):
            raise UsageError(
                f"data of the split {split} is a DataLoader: give its dataset, {_MAP_STYLE}, without transforms"
            )
        is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if isinstance(dataset, (IterableDataset, str, bytes)) or not is_map_style:
            raise UsageError(
                f"data of the split {split} is of type {kind}: expected {_MAP_STYLE}, or the text 'folder:PATH' or the"
                " name of a data set"
            )
    return {split: datasets[split] for split in SPLITS if split in datasets}


def _choose_class_names(data: MapDataset | Mapping[str, MapDataset], classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names that are given, or those of the dataset; () for numbers."""
    if isinstance(classes, str):
        raise UsageError(f"classes is the text {classes!r}: for a dataset, expected a list of names")
    if not all(isinstance(name, str) for name in classes):
        raise UsageError("classes has a name that is no text: expected a list of str, one for each class")
    if len(set(classes)) < len(classes):
        repeated = next(name for number, name in enumerate(classes) if name in classes[:number])
        raise UsageError(f"classes has the name {make_printable(repr(repeated))} more than once: one for each class")
    recorded, names = find_class_names(data), check_class_names(classes)
    if recorded and names and names != recorded:  # a cache is opened with the names of the dataset
        raise UsageError(
            f"classes ({_shorten(names)}) are not the dataset's own ({_shorten(recorded)}): leave out classes, or"
            " change the dataset's attribute classes"
        )
    return names or recorded


def _check_repeatable(dataset: MapDataset, rows: int, split: str) -> None:
    """Check that a dataset returns the same items when some rows are read twice."""
    count = min(rows, _REPEATED_ROWS)
    for row in (np.arange(count) * rows // count).tolist():
        (image, label), (again, label_again) = (read_item(dataset, row, split) for _ in range(2))
        has_same_label = are_same_labels(label, label_again)
        if not has_same_label or hash_image(image) != hash_image(again):
            kind = "image" if has_same_label else "label"
            raise UsageError(
                f"{describe_row(split, row)} has another {kind} when it is read twice: give the dataset without random"
                " transforms. The views are made here, the same ones for the teacher and every student"
            )


def _read_split(
    dataset: MapDataset,
    rows: int,
    split: str,
    images: "_ImageCollector",
    targets: TargetCollector,
    progress: Progress,
) -> NDArray[np.uint8]:
    """Read all rows, and return their digests, uint8 [N, 32]; images and labels are added to the collectors."""
    digests = np.empty((rows, 32), np.uint8)
    for row in progress(range(rows), rows, "reading images"):
        image, label = read_item(dataset, row, split)
        targets.add(split, row, label)
        digests[row] = np.frombuffer(hash_image(image), np.uint8)
        images.add(split, image)
    return digests


class _ImageCollector:
    """The modes and sizes of all images, and their pixels as long as all of them can be kept in memory.

    Args:
        rows: Number of images that will be added, of all splits.

    Attributes:
        is_kept: Whether all images so far are squares of one size, and the pixels of all rows fit in memory.
    """

    def __init__(self, rows: int):
        self.is_kept = True
        self._rows = rows
        self._modes: set[str] = set()
        self._sizes: set[tuple[int, int]] = set()
        self._pixels: dict[str, list[NDArray[np.uint8]]] = {}

    def add(self, split: str, image: Image.Image) -> None:
        """Add the next image of a split, in mode L or RGB."""
        self._modes.add(image.mode)
        self._sizes.add(image.size)
        if self.is_kept:
            channels, size = (1 if self.get_mode() == "L" else 3), self.get_size()
            self.is_kept = 0 < self._rows * channels * size**2 <= MAX_IN_MEMORY
        if self.is_kept:
            self._pixels.setdefault(split, []).append(to_array(image))
        else:
            self._pixels.clear()

    def get_mode(self) -> str:
        """Return "L" where all images are grey, else "RGB"."""
        return "L" if self._modes == {"L"} else "RGB"

    def get_size(self) -> int:
        """Return the side of the images where all are squares of one size, else 0."""
        width, height = next(iter(self._sizes))
        return width if len(self._sizes) == 1 and width == height else 0

    def stack(self, split: str) -> torch.Tensor:
        """Return the images of a split, uint8 [N, C, S, S], and free their pixels here; grey ones become RGB."""
        images, size = self._pixels.pop(split), self.get_size()
        shape = (1 if self.get_mode() == "L" else 3, size, size)
        return torch.from_numpy(np.stack([np.broadcast_to(pixels, shape) for pixels in images]))


def _shorten(names: Sequence[str]) -> str:
    return make_printable(", ".join(names[:5]) + (", …" if len(names) > 5 else ""), 120)
