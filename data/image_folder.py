"""A folder of images: decoded on demand, never all in memory.

PATH/train/<class>/…   PATH/test/<class>/… or PATH/val/<class>/…     labelled
PATH/train/… or PATH/…  without class folders                         unlabelled: soft targets only
"""

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from softcache.base.errors import CacheError, UsageError
from softcache.base.threads import map_in_threads

from .decoding import GREY_MODES, open_image
from .image_arrays import center_crop_tensor, crop_box, stack_images
from .views import Box, pad_images

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class ImageFolder:
    """Images as files. root: the folder; names: paths below it; mode: 'L' or 'RGB'; native: their size or 0."""

    root: Path
    names: tuple[str, ...]
    mode: str
    native: int

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: NDArray[np.int64]) -> "ImageFolder":
        """The images index, in that order."""
        return ImageFolder(self.root, tuple(self.names[i] for i in index), self.mode, self.native)

    def load_plain(self, index: NDArray[np.int64], size: int, resize: int) -> torch.Tensor:
        """As Images.plain."""
        views: list[torch.Tensor] = []
        for i, same in groupby(index.tolist()):
            views += [center_crop_tensor(self._decode(i), size or self.native, resize)] * len(list(same))
        return stack_images(views)

    def load_padded(
        self, index: NDArray[np.int64], size: int, resize: int, pad: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """As Images.padded."""
        return pad_images(self.load_plain(index, size, resize).numpy(), pad), np.arange(len(index))

    def load_boxes(self, index: NDArray[np.int64], size: int, box: Callable[[int, int, int], Box]) -> torch.Tensor:
        """As Images.boxed."""
        views = []
        for i, same in groupby(range(len(index)), lambda row: int(index[row])):
            image = self._decode(i)
            views += [crop_box(image, size or self.native, box(row, *image.size)) for row in same]
        return stack_images(views)

    def _decode(self, i: int) -> Image.Image:
        path = self.root / self.names[i]
        with open_image(path) as image:
            if self.mode == "L" and image.mode not in GREY_MODES:
                raise CacheError(f"the image {path} is in colour ({image.mode}), those looked at first are grey")
            return image.convert(self.mode)


def read_folder(root: Path) -> tuple[dict[str, tuple[ImageFolder, NDArray[np.int64]]], tuple[str, ...]]:
    """What lies in a folder: {split: (images, labels [N], -1 for none)} and the classes in order.

    Splits: train, and test, val where there are such folders; with val alone, val is the test split.
    Raises UsageError when the folder is missing, empty, has one class or none, or classes that differ.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder '{root}'")
    train = root / "train" if (root / "train").is_dir() else root
    found = {"train": train}
    found |= {split: root / split for split in ("test", "val") if (root / split).is_dir()}
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")

    classes = _list_classes(found["train"])
    if train is root and classes:
        raise UsageError(f"'{root}' has no train/ folder: expected train/<class>/… and test/<class>/…")
    labelled_test = "test" in found and bool(_list_classes(found["test"]))
    if classes and "test" not in found:
        raise UsageError(f"'{root}' has train/<class>/ but neither test/ nor val/")
    if not classes and labelled_test:
        classes = _list_classes(found["test"])
    if len(classes) == 1:
        raise UsageError(f"'{found['train']}' has one class, '{classes[0]}': at least two are needed")

    read = {split: _read_split(root, folder, classes) for split, folder in found.items()}
    mode, native = _detect_mode_and_size(
        root, [name for names, _ in read.values() for name in names[:: max(1, len(names) // 128)]]
    )
    splits = {
        split: (ImageFolder(root, tuple(names), mode, native), np.array(labels, np.int64))
        for split, (names, labels) in read.items()
    }
    return splits, classes


def _list_classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _read_split(root: Path, folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    own = _list_classes(folder)
    if own and own != classes:
        differ = sorted(set(own) ^ set(classes))
        raise UsageError(f"the classes of '{folder}' are not those of the train folder: {', '.join(differ[:5])}")
    names: list[str] = []
    labels: list[int] = []
    for label, part in enumerate(own) if own else [(-1, "")]:
        found = (p for p in (folder / part).rglob("*") if p.suffix.lower() in EXTENSIONS)
        images = sorted(p for p in found if not any(name.startswith(".") for name in p.relative_to(folder).parts))
        if not images:
            raise UsageError(f"there is no image in '{folder / part}' (looked for {' '.join(sorted(EXTENSIONS))})")
        names += [p.relative_to(root).as_posix() for p in images]
        labels += [label] * len(images)
    return names, labels


def _detect_mode_and_size(root: Path, names: list[str]) -> tuple[str, int]:
    """Mode 'L' when every sampled image is grey, and their one square size, or 0 where they differ."""
    modes, sizes = set(), set()
    for name in names:
        with open_image(root / name) as image:
            modes.add(image.mode)
            sizes.add(image.size)
    width, height = next(iter(sizes))
    return ("L" if modes <= GREY_MODES else "RGB"), (width if len(sizes) == 1 and width == height else 0)


def hash_files(images: ImageFolder, labels: NDArray[np.int64], progress: Progress) -> str:
    """SHA-256 of every file's name, label and bytes, in row order. Reads each file once, eight at a time."""

    def one(name: str) -> bytes:
        try:
            return sha256((images.root / name).read_bytes()).digest()
        except OSError as error:
            raise CacheError(f"the image {images.root / name} cannot be read: {error.strerror}") from None

    whole = sha256()
    with closing(map_in_threads(one, images.names, 8)) as found:
        digests = progress(found, len(images), "reading images")
        for name, label, digest in zip(images.names, labels, digests, strict=True):
            whole.update(os.fsencode(name) + f"\0{label}\0".encode() + digest)
    return whole.hexdigest()
