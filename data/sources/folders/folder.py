"""A user's own images: a folder with one folder of images per split and class, and the layouts like it.

PATH/train/<class>/…   PATH/test/<class>/… or PATH/val/<class>/…     labelled
PATH/<class>/…                                                        labelled, all for training
PATH/…  with labels.csv or labels.tsv                                 labelled as the table says
PATH/train/… or PATH/…  without class folders                         unlabelled: soft targets only
"""

from pathlib import Path

import numpy as np

from softcache.base.errors import UnreadableImageError, UsageError, make_printable
from softcache.base.progress import Progress, no_progress
from softcache.base.text import shorten_names
from softcache.data.images.decoding import open_image
from softcache.data.images.image_folder import ImageFolder
from softcache.data.images.image_sample import choose_sample, inspect_images
from softcache.data.images.unreadable import (
    MAX_SKIPPED,
    describe_unreadable,
    find_unreadable,
    make_unreadable_error,
)
from softcache.data.sources.class_order import describe_number_order
from softcache.data.sources.source_data import DEFAULT_READING, LabelledImages, ReadingOptions, SourceData
from softcache.data.tasks import CLASSES, HardTargets

from .folder_layout import UNLABELLED, Layout, find_layout
from .folder_listing import LeftOut
from .folder_rows import SplitRows, check_rows, find_classes, list_rows
from .folder_targets import check_are_classes, check_has_table, encode_targets, find_output_names
from .labels_table import RowLabel


def load_image_folder(
    path: str, options: ReadingOptions = DEFAULT_READING, progress: Progress = no_progress
) -> SourceData:
    """List the images of a folder. Their pixels stay in the files and are decoded when they are needed.

    Args:
        path: A folder in one of the layouts that docs/guides/folders.md lists.
        options: The layout, the order of the classes, the EXIF orientation, images that cannot be decoded, and the
            task.
        progress: Shows how far a table of labels is read, and a search for images that cannot be decoded.

    Returns:
        The split train, and test and val where there are such images; with val alone, it is the split test. Images
        are in the order of their labels, then of their names, unlabelled ones last; these have -1 as label. With
        several labels or numbers, which are read from a table, images are in the order of their names.

    Raises:
        UsageError: The folder is missing or empty, or has no layout that is known: held-out images without training
            images, one class alone, a class without an image to train on or without training images at all; the name
            of a class cannot be printed, or the classes do not fit the order that was chosen.
        CacheError: A table of labels cannot be used, or one of the images that are opened to detect mode and size
            cannot be decoded; all that cannot be are named.
    """
    root = Path(path)
    if not root.is_dir():
        raise UsageError(f"there is no folder '{make_printable(root)}'")
    left_out = LeftOut(root)
    layout = find_layout(root, options.layout)
    is_classes = options.task in ("", CLASSES)
    if not is_classes:
        check_has_table(layout, options.task)
    rows = list_rows(layout, left_out, progress, options.task)
    if is_classes:
        classes = find_classes(rows, options.classes)
        if not options.task:
            check_are_classes(classes, rows)
    else:
        classes = find_output_names(rows, options.classes, options.task)
    unreadable = _find_skipped(root, rows, options, progress)
    if unreadable:
        rows = {
            split: part.select({image: image not in unreadable for image in part.images})
            for split, part in rows.items()
        }
    notes = [
        _describe_reading(layout, rows, classes, options.task or CLASSES),
        *check_rows(rows, classes if is_classes else ()),
    ]
    if unreadable:
        described = describe_unreadable({root / name: reason for name, reason in unreadable.items()}, root)
        notes.append(f"{len(unreadable):,} images cannot be used and are left out (--unreadable skip): {described}")
    is_sorted = not any(part.has_values for part in rows.values())
    if is_sorted and options.classes == "" and (note := describe_number_order(classes)):
        notes.append(note)

    if is_classes:
        names, labels = _sort_rows(rows, classes)
    else:
        names = {split: part.images for split, part in rows.items()}
        labels = {split: encode_targets(part, classes, options.task) for split, part in rows.items()}
    try:
        sample = inspect_images(
            open_image(root / each[i]) for each in names.values() for i in choose_sample(len(each)).tolist()
        )
    except UnreadableImageError as error:
        total = sum(map(len, names.values()))
        paths = (root / name for each in names.values() for name in each)
        found = find_unreadable(paths, total, progress) or {Path(str(error.path)): error.reason}
        raise make_unreadable_error(found, total, root) from None
    if sample.turned and options.exif == "stored":
        notes.append(sample.describe_turned())
    splits = {
        split: LabelledImages(
            ImageFolder(root, tuple(names[split]), sample.mode, sample.size, options.exif == "transpose"),
            labels[split],
        )
        for split in rows
    }
    skipped = tuple(sorted(unreadable))
    is_basic = layout.has_basic_names and all(part.is_basic for part in rows.values())
    return SourceData(
        splits=splits,
        classes=classes,
        unreadable=skipped,
        left_out=left_out.describe(),
        notes=tuple(notes),
        layout="" if is_basic and layout.kind != UNLABELLED else layout.kind,
    )


def _find_skipped(
    root: Path, rows: dict[str, SplitRows], options: ReadingOptions, progress: Progress
) -> dict[str, str]:
    """Find the images that are to be left out, with the reason of each."""
    if options.unreadable == "error":
        return {}
    names = [name for part in rows.values() for name in part.images]
    if not isinstance(options.unreadable, str):
        recorded = set(options.unreadable)
        return {name: "" for name in names if name in recorded}
    unreadable = find_unreadable((root / name for name in names), len(names), progress)
    if len(unreadable) > MAX_SKIPPED:
        raise UsageError(
            f"{len(unreadable):,} of {len(names):,} images cannot be used, more than --unreadable skip leaves out"
            f" ({MAX_SKIPPED:,}): {describe_unreadable(unreadable, root)}"
        )
    return {path.relative_to(root).as_posix(): reason for path, reason in unreadable.items()}


def _sort_rows(
    rows: dict[str, SplitRows], classes: tuple[str, ...]
) -> tuple[dict[str, list[str]], dict[str, HardTargets]]:
    """Return the names of each split's images, and their labels: class by class, unlabelled last."""
    names, labels = {}, {}
    label_of_class: dict[RowLabel, int] = {"": -1}
    label_of_class |= {name: label for label, name in enumerate(classes)}
    for split, part in rows.items():
        unsorted = np.array([label_of_class[name] for name in part.labels], np.int64)
        order = np.argsort(np.where(unsorted < 0, len(classes), unsorted), kind="stable")
        names[split] = [part.images[i] for i in order]
        labels[split] = unsorted[order]
    return names, labels


def _describe_reading(layout: Layout, rows: dict[str, SplitRows], classes: tuple[str, ...], task: str) -> str:
    """Describe in one line how a folder was read: its splits, classes, unlabelled images and table of labels."""
    splits = []
    for split, part in rows.items():
        folder = "" if part.folder in (layout.root, layout.root / split) else f" ({make_printable(part.folder.name)}/)"
        splits.append(f"{split}{folder} {len(part.images):,}")
    parts = [", ".join(splits) + " images"]
    if classes:
        parts.append(f"{len(classes):,} {task} ({shorten_names(classes)})")
    if unlabelled := sum(part.count_unlabelled() for part in rows.values()):
        parts.append(f"{unlabelled:,} unlabelled")
    parts += [f"labels of {table}" for table in dict.fromkeys(part.table for part in rows.values()) if table]
    return f"folder '{make_printable(layout.root.resolve().name, 80)}': {'; '.join(parts)}"
