"""What a killed writer left in a cache's folder, and how it goes."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from softcache.base.errors import CacheError
from softcache.base.files import remove_stale_files
from softcache.base.lock import LOCK, hold_lock

from .manifest import HEAD_FILE, IN_PROGRESS_FILE, MANIFEST_FILE, README_FILE
from .manifest_reader import read_manifest


def clean_up(folder: Path) -> None:
    """Remove what a killed process left in a whole cache: temporary files, a lock that nobody holds.

    Nothing depends on it: where it cannot be done, on a read-only mount or beside a writer, it is left.
    """
    with suppress(CacheError, OSError):
        if any(path.name == LOCK or path.suffix == ".tmp" for path in folder.rglob(".*")):
            with hold_lock(folder):
                remove_stale_shard_files(folder, [record.path for record in read_manifest(folder).shards])


def remove_stale_shard_files(folder: Path, paths: Iterable[str]) -> None:
    """Remove the temporary files that a killed writer of this cache left; see files.remove_leftovers."""
    remove_stale_files(folder, (MANIFEST_FILE, IN_PROGRESS_FILE, README_FILE, HEAD_FILE))
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        inner, _, name = path.partition("/")
        by_folder.setdefault(inner, []).append(name)
    for inner, names in by_folder.items():
        if (folder / inner).is_dir():
            remove_stale_files(folder / inner, names)
