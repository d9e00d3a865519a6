"""A user's own images: a folder with one folder of images per split and class.

PATH/train/<class>/…   PATH/test/<class>/… or PATH/val/<class>/…     labelled
PATH/train/… or PATH/…  without class folders                         unlabelled: soft targets only
"""

from pathlib import Path

import numpy as np

from softcache.base.errors import UsageError
from softcache.data.decoding import GREY_MODES, open_image
from softcache.data.image_folder import ImageFolder

from .source_data import LabelledImages, SourceData

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_SAMPLED_IMAGES = 128  # of each split, at least, to detect mode and size


def load_image_folder(root: Path) -> SourceData:
    """List the images of a folder. Their pixels stay in the files and are decoded when they are needed.

    Args:
        root: A folder with train/, and test/, val/ or both; or one of images without labels.

    Returns:
        The split train, and test and val where there are such folders; with val alone, it is the split test. Images
        are in the order of their names. An unlabelled split has -1 as labels.

    Raises:
        UsageError: The folder is missing or empty, has class folders without train/, has train/<class>/ without test/
            or val/, has one class alone, or its splits have different classes.
        CacheError: One of the images that are opened to detect mode and size cannot be decoded.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder '{root}'")
    train = root / "train" if (root / "train").is_dir() else root
    folders = {"train": train}
    folders |= {split: root / split for split in ("test", "val") if (root / split).is_dir()}
    if "val" in folders and "test" not in folders:
        folders["test"] = folders.pop("val")

    classes = _list_classes(train)
    if train is root and classes:
        raise UsageError(f"'{root}' has no train/ folder: expected train/<class>/… and test/<class>/…")
    if classes and "test" not in folders:
        raise UsageError(f"'{root}' has train/<class>/ but neither test/ nor val/")
    if not classes and "test" in folders:
        classes = _list_classes(folders["test"])
    if len(classes) == 1:
        raise UsageError(f"'{train}' has one class, '{classes[0]}': at least two are needed")

    listed = {split: _list_images(root, folder, classes) for split, folder in folders.items()}
    sample = [name for names, _ in listed.values() for name in names[:: max(1, len(names) // _SAMPLED_IMAGES)]]
    mode, size = _detect_mode_and_size(root, sample)
    splits = {
        split: LabelledImages(ImageFolder(root, tuple(names), mode, size), np.array(labels, np.int64))
        for split, (names, labels) in listed.items()
    }
    return SourceData(splits, classes)


def _list_classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _list_images(root: Path, folder: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """The names of a split's images, relative to root, and their labels. Hidden files and folders are skipped."""
    class_folders = _list_classes(folder)
    if class_folders and class_folders != classes:
        differences = sorted(set(class_folders) ^ set(classes))
        raise UsageError(f"the classes of '{folder}' are not those of the train folder: {', '.join(differences[:5])}")
    names: list[str] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders) if class_folders else [(-1, "")]:
        files = (path for path in (folder / class_folder).rglob("*") if path.suffix.lower() in EXTENSIONS)
        images = sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))
        if not images:
            extensions = " ".join(sorted(EXTENSIONS))
            raise UsageError(f"there is no image in '{folder / class_folder}' (looked for {extensions})")
        names += [path.relative_to(root).as_posix() for path in images]
        labels += [label] * len(images)
    return names, labels


def _detect_mode_and_size(root: Path, names: list[str]) -> tuple[str, int]:
    """Mode "L" where every image is grey, else "RGB"; and their common side where all are squares of it, else 0."""
    modes, sizes = set(), set()
    for name in names:
        with open_image(root / name) as image:
            modes.add(image.mode)
            sizes.add(image.size)
    width, height = next(iter(sizes))
    return ("L" if modes <= GREY_MODES else "RGB"), (width if len(sizes) == 1 and width == height else 0)
