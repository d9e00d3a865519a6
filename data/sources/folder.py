"""A user's own images: a folder with one folder of images per split and class.

PATH/train/<class>/…   PATH/test/<class>/… or PATH/val/<class>/…     labelled
PATH/train/… or PATH/…  without class folders                         unlabelled: soft targets only
"""

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from softcache.base.errors import UnreadableImageError, UsageError, make_printable
from softcache.base.progress import Progress, no_progress
from softcache.data.decoding import GREY_MODES, open_image
from softcache.data.image_folder import ImageFolder
from softcache.data.unreadable import describe_unreadable, find_unreadable, make_unreadable_error

from .class_order import describe_number_order, order_classes
from .folder_listing import (
    BESIDE_CLASSES,
    BESIDE_SPLITS,
    EXTENSIONS,
    LeftOut,
    list_folders,
    list_images,
    note_loose_files,
    shorten_names,
)
from .source_data import DEFAULT_READING, LabelledImages, ReadingOptions, SourceData

_SAMPLED_IMAGES = 128  # of each split, at least, to detect mode and size
_ORIENTATION, _UPRIGHT = 0x0112, 1  # EXIF tag, and its value for pixels that are stored as they are seen
_MAX_SKIPPED = 10_000  # images that cannot be decoded: their names are kept in the identity of a cache


def load_image_folder(
    path: str, options: ReadingOptions = DEFAULT_READING, progress: Progress = no_progress
) -> SourceData:
    """List the images of a folder. Their pixels stay in the files and are decoded when they are needed.

    Args:
        path: A folder with train/, and test/, val/ or both; or one of images without labels.
        options: The order of the classes, the EXIF orientation, and images that cannot be decoded.
        progress: Shows how far a search for images that cannot be decoded is.

    Returns:
        The split train, and test and val where there are such folders; with val alone, it is the split test. Images
        are in the order of their names. An unlabelled split has -1 as labels.

    Raises:
        UsageError: The folder is missing or empty, has class folders without train/, has train/<class>/ without test/
            or val/, has one class alone, or its splits have different classes; the name of a class cannot be printed,
            or the classes do not fit the order that was chosen.
        CacheError: One of the images that are opened to detect mode and size cannot be decoded; all that cannot be
            are named.
    """
    root = Path(path)
    if not root.is_dir():
        raise UsageError(f"there is no folder '{make_printable(root)}'")
    train = root / "train" if (root / "train").is_dir() else root
    folders = {"train": train}
    folders |= {split: root / split for split in ("test", "val") if (root / split).is_dir()}
    left_out = LeftOut(root)
    if train is not root:
        note_loose_files(root, {folder.name for folder in folders.values()}, BESIDE_SPLITS, left_out)
    if "val" in folders and "test" not in folders:
        folders["test"] = folders.pop("val")
    classes = _find_classes(root, folders, options)
    listed = {split: _list_images(folder, classes, left_out) for split, folder in folders.items()}
    unreadable = _find_skipped(root, listed, options, progress)
    notes = []
    if unreadable:
        described = describe_unreadable(unreadable, root)
        notes.append(f"{len(unreadable):,} images cannot be used and are left out (--unreadable skip): {described}")
    if isinstance(options.classes, str) and not options.classes and (note := describe_number_order(classes)):
        notes.append(note)

    names, labels = _select_readable(root, folders, listed, classes, unreadable)
    sample = [name for each in names.values() for name in each[:: max(1, len(each) // _SAMPLED_IMAGES)]]
    try:
        mode, size, turned = _detect_mode_and_size(root, sample)
    except UnreadableImageError as error:
        total = sum(map(len, names.values()))
        paths = (root / name for each in names.values() for name in each)
        found = find_unreadable(paths, total, progress) or {Path(str(error.path)): error.reason}
        raise make_unreadable_error(found, total, root) from None
    if turned and options.exif == "stored":
        notes.append(
            f"{turned} of {len(sample)} images that were looked at have an EXIF orientation, and are used as their"
            " pixels are stored: --exif transpose turns them as a viewer does"
        )
    splits = {
        split: LabelledImages(
            ImageFolder(root, tuple(names[split]), mode, size, options.exif == "transpose"),
            np.array(labels[split], np.int64),
        )
        for split in listed
    }
    skipped = tuple(sorted(path.relative_to(root).as_posix() for path in unreadable))
    return SourceData(splits, classes, skipped, left_out.describe(), tuple(notes))


def _find_classes(root: Path, folders: dict[str, Path], options: ReadingOptions) -> tuple[str, ...]:
    """Find the names of the classes, in the order of the labels; none where no split has class folders."""
    train = folders["train"]
    classes = list_folders(train)
    if train is root and classes:
        raise UsageError(f"'{make_printable(root)}' has no train/ folder: expected train/<class>/… and test/<class>/…")
    if classes and "test" not in folders:
        raise UsageError(f"'{make_printable(root)}' has train/<class>/ but neither test/ nor val/")
    if not classes and "test" in folders:
        classes = list_folders(folders["test"])
    if len(classes) == 1:
        raise UsageError(f"'{train}' has one class, '{make_printable(classes[0])}': at least two are needed")
    for name in classes:
        if not name.isprintable():
            raise UsageError(
                f"the class folder '{make_printable(name)}' in '{make_printable(train)}' has a character that cannot"
                f" be printed ({name!a}): rename it"
            )
    return order_classes(classes, options.classes)


def _list_images(folder: Path, classes: tuple[str, ...], left_out: LeftOut) -> list[list[Path]]:
    """List the images of a split, class by class; one list where it has no class folders."""
    class_folders = list_folders(folder)
    if not class_folders:
        return [list_images(folder, left_out)]
    if set(class_folders) != set(classes):
        missing = sorted(set(classes) - set(class_folders))
        unknown = sorted(set(class_folders) - set(classes))
        parts = [f"it has no {shorten_names(missing)}"] if missing else []
        parts += [f"the train folder has no {shorten_names(unknown)}"] if unknown else []
        raise UsageError(
            f"the classes of '{make_printable(folder)}' are not those of the train folder: {'; '.join(parts)}. Make"
            " the missing folders, with an image in each, or move the others away"
        )
    note_loose_files(folder, class_folders, BESIDE_CLASSES, left_out)
    return [list_images(folder / name, left_out) for name in classes]


def _find_skipped(
    root: Path, listed: dict[str, list[list[Path]]], options: ReadingOptions, progress: Progress
) -> dict[Path, str]:
    """Find the images that are to be left out, with the reason of each."""
    if options.unreadable == "error":
        return {}
    paths = [path for split in listed.values() for images in split for path in images]
    if not isinstance(options.unreadable, str):
        recorded = set(options.unreadable)
        return {path: "" for path in paths if path.relative_to(root).as_posix() in recorded}
    unreadable = find_unreadable(paths, len(paths), progress)
    if len(unreadable) > _MAX_SKIPPED:
        raise UsageError(
            f"{len(unreadable):,} of {len(paths):,} images cannot be used, more than --unreadable skip leaves out"
            f" ({_MAX_SKIPPED:,}): {describe_unreadable(unreadable, root)}"
        )
    return unreadable


def _select_readable(
    root: Path,
    folders: dict[str, Path],
    listed: dict[str, list[list[Path]]],
    classes: tuple[str, ...],
    unreadable: Collection[Path],
) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """Return the names of each split's images, relative to root, and their labels.

    Raises:
        UsageError: A class of a split has no image.
    """
    names: dict[str, list[str]] = {split: [] for split in listed}
    labels: dict[str, list[int]] = {split: [] for split in listed}
    for split, by_class in listed.items():
        for label, paths in enumerate(by_class):
            images = [path for path in paths if path not in unreadable]
            has_classes = len(by_class) > 1
            if not images:
                folder = folders[split] / classes[label] if has_classes else folders[split]
                extensions = " ".join(sorted(EXTENSIONS))
                raise UsageError(f"there is no image in '{make_printable(folder)}' (looked for {extensions})")
            names[split] += [path.relative_to(root).as_posix() for path in images]
            labels[split] += [label if has_classes else -1] * len(images)
    return names, labels


def _detect_mode_and_size(root: Path, names: Iterable[str]) -> tuple[str, int, int]:
    """Look at some images.

    Returns:
        Mode "L" where every image is grey, else "RGB"; their common side where all are squares of it, else 0; and how
        many have an EXIF orientation by which a viewer turns them.
    """
    modes, sizes, turned = set(), set(), 0
    for name in names:
        with open_image(root / name) as image:
            modes.add(image.mode)
            sizes.add(image.size)
            if "exif" in image.info or image.format == "TIFF":  # of other images, PNG would be decoded to look for it
                turned += image.getexif().get(_ORIENTATION, _UPRIGHT) not in (_UPRIGHT, 0)
    width, height = next(iter(sizes))
    size = width if len(sizes) == 1 and width == height else 0
    return ("L" if modes <= GREY_MODES else "RGB"), size, turned
