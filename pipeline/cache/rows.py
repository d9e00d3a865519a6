"""Rows of a cache by position: the order in which they are stored, and reading them from verified shards."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import CacheError, make_printable
from softcache.data.tasks import HardTargets, are_equal

from .codecs import Codec
from .manifest import ROW_KEYS, SPLITS, Manifest, ShardRecord, count_row_bytes
from .shards import Shard, Stamp

Positions = NDArray[np.int64]  # places in the row order of a split

MAX_OPEN_SHARDS = 256  # a process may have 1,024 open files
_CHECKED_NUMBERS = 1 << 22  # logits that are decoded at once to check them: 16 MB
_BLOCK_BYTES = 1 << 20  # of rows that are read at once
_UNCHECKED_ROWS = 1 << 22  # up to so many rows (50 MB while the order is made) file sizes are not checked before


def make_row_order(seed: int, split: str, rows: int) -> NDArray[np.uint32]:
    """Make the order in which the rows of a split are stored: the index of the image at each position.

    It is random, because blocks of rows of a set that is sorted by class make poor batches: chi-squared of class
    counts is 168 instead of 9 at 16 blocks of 256 rows.

    Returns:
        uint32 [rows].
    """
    return rng.compact_permutation((seed, 30 + SPLITS.index(split)), rows)


class RowReader:
    """Reads rows of a cache from its shards. Each shard is verified before its first row is used.

    Several threads may use one reader.

    Args:
        folder: Of the cache.
        manifest: Of the cache.
        seed: Of the row order.
        codec: Of the logits.

    Attributes:
        labels: {split: hard targets of N rows} of the transfer set. Shards that are opened from then on must have
            these labels.
    """

    def __init__(self, folder: Path, manifest: Manifest, seed: int, codec: Codec):
        self.labels: dict[str, HardTargets] = {}
        self._folder, self._manifest, self._seed, self._codec = folder, manifest, seed, codec
        self._records: dict[tuple[str, int, str], list[ShardRecord]] = {}  # {(split, draw, dataset): in row order}
        for record in sorted(manifest.shards, key=lambda s: s.start):
            for name in record.datasets:
                if name not in ROW_KEYS or record.has_logits:  # the keys of a row are read beside its logits
                    self._records.setdefault((record.split, record.draw, name), []).append(record)
        self._orders: dict[str, NDArray[np.uint32]] = {}  # 4 bytes a row
        self._shards: dict[str, Shard] = {}  # {path: open shard}, in the order of opening
        self._stamps: dict[str, Stamp] = {}  # {path: stamp of the file when this process verified it}

    def list_records(self, split: str, draw: int, name: str) -> list[ShardRecord]:
        """List the shards of which a dataset of a draw is read, in row order."""
        return self._records[split, draw, name]

    def get_order(self, split: str) -> NDArray[np.uint32]:
        """Return the index of the image at each position of a split, uint32 [rows].

        Raises:
            CacheError: The manifest claims many rows and the files do not have the size of so many.
        """
        if split not in self._orders:
            rows = self._manifest.splits[split]
            for record in self.list_records(split, 0, "index") if rows > _UNCHECKED_ROWS else ():
                path = self._folder / record.path
                size = path.stat().st_size if path.is_file() else 0
                if size != record.bytes:
                    raise CacheError(f"{path}: {size} bytes instead of {record.bytes}: cut, appended to or missing")
            self._orders[split] = make_row_order(self._seed, split, rows)
        return self._orders[split]

    def read_rows(self, split: str, draw: int, name: str, positions: Positions) -> NDArray[np.generic]:
        """Read the rows of a dataset at these positions: one read per run of neighbours, in the order of the file.

        Each passes through a block of memory that stays in the processor's cache: 0.44 us a row of 2 kB, against 0.52
        where all are read and then gathered. The kernel is advised of all runs first, with which reading from a disk
        is 1.6 times as fast.

        Args:
            split: `train`, `val` or `test`.
            draw: Draw of the views; 0 for a held-out split.
            name: Of the dataset, such as `logits` or `features/pool`.
            positions: [n], in any order.

        Returns:
            [n, …] as stored.
        """
        shape, dtype = self._manifest.datasets[name]
        row_bytes = count_row_bytes({name: (shape, dtype)})
        order = np.argsort(positions, kind="stable")
        runs = _find_runs(self.list_records(split, draw, name), positions[order])
        for record, first, start, stop in runs:
            self.get_shard(record).advise_read(name, first, stop - start)
        rows = np.empty((len(positions), *shape), dtype)
        raw_rows = rows.reshape(-1).view(f"V{row_bytes}")
        block = np.empty(max(1, _BLOCK_BYTES // row_bytes), f"V{row_bytes}")
        buffer = block.view(np.uint8).data
        for record, first, start, stop in runs:
            for i in range(start, stop, len(block)):
                n = min(len(block), stop - i)
                self.get_shard(record).read_into(name, first + i - start, buffer[: n * row_bytes])
                raw_rows[order[i : i + n]] = block[:n]
        return rows

    def read_column(self, split: str, draw: int, name: str) -> NDArray[np.generic]:
        """Read all rows of a dataset of a draw, in row order."""
        return np.concatenate([self.get_shard(r).read(name) for r in self.list_records(split, draw, name)])

    def get_shard(self, record: ShardRecord) -> Shard:
        """Return an open shard, which this process has verified once. Only the last MAX_OPEN_SHARDS stay open."""
        shard = self._shards.get(record.path)
        if shard is None:
            shard = self.open_shard(record, self._stamps.get(record.path))
            self._stamps[record.path] = shard.stamp
            for path in list(self._shards)[: max(0, len(self._shards) + 1 - MAX_OPEN_SHARDS)]:
                self._shards.pop(path, None)  # its last user closes it: another thread may be reading it
            self._shards[record.path] = shard
        return shard

    def open_shard(self, record: ShardRecord, verified_stamp: Stamp | None = None) -> Shard:
        """Open a shard and verify it, unless its file still has the stamp with which it was verified.

        Raises:
            CacheError: The file is missing or damaged, or its rows are not those of this place of this cache.
        """
        layout = self._manifest.get_layout(record)
        shard = Shard(self._folder, record.path, layout, record.bytes, record.checksum, verified_stamp)
        if not shard.is_verified:
            index = self.get_order(record.split)[record.start : record.start + record.rows].astype(np.int64)
            _check_rows(shard, record, self._manifest.fingerprint, index, self.labels.get(record.split))
            if record.has_logits:
                _check_logits(shard, record, self._codec, self._manifest.classes)
        return shard


def _find_runs(records: list[ShardRecord], positions: Positions) -> list[tuple[ShardRecord, int, int, int]]:
    """Find the runs of neighbouring positions that lie in one shard.

    Args:
        records: Of the shards of a draw, in row order.
        positions: [n], sorted.

    Returns:
        (shard, first row of the run in the shard, start, stop) for each run positions[start:stop].
    """
    if not len(positions):
        return []
    shards = np.searchsorted([record.start for record in records], positions, side="right") - 1
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(shards) != 0)) + 1
    starts = [0, *breaks.tolist()]
    bounds = pairwise([*starts, len(positions)])
    runs = zip(shards[starts].tolist(), positions[starts].tolist(), bounds, strict=True)
    return [(records[i], first - records[i].start, start, stop) for i, first, (start, stop) in runs]


def _check_rows(
    shard: Shard, record: ShardRecord, fingerprint: str, index: Positions, labels: HardTargets | None
) -> None:
    """Check that a shard is of this place of this cache, and that its rows are of these images.

    Args:
        shard: The open shard.
        record: Of the shard in the manifest.
        fingerprint: Of the cache.
        index: int64 [rows] of the images that the rows must be of.
        labels: The hard targets of the split's N images; None where the data are not known.
    """
    expected = {"fingerprint": fingerprint, "split": record.split, "draw": record.draw, "start": record.start}
    for key, value in expected.items():
        if (attribute := shard.attributes.get(key)) != value:
            raise CacheError(
                f"{shard.path}: its {key} is {make_printable(attribute)} instead of {value}: a shard of another place"
            )
    if not np.array_equal(shard.read("index"), index):
        raise CacheError(
            f"{shard.path}: its rows are not in the order of this cache: targets would go to other images"
        )
    if labels is None:
        return
    wrong = np.flatnonzero(~are_equal(shard.read("label"), labels[index]))
    if len(wrong):
        first = index[wrong[0]]
        raise CacheError(f"{shard.path}: {len(wrong)} labels are not those of the data, the first at index {first}")


def _check_logits(shard: Shard, record: ShardRecord, codec: Codec, classes: int) -> None:
    """Check that logits are finite, and that they classify as many rows correctly as when they were written."""
    stored = {name: shard.read(name) for name in codec.datasets(classes)}
    labels = shard.read("label")
    rows, correct = max(1, _CHECKED_NUMBERS // classes), 0
    for start in range(0, record.rows, rows):
        part = slice(start, start + rows)
        try:
            logits = codec.decode({name: values[part] for name, values in stored.items()}, classes)
        except ValueError as error:
            raise CacheError(f"{shard.path}: {error}") from None
        if not np.isfinite(logits).all():
            raise CacheError(f"{shard.path}: logits that are not finite")
        if record.correct is not None:  # else of another task than classes
            correct += int((logits.argmax(1) == labels[part]).sum())
    if record.correct is not None and correct != record.correct:
        raise CacheError(
            f"{shard.path}: the top-1 class of its logits is the label of {correct} rows instead of {record.correct}:"
            " rows and logits do not belong together"
        )
