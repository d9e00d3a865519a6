"""Data files that hold many encoded images: which there are, which split each is of, and what their rows are.

A reader of one format lists the rows of a file once, see file_rows.py; what it listed is recorded in the index, see
content_index.py, until the file changes.
"""

import glob
import os
import re
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import refuse_special_file
from softcache.base.text import shorten_names
from softcache.data.content_index import ContentIndex, is_racy
from softcache.data.file_records import stat_file
from softcache.data.sources.split_names import SPLIT_NAMES, map_to_splits, order_splits

from .file_rows import FileRows, RowReader

SPLIT_OF_NAME = map_to_splits(SPLIT_NAMES) | dict.fromkeys(("eval", "evaluation"), "test")
_SPLIT_PATTERN = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_OF_NAME)})(?![a-z])")
_MAX_FILES = 1_000_000  # that braces may stand for
_REVISION = 1  # of the records: another one is not read
MEGABYTE = 1 << 20


def list_data_files(argument: str, endings: tuple[str, ...], kind: str) -> list[Path]:
    """List the files that an argument names, sorted, each once.

    Args:
        argument: A path, a pattern with * ? [ ], one with braces such as `{000000..000009}` or `{train,test}`, or a
            folder, of which all files with one of the endings are taken, also in the folders below.
        endings: Of the files in a folder, such as (".tar",).
        kind: The name of the source, for messages.

    Raises:
        UsageError: There is no such file, or a pattern matches none.
        CacheError: It names a pipe, socket or device.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://|pipe:", argument):
        raise UsageError(
            f"--data {kind}:{make_printable(argument)}: files on this machine are read: download it first"
        )
    if Path(argument).is_dir():
        paths = sorted(path for path in Path(argument).rglob("*") if path.name.endswith(endings) and path.is_file())
        if not paths:
            others = sorted(path.name for path in Path(argument).rglob("*") if path.is_file())
            content = f": it has {shorten_names(others)}" if others else ", which is empty"
            advice = "; unpack compressed shards with gunzip" if any(name.endswith(".gz") for name in others) else ""
            expected = f"*{' or *'.join(endings)}"
            raise UsageError(
                f"there is no file {expected} in the folder '{make_printable(argument)}'{content}{advice}"
            )
        return paths
    found: dict[Path, None] = {}
    for pattern in [argument] if Path(argument).exists() else expand_braces(argument):
        names = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise UsageError(f"--data {kind}: there is no file '{make_printable(pattern)}'")
        found |= dict.fromkeys(Path(name) for name in names if not Path(name).is_dir())
    for path in found:
        refuse_special_file(path)
    if not found:
        raise UsageError(f"--data {kind}: '{make_printable(argument)}' names folders alone")
    return sorted(found)


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{000..002}` and `{train,test}-a` as a shell does, in order.

    Raises:
        UsageError: A range is no pair of numbers, or there are too many names.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if not dots:
        choices = match[1].split(",")
    elif first.isdecimal() and last.isdecimal() and int(last) - int(first) < _MAX_FILES:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        raise UsageError(f"'{{{make_printable(match[1])}}}' is no range of numbers such as {{000000..000009}}")
    before, after = pattern[: match.start()], pattern[match.end() :]
    names = [before + choice + rest for choice in choices for rest in expand_braces(after)]
    if not names or len(names) > _MAX_FILES:
        raise UsageError(f"'{make_printable(pattern)}' stands for {len(names):,} files")
    return names


def group_by_split(paths: Sequence[Path], kind: str) -> dict[str, list[Path]]:
    """Group files by the split that their name or the folder they are in names.

    Args:
        paths: The files.
        kind: The name of the source, for messages.

    Returns:
        {"train": files, and "val" and "test" where there are such}: all are "train" where none names a split. With
        val alone, it is the split test.

    Raises:
        UsageError: Some files name a split and others do not, or none is of training.
    """
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(_find_split(path), []).append(path)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        named = next(iter(next(iter(splits.values()))))
        raise UsageError(
            f"--data {kind}: '{make_printable(named)}' names its split, and {len(unnamed)} others do not, such as"
            f" '{make_printable(unnamed[0])}': call the files of a split train-…, val-… or test-…"
        )
    if unnamed:
        return {"train": unnamed}
    if "train" not in splits:
        raise UsageError(
            f"--data {kind}: there is no file of training rows, only of {' and '.join(splits)}, such as"
            f" '{make_printable(next(iter(splits.values()))[0])}'"
        )
    return order_splits(splits)


def _find_split(path: Path) -> str:
    """Return the split that a word in a file's name names, else the name of its folder; empty where both name none."""
    if match := _SPLIT_PATTERN.search(path.name.partition(".")[0].lower()):
        return SPLIT_OF_NAME[match[1]]
    return SPLIT_OF_NAME.get(path.absolute().parent.name.lower(), "")


def list_rows(
    path: Path, kind: str, settings: str, read: RowReader, index: ContentIndex
) -> Generator[int, None, FileRows]:
    """List the rows of a file: those that the index records where the file is unchanged, else as it is read now.

    Args:
        path: The file.
        kind: The name of the source.
        settings: Options on which the rows depend.
        read: Reads the file.
        index: Where the rows are recorded.

    Yields:
        How many bytes have been read since.

    Raises:
        CacheError: The file is missing, damaged, or changes while it is read.
    """
    stamp = _stat(path)
    record = index.read(kind, path)
    if record is not None:
        header, columns = record
        known = (header["revision"], header["stamp"], header["settings"]) == (_REVISION, list(stamp), settings)
        if known and _has_copy(header, index, kind, path):
            yield stamp[1]
            return _from_record(header, columns)
    now = time.time_ns()
    rows = yield from read(path)
    if _stat(path) != stamp:
        raise CacheError(f"'{make_printable(path, None)}' changes while it is read: another program writes to it")
    if not is_racy(np.array([stamp], np.int64), now)[0]:
        copy = get_copy_path(index, kind, path).stat().st_size if rows.in_copy else 0
        header = {"revision": _REVISION, "path": str(path), "stamp": stamp, "settings": settings, "copy": copy}
        index.write(kind, path, header | _to_header(rows), _to_columns(rows))
    return rows


def get_copy_path(index: ContentIndex, kind: str, path: Path) -> Path:
    """Return where the copy of a file's encoded images is, beside the index; the index has a folder."""
    assert index.folder is not None
    return index.folder / index.name_copy(kind, path)


def _has_copy(header: dict[str, Any], index: ContentIndex, kind: str, path: Path) -> bool:
    if not header["in_copy"]:
        return True
    copy = get_copy_path(index, kind, path)
    return copy.is_file() and copy.stat().st_size == header["copy"]


def _stat(path: Path) -> tuple[int, int, int, int]:
    try:
        return stat_file(path)
    except OSError as error:
        raise CacheError(f"'{make_printable(path, None)}' cannot be read: {error.strerror}") from None


def _to_header(rows: FileRows) -> dict[str, Any]:
    names = ("label_texts", "classes", "names", "in_copy", "left_out")
    return {name: getattr(rows, name) for name in names}


def _to_columns(rows: FileRows) -> dict[str, NDArray[Any]]:
    return {name: getattr(rows, name) for name in ("offsets", "sizes", "digests", "labels")}


def _from_record(header: dict[str, Any], columns: dict[str, NDArray[Any]]) -> FileRows:
    label_texts, classes, names = (tuple(header[name]) for name in ("label_texts", "classes", "names"))
    return FileRows(
        offsets=columns["offsets"],
        sizes=columns["sizes"],
        digests=columns["digests"],
        labels=columns["labels"],
        label_texts=label_texts,
        classes=classes,
        names=names,
        in_copy=bool(header["in_copy"]),
        left_out=dict(header["left_out"]),
    )


def describe_files(paths: Sequence[Path]) -> str:
    """Format the names of some files for a message."""
    return shorten_names([str(path) for path in paths])
