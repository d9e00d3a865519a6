"""The digests of the files in a folder: recorded ones where a file has not changed, else of its bytes as they are."""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softcache.base.progress import Progress
from softcache.base.threads import map_in_threads

from .content_index import Columns, ContentIndex, is_racy
from .file_records import hash_file, stat_file

_HASHING_THREADS = 8
_STAT_BATCH = 1000  # files of one task of a thread
_KIND = "folder"  # of the record
_NO_STAMP = (-1, -1, -1, -1)  # of a file that cannot be looked at
_NO_INDEX = ContentIndex(None)


class FileDigests:
    """The digests of the files in a folder.

    A file with the recorded inode, size and times of change has the recorded bytes, see file_records.FileRecords.
    Files that changed less than two seconds before they were read are not recorded: they could change again without
    another time.

    Args:
        root: The folder.
        index: Where the digests are recorded.
    """

    def __init__(self, root: Path, index: ContentIndex = _NO_INDEX):
        self.root, self.index = root, index
        self._names: list[str] = []  # of the files whose digests are known
        self._digests = np.empty((0, 32), np.uint8)
        self._stamps = np.empty((0, 4), np.int64)
        self._is_changed = False
        if (record := index.read(_KIND, root)) is not None:
            header, columns = record
            names = os.fsdecode(columns["names"].tobytes()).split("\0") if len(columns["stamps"]) else []
            if header["root"] == str(root.absolute()) and len(names) == len(columns["stamps"]):
                self._names, self._digests, self._stamps = names, columns["digests"], columns["stamps"]
        self._rows = {name: row for row, name in enumerate(self._names)}

    def hash_files(self, names: Sequence[str], progress: Progress) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the SHA-256 of each file and its stamp. Files that have to be read are read eight at a time.

        Args:
            names: Paths relative to the folder.
            progress: Shows how many files are read, of those that have to be.

        Returns:
            uint8 [N, 32] and int64 [N, 4].

        Raises:
            UnreadableImageError: A file cannot be read.
            CacheError: A file changes while it is read.
        """
        now = time.time_ns()
        stamps = self._stat_files(names)
        rows = np.array([self._rows.get(name, -1) for name in names], np.int64)
        is_known = rows >= 0
        is_known[is_known] = (self._stamps[rows[is_known]] == stamps[is_known]).all(1)
        digests = np.empty((len(names), 32), np.uint8)
        digests[is_known] = self._digests[rows[is_known]]
        changed: list[int] = np.flatnonzero(~is_known).tolist()
        paths = [self.root / names[i] for i in changed]
        with closing(map_in_threads(hash_file, paths, _HASHING_THREADS)) as records:
            for i, record in zip(changed, progress(records, len(paths), "reading images"), strict=True):
                digests[i], stamps[i] = np.frombuffer(record.digest, np.uint8), record.stamp
        self._remember([names[i] for i in changed], digests[changed], stamps[changed], now)
        return digests, stamps

    def save(self) -> None:
        """Record the digests, where one is new. Those of files that are no longer there are dropped.

        Raises:
            CacheError: The index was named by the user, and cannot be written.
        """
        if not self._is_changed:
            return
        stamps = self._stat_files(self._names)
        kept: list[int] = np.flatnonzero((stamps == self._stamps).all(1)).tolist()
        names = "\0".join(self._names[i] for i in kept)
        columns: Columns = {
            "names": np.frombuffer(os.fsencode(names), np.uint8),
            "digests": self._digests[kept],
            "stamps": self._stamps[kept],
        }
        self.index.write(_KIND, self.root, {"root": str(self.root.absolute())}, columns)
        self._is_changed = False

    def _remember(
        self, names: Sequence[str], digests: NDArray[np.uint8], stamps: NDArray[np.int64], now_ns: int
    ) -> None:
        """Add or replace what is known of some files, but for those that changed just before `now_ns`."""
        fresh: list[int] = np.flatnonzero(~is_racy(stamps, now_ns)).tolist()
        if self.index.folder is None or not len(fresh):
            return
        replaced = {names[i] for i in fresh}
        kept = [row for row, name in enumerate(self._names) if name not in replaced]
        self._names = [*(self._names[row] for row in kept), *(names[i] for i in fresh)]
        self._digests = np.concatenate([self._digests[kept], digests[fresh]])
        self._stamps = np.concatenate([self._stamps[kept], stamps[fresh]])
        self._rows = {name: row for row, name in enumerate(self._names)}
        self._is_changed = True

    def _stat_files(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the stamps of files, int64 [N, 4]; in threads, as a file server takes its time for each."""
        batches = [names[first : first + _STAT_BATCH] for first in range(0, len(names), _STAT_BATCH)]
        look = partial(_stat_batch, str(self.root))
        with closing(map_in_threads(look, batches, _HASHING_THREADS if len(batches) > 1 else 1)) as stamps:
            return np.concatenate([np.empty((0, 4), np.int64), *stamps])


def _stat_batch(root: str, names: Sequence[str]) -> NDArray[np.int64]:
    stamps = []
    for name in names:
        try:
            stamps.append(stat_file(f"{root}/{name}"))
        except OSError:  # the error comes when it is read
            stamps.append(_NO_STAMP)
    return np.array(stamps, np.int64).reshape(-1, 4)
