"""The folder of a cache: the names of its files, which of them exist, and which a killed process left.

caches/NAME/
    manifest.json                what the cache holds; written last, so that its presence means a complete cache
    unfinished.json              what is being written; present from the first shard until the manifest is there
    README.md                    what the cache is, for people
    head.h5                      the teacher's last linear layer, where it has one
    draw-000/shard-00000.h5      rows of the training split in draw 0
    draw-000/shard-00000-1.h5    the same rows of taps that were added later
    val/shard-00000.h5           rows of a held-out split
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from softcache.base.files import remove_stale_files
from softcache.base.lock import LOCK

MANIFEST_FILE, IN_PROGRESS_FILE, README_FILE, HEAD_FILE = "manifest.json", "unfinished.json", "README.md", "head.h5"
_SHARD_PATH = re.compile(r"[a-z0-9-]+/shard-([0-9]{5,9})(?:-([1-9][0-9]{0,3}))?\.h5")


def make_shard_path(split: str, draw: int, number: int, part: int) -> str:
    """Make the path of a shard in the cache's folder.

    Args:
        split: `train`, `val` or `test`.
        draw: Draw of the views; 0 for a held-out split.
        number: Position among the shards of that draw and part, in row order.
        part: 0 for what a draw was first written with, 1, 2, … for taps that were added later.
    """
    folder = f"draw-{draw:03d}" if split == "train" else split
    return f"{folder}/shard-{number:05d}{f'-{part}' if part else ''}.h5"


def parse_shard_path(path: str) -> tuple[int, int] | None:
    """Read the number and the part off the path of a shard; None where it is no such path."""
    match = _SHARD_PATH.fullmatch(path)
    return (int(match[1]), int(match[2] or 0)) if match else None


def list_shard_files(folder: Path) -> set[str]:
    """List the HDF5 files in the inner folders of a cache, by their path in the cache's folder.

    Links to folders are not followed, and hidden files are left out.
    """
    paths = set()
    for inner in os.scandir(folder) if folder.is_dir() else ():
        if inner.is_dir(follow_symlinks=False):
            names = {file.name for file in os.scandir(inner.path)}
            paths |= {f"{inner.name}/{name}" for name in names if name.endswith(".h5") and not name.startswith(".")}
    return paths


def list_foreign_files(folder: Path) -> list[str]:
    """List the files below a folder that belong to no cache, sorted.

    Files that end in `.h5` or `.tmp` in an inner folder are not among them: they may be shards of a cache without a
    manifest, which can be adopted.
    """
    known = {MANIFEST_FILE, IN_PROGRESS_FILE, README_FILE, HEAD_FILE, LOCK}
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return sorted(path for path in paths - known if not path.endswith((".h5", ".tmp")) or path.count("/") != 1)


def remove_stale_shard_files(folder: Path, paths: Iterable[str]) -> None:
    """Remove the temporary files that a killed writer of these shards, or of the cache's other files, left.

    The caller holds the folder's lock; see `remove_stale_files` for which files those are.
    """
    remove_stale_files(folder, (MANIFEST_FILE, IN_PROGRESS_FILE, README_FILE, HEAD_FILE))
    names_by_folder: dict[str, list[str]] = {}
    for path in paths:
        inner, _, name = path.partition("/")
        names_by_folder.setdefault(inner, []).append(name)
    for inner, names in names_by_folder.items():
        if (folder / inner).is_dir():
            remove_stale_files(folder / inner, names)
