"""From the rows of data files to images and labels, for every format whose files hold encoded images."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import UnreadableImageError, UsageError, make_printable
from softcache.base.progress import Progress
from softcache.data.content_index import ContentIndex
from softcache.data.images.encoded_images import ByteFile, ByteFiles, EncodedImages
from softcache.data.images.image_sample import ImageSample, choose_sample, inspect_images
from softcache.data.images.unreadable import MAX_SKIPPED, find_all_unreadable, find_unreadable_rows
from softcache.data.sources.source_data import LabelledImages, ReadingOptions, SourceData

from .class_names import name_classes
from .data_files import (
    MEGABYTE,
    describe_files,
    get_copy_path,
    group_by_split,
    list_data_files,
    list_rows,
)
from .file_rows import FileRows, RowReader

_SHOWN = 5


@dataclass(frozen=True)
class EncodedSource:
    """A format of data files.

    Attributes:
        name: Of the source.
        endings: Of its files in a folder.
        read: Reads the rows of one file.
        settings: Options on which the rows depend.
    """

    name: str
    endings: tuple[str, ...]
    read: RowReader
    settings: str = ""


def load_encoded_rows(argument: str, source: EncodedSource, options: ReadingOptions, progress: Progress) -> SourceData:
    """Load the images and labels of data files. Nothing is unpacked: images are read from the files when needed.

    Args:
        argument: What stands behind the colon of --data.
        source: The format.
        options: See ReadingOptions.
        progress: Shows how many megabytes of the files are read, and how many images are decoded.

    Raises:
        UsageError: There is no such file, files name no splits that fit together, or neither do labels.
        CacheError: A file is damaged, or an image cannot be decoded.
    """
    files = list_data_files(argument, source.endings, source.name)
    return load_encoded_files(group_by_split(files, source.name), source, options, progress)


def load_encoded_files(
    splits: Mapping[str, Sequence[Path]], source: EncodedSource, options: ReadingOptions, progress: Progress
) -> SourceData:
    """Load the images and labels of {split: its data files}, see `load_encoded_rows`."""
    index = options.index
    paths = [path for paths_of_split in splits.values() for path in paths_of_split]
    rows = dict(zip(paths, _read_files(paths, source, index, progress), strict=True))
    for split, paths_of_split in splits.items():
        if not any(len(rows[path].sizes) for path in paths_of_split):
            raise UsageError(f"--data {source.name}: {describe_files(paths_of_split)} of the split {split}: no image")
    named = name_classes(
        {split: [rows[path] for path in split_paths] for split, split_paths in splits.items()}, options
    )
    copies = {path: get_copy_path(index, source.name, path) for path in paths if rows[path].in_copy}
    files = ByteFiles(tuple(ByteFile(copies.get(path, path), path) for path in paths))
    names = tuple(rows[path].names for path in paths)
    numbers = {path: number for number, path in enumerate(paths)}
    parts = {}
    for split, paths_of_split in splits.items():
        numbered = {numbers[path]: rows[path] for path in paths_of_split}
        parts[split] = _SplitRows(_join_rows(files, names, numbered), named.labels[split])
    notes, skipped = _leave_out_unreadable(parts, options, progress)
    sample = _detect_mode_and_size(parts, progress)
    if sample.turned and options.exif == "stored":
        notes.append(sample.describe_turned())
    is_transposed = options.exif == "transpose"
    images = {
        split: replace(part.images, mode=sample.mode, size=sample.size, is_transposed=is_transposed)
        for split, part in parts.items()
    }
    labelled = {split: LabelledImages(images[split], part.labels) for split, part in parts.items()}
    return SourceData(labelled, named.classes, skipped, _describe_left_out(rows, source), tuple(notes))


class _SplitRows(NamedTuple):
    images: EncodedImages
    labels: NDArray[np.int64]


def _read_files(
    paths: Sequence[Path], source: EncodedSource, index: ContentIndex, progress: Progress
) -> list[FileRows]:
    rows: list[FileRows] = []

    def read_all() -> Generator[None, None, None]:
        """Yield once for each megabyte that is read."""
        read = shown = 0
        for path in paths:
            reader = list_rows(path, source.name, source.settings, source.read, index)
            while True:
                try:
                    read += next(reader)
                except StopIteration as done:
                    rows.append(done.value)
                    break
                while shown < read // MEGABYTE:
                    shown += 1
                    yield

    total = sum(path.stat().st_size for path in paths if path.is_file()) // MEGABYTE
    for _ in progress(read_all(), total, f"reading {source.name} files (MB)"):
        pass
    return rows


def _join_rows(files: ByteFiles, names: tuple[tuple[str, ...], ...], rows: Mapping[int, FileRows]) -> EncodedImages:
    """Join the rows of some files, {number of the file: its rows}."""
    places = [
        np.stack([np.full(len(part.sizes), number), part.offsets, part.sizes], 1).astype(np.int64)
        for number, part in rows.items()
    ]
    return EncodedImages(
        files=files,
        places=np.concatenate(places),
        digests=np.concatenate([part.digests for part in rows.values()]),
        rows=np.concatenate([np.arange(len(part.sizes)) for part in rows.values()]),
        names=names,
    )


def _leave_out_unreadable(
    parts: dict[str, _SplitRows], options: ReadingOptions, progress: Progress
) -> tuple[list[str], tuple[str, ...]]:
    """Leave out what cannot be decoded, where it is to be skipped.

    Args:
        parts: {split: its rows}, changed in place.
        options: `unreadable`.
        progress: Shows how many images are decoded.

    Returns:
        Notes for the user, and the names of the rows that are left out, sorted.

    Raises:
        UsageError: There are too many of them.
    """
    if options.unreadable == "error":
        return [], ()
    recorded = None if isinstance(options.unreadable, str) else set(options.unreadable)
    skipped: dict[str, str] = {}
    for split, (images, labels) in parts.items():
        names = [images.name_row(i) for i in range(len(labels))]
        if recorded is None:
            unreadable = find_unreadable_rows(images, progress)
        else:
            unreadable = {i: "" for i, name in enumerate(names) if name in recorded}
        skipped |= {names[i]: reason for i, reason in unreadable.items()}
        readable = np.setdiff1d(np.arange(len(labels)), np.array(list(unreadable), np.int64))
        parts[split] = _SplitRows(images.take(readable), labels[readable])
    if not skipped:
        return [], ()
    shown = "; ".join(
        f"{make_printable(name, 120)} {reason}".rstrip() for name, reason in list(skipped.items())[:_SHOWN]
    )
    note = f"{len(skipped):,} images cannot be used and are left out (--unreadable skip): {shown}"
    if len(skipped) > MAX_SKIPPED:
        raise UsageError(f"{note}: that is more than it leaves out ({MAX_SKIPPED:,})")
    return [note], tuple(sorted(skipped))


def _detect_mode_and_size(parts: Mapping[str, _SplitRows], progress: Progress) -> ImageSample:
    """Look at some images of each split; where one cannot be opened, all that cannot be decoded are named."""
    every = [part.images for part in parts.values()]
    opened = (images.open(int(i)) for images in every for i in choose_sample(len(images)))
    try:
        return inspect_images(opened)
    except UnreadableImageError as error:
        raise find_all_unreadable(every, error, progress) from None


def _describe_left_out(rows: Mapping[Path, FileRows], source: EncodedSource) -> str:
    """Count what is left out of all files, in one line; empty where nothing is."""
    counts: dict[str, int] = {}
    for part in rows.values():
        for reason, count in part.left_out.items():
            counts[reason] = counts.get(reason, 0) + count
    if not counts:
        return ""
    first = next(path for path, part in rows.items() if part.left_out)
    parts = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"of {len(rows):,} {source.name} files, such as '{make_printable(first)}', these are left out: {parts}"
