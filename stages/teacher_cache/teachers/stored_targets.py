"""Targets that were made elsewhere, matched with the images of a transfer set."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.progress import Progress, no_progress
from softcache.data.transfer_set import Split, TransferSet
from softcache.pipeline.models.other_frameworks.file_network import StoredTargets

from .logit_files import SPLITS, LogitFile, Logits, read_logit_file

Rows = NDArray[np.int64]


def load_stored_targets(
    path: Path, transfer_set: TransferSet, progress: Progress = no_progress
) -> tuple[StoredTargets, list[str]]:
    """Load targets from a file and find the row of every image.

    Args:
        path: The file, see logit_files.
        transfer_set: The data.
        progress: Shows how much of the file is read.

    Returns:
        The targets, and notes on what of the file is not used.

    Raises:
        UsageError: Rows are missing, doubled or too many, or the file has another form.
        CacheError: The file is damaged, or a value is not finite.
    """
    file = read_logit_file(path, progress)
    notes = [f"'{path}': not read: {', '.join(make_printable(name, 40) for name in file.unread)}"] * bool(file.unread)
    if file.by_split:
        logits = _match_arrays(file, transfer_set, notes)
    elif file.names is not None:
        logits = _match_names(file, transfer_set, notes)
    else:
        logits = _match_index(file, transfer_set)
    digest = sha256()
    for split, rows in logits.items():
        _check_finite(path, split, rows)
        digest.update(f"{split}\0{rows.shape[0]}\0{rows.shape[1]}\0".encode())
        digest.update(np.ascontiguousarray(rows, "<f4").data)
    return StoredTargets(logits, digest.hexdigest()), notes


def _match_arrays(file: LogitFile, transfer_set: TransferSet, notes: list[str]) -> dict[str, NDArray[np.float32]]:
    """Match a file that has an array for each split, in the order of its images."""
    origins = {split: _find_origin(file, split, transfer_set, file.by_split) for split in transfer_set.splits}
    for origin, size in _list_sizes(transfer_set, origins).items():
        rows = len(file.by_split[origin])
        if rows != size:
            hint = ", counted before validation rows are drawn from them" if origin == "train" else ""
            raise UsageError(f"'{file.path}' has {rows:,} rows of '{origin}', the data have {size:,}{hint}")
    if unread := [split for split in file.by_split if split not in origins.values()]:
        notes.append(
            f"'{file.path}': not read: {', '.join(unread)}: these data have no such split of their own, and draw it"
            " from train"
        )
    return {
        split: _to_float32(file.by_split[origins[split]][_get_source_rows(rows)])
        for split, rows in transfer_set.splits.items()
    }


def _match_index(file: LogitFile, transfer_set: TransferSet) -> dict[str, NDArray[np.float32]]:
    """Match a file whose rows have the number of an image in its split."""
    assert file.logits is not None
    index = np.arange(len(file.logits)) if file.index is None else file.index
    splits = np.array(file.splits if file.splits is not None else ["train"] * len(index))
    if unknown := sorted(set(splits.tolist()) - set(SPLITS)):
        raise UsageError(f"'{file.path}': split '{make_printable(unknown[0], 40)}' is not {', '.join(SPLITS)}")
    present = {split: np.flatnonzero(splits == split) for split in SPLITS if (splits == split).any()}
    origins = {split: _find_origin(file, split, transfer_set, present) for split in transfer_set.splits}
    positions: dict[str, Rows] = {}  # {split of the file: its row for each image, -1 where it has none}
    for origin, size in _list_sizes(transfer_set, origins).items():
        rows = present[origin]
        if (index[rows] < 0).any() or (index[rows] >= size).any():
            wrong = index[rows][(index[rows] < 0) | (index[rows] >= size)]
            raise UsageError(f"'{file.path}': index {wrong[0]} of '{origin}' is not between 0 and {size - 1}")
        counts = np.bincount(index[rows], minlength=size)
        if (counts > 1).any():
            raise UsageError(f"'{file.path}' has {counts.max()} rows for index {counts.argmax()} of '{origin}'")
        positions[origin] = np.full(size, -1)
        positions[origin][index[rows]] = rows

    def describe(split: str, row: int) -> str:
        source_row = _get_source_rows(transfer_set.splits[split])[row]
        return f"index {source_row} of '{origins[split]}'"

    found = {split: positions[origins[split]][_get_source_rows(rows)] for split, rows in transfer_set.splits.items()}
    return _take(file, found, describe)


def _match_names(file: LogitFile, transfer_set: TransferSet, notes: list[str]) -> dict[str, NDArray[np.float32]]:
    """Match a file whose rows have the path of an image, relative to the folder, or as the folder was named."""
    names = {split: getattr(rows.images, "names", None) for split, rows in transfer_set.splits.items()}
    if any(each is None for each in names.values()):
        raise UsageError(
            f"'{file.path}' has names, and the images of {transfer_set.name} have none: give their index and split"
        )
    root = getattr(transfer_set.splits["train"].images, "root", Path())
    positions: dict[str, int] = {}
    for position, text in enumerate(file.names or ()):
        name = _to_relative(text, root)
        if positions.setdefault(name, position) != position:
            raise UsageError(f"'{file.path}' has two rows for '{make_printable(name)}'")
    found = {
        split: np.array([positions.get(name, -1) for name in each or ()], np.int64) for split, each in names.items()
    }
    example = make_printable(next(iter(positions), ""), 80)

    def describe(split: str, row: int) -> str:
        return f"'{make_printable((names[split] or ())[row])}' (names of the file are like '{example}')"

    logits = _take(file, found, describe)
    used = sum(len(rows) for rows in found.values())
    if used < len(positions):
        known = {name for each in names.values() for name in each or ()}
        other = next(name for name in positions if name not in known)
        notes.append(
            f"'{file.path}': {len(positions) - used:,} of its {len(positions):,} rows are of no image that is used,"
            f" the first: '{make_printable(other)}'"
        )
    return logits


def _take(
    file: LogitFile, found: dict[str, Rows], describe: Callable[[str, int], str]
) -> dict[str, NDArray[np.float32]]:
    """Take the rows of the file that were found. Raises UsageError where some are missing; -1 stands for one."""
    assert file.logits is not None
    missing = {split: np.flatnonzero(rows < 0) for split, rows in found.items()}
    if count := sum(map(len, missing.values())):
        split = next(split for split, rows in missing.items() if len(rows))
        total = sum(map(len, found.values()))
        raise UsageError(
            f"'{file.path}' has no targets for {count:,} of {total:,} images, the first: {split} row"
            f" {missing[split][0]}, {describe(split, int(missing[split][0]))}. Every image needs its targets"
        )
    return {split: _to_float32(file.logits[rows]) for split, rows in found.items()}


def _find_origin(file: LogitFile, split: str, transfer_set: TransferSet, present: dict[str, Any]) -> str:
    """Find the split of the file that has the rows of a split: of one that was drawn from train, it is train.

    A folder's `val` is its test split where it has no other.
    """
    origin = split if split in transfer_set.source_sizes else "train"
    if origin in present:
        return origin
    if origin == "test" and "val" in present and "val" not in transfer_set.source_sizes:
        return "val"
    size = transfer_set.source_sizes.get(origin, len(transfer_set.splits[split]))
    raise UsageError(
        f"'{file.path}' has no targets for the {size:,} images of '{origin}': it has those of {', '.join(present)}"
    )


def _list_sizes(transfer_set: TransferSet, origins: dict[str, str]) -> dict[str, int]:
    """Return {split of the file: rows that it must have}."""
    sizes = {}
    for split, origin in origins.items():
        source = split if split in transfer_set.source_sizes else "train"
        sizes[origin] = transfer_set.source_sizes.get(source, len(transfer_set.splits[split]))
    return sizes


def _get_source_rows(rows: Split) -> Rows:
    return np.arange(len(rows)) if rows.source_rows is None else rows.source_rows


def _to_relative(text: str, root: Path) -> str:
    """Return the path of an image relative to the folder, with slashes; unchanged where it is not below it."""
    text = text.replace("\\", "/").removeprefix("./")
    for prefix in (str(root).removeprefix("./"), str(root.absolute())):
        if prefix not in ("", ".") and text.startswith(f"{prefix.rstrip('/')}/"):
            text = text[len(prefix.rstrip("/")) + 1 :]
            break
    return str(PurePosixPath(text))


def _to_float32(rows: Logits) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # an infinite value is refused
        return rows.astype(np.float32)


def _check_finite(path: Path, split: str, rows: NDArray[np.float32]) -> None:
    """Raise CacheError for a value that is not finite."""
    for start in range(0, len(rows), 65_536):
        invalid = ~np.isfinite(rows[start : start + 65_536])
        if invalid.any():
            row, column = (int(x[0]) for x in np.nonzero(invalid))
            raise CacheError(
                f"'{path}': the logit of {split} row {start + row}, class {column} is {rows[start + row, column]}:"
                " it is not a finite number"
            )
