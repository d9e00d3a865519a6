"""Rows of 2 kB, read in shuffled blocks through Cache.rows, against raw reads and against other containers."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.loading.loader import CacheLoader
from softcache.pipeline.loading.order import BLOCK_ROWS, WINDOW_BLOCKS

from . import fixtures
from .interleaved import Found, Given, Missing, Side, interleaved, over, parts, timed

BATCH, CLASSES = 256, 1000  # 1,000 logits in float16 are 2 kB
Rows = NDArray[np.float16]


class _OnDisk:
    """A cache whose draws count as larger than memory."""

    def __init__(self, cache: Cache):
        self.row_order = cache.row_order
        self.read_targets = cache.read_targets

    def fits_in_memory(self, *_: Any) -> bool:
        return False


def cache_of(given: Given) -> tuple[Cache, CacheLoader]:
    """A cache of rows of 2 kB, and the stream that reads it by blocks."""
    data = fixtures.in_memory(given.few(61_225, 1200), channels=1, size=8, classes=CLASSES)
    rows = fixtures.transfer_set(data).splits["train"]
    cache = Cache(fixtures.fake_cache(given.folder / "reads", data))
    source: Any = _OnDisk(cache)
    stream = CacheLoader(rows, cache.views, 0, 0, BATCH, rows.labels, np.arange(len(rows)), cache=source)
    cache.read_rows("train", 0, "logits", np.arange(1))  # opened, and every checksum looked at, once
    return cache, stream


def in_blocks(cache: Cache, stream: CacheLoader) -> Callable[[], int]:
    """An epoch of rows in the order of the stream, a window of 64 blocks of 64 rows at a time. What that order is has
    been found beforehand."""
    orders = cycle([stream.order.shuffle_rows(number) for number in range(8)])

    def work() -> int:
        order, window = next(orders), BLOCK_ROWS * WINDOW_BLOCKS
        for a in range(0, len(order), window):
            rows = torch.from_numpy(cache.read_rows("train", 0, "logits", order[a : a + window]))
            for b in range(0, len(rows), BATCH):
                assert rows[b : b + BATCH].shape[1] == CLASSES
        return len(order)

    return work


def against_raw(given: Given, cold: bool) -> Found:
    """Rows per second of the cache, as a share of those that pass when its files are read from end to end."""
    cache, stream = cache_of(given)
    files = [cache.folder / r.path for r in cache.manifest.shards if r.split == "train" and r.draw == 0]
    buffer, count = bytearray(4 << 20), cache.manifest.splits["train"]

    def raw() -> int:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return count

    def cooled(side: Side) -> Side:
        def turn() -> float:
            for path in files:
                _forget(path)
            return side()

        return turn

    sides = {"raw": timed(raw), "cache": timed(in_blocks(cache, stream))}
    if cold:
        sides = {name: cooled(side) for name, side in sides.items()}
    found = interleaved(sides, given.few(7 if cold else 15, 1))
    return Found(over(found["raw"], found["cache"]), parts(found, 1e6, "us a row"))


def _forget(path: Path) -> None:
    """Out of the page cache; the host of a virtual machine may still have it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def others(given: Given, container: str) -> Found:
    """Rows per second of the cache over those of another container of the same rows, warm, in batches of 256."""
    n = given.few(4000, 300)
    cache, stream = cache_of(given)
    rows = np.asarray(cache.read_rows("train", 0, "logits", np.arange(n)), np.float16)
    folder = given.folder / f"container-{container}"
    folder.mkdir()
    begun = time.perf_counter()
    read = CONTAINERS[container](folder, rows)
    wrote = (time.perf_counter() - begun) / n
    ours = _seconds_of_writing(given)
    sides = {container: timed(lambda: _read_all(read(), n)), "cache": timed(in_blocks(cache, stream))}
    found = interleaved(sides, given.few(5, 1))
    shutil.rmtree(folder)
    said = f"writing {wrote * 1e6:.3g}, the cache with its checks {ours * 1e6:.3g} us a row"
    return Found(over(found[container], found["cache"]), f"reading {parts(found, 1e6, 'us a row')}; {said}")


def _seconds_of_writing(given: Given) -> float:
    """Of a row of the cache, beside rendering and making up what is written: one shard written again."""
    from softcache.pipeline.cache.shards import Shard, write_shard

    cache = Cache(given.folder / "reads")
    record = next(r for r in cache.manifest.shards if r.split == "train")
    arrays = Shard(cache.folder, record.path, cache.manifest.get_layout(record)).read_all()
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        write_shard(given.folder / "again.h5", arrays, {"fingerprint": "0" * 64})
        seconds.append((time.perf_counter() - begun) / record.rows)
    return statistics.median(seconds)


def _read_all(batches: Iterator[torch.Tensor], n: int) -> int:
    seen = sum(len(batch) for batch in batches)
    assert seen == n, (seen, n)
    return n


Read = Callable[[], Iterator[torch.Tensor]]


def _order(n: int) -> list[int]:
    order: list[int] = np.random.default_rng(time.monotonic_ns()).permutation(n).tolist()
    return order


def _batched(rows: Callable[[int], torch.Tensor], n: int) -> Iterator[torch.Tensor]:
    order = _order(n)
    for a in range(0, n, BATCH):
        yield torch.stack([rows(i) for i in order[a : a + BATCH]])


def one_file_each(folder: Path, rows: Rows) -> Read:
    for i, values in enumerate(rows):
        torch.save(torch.from_numpy(values.copy()), folder / f"{i:06d}.pt")

    def row(i: int) -> torch.Tensor:
        found: torch.Tensor = torch.load(folder / f"{i:06d}.pt", weights_only=True)
        return found

    return lambda: _batched(row, len(rows))


class _RowByRow(Dataset[torch.Tensor]):
    def __init__(self, path: Path):
        self.logits = h5py.File(path, "r")["logits"]

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.logits[i])


def hdf5_by_row(folder: Path, rows: Rows) -> Read:
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("logits", data=rows)
    data = _RowByRow(folder / "rows.h5")
    return lambda: iter(DataLoader(data, BATCH, shuffle=True))


def lmdb(folder: Path, rows: Rows) -> Read:
    try:
        import lmdb
    except ImportError:
        raise Missing("lmdb is not there: make bench installs it") from None
    env = lmdb.open(str(folder), map_size=4 * rows.nbytes + (64 << 20), readahead=False)
    with env.begin(write=True) as write:
        for i, row in enumerate(rows):
            write.put(i.to_bytes(4, "big"), row.tobytes())

    def read() -> Iterator[torch.Tensor]:
        order = _order(len(rows))
        with env.begin(buffers=True) as txn:
            for a in range(0, len(order), BATCH):
                some = [np.frombuffer(txn.get(i.to_bytes(4, "big")) or b"", np.float16) for i in order[a : a + BATCH]]
                yield torch.from_numpy(np.stack(some))

    return read


def webdataset(folder: Path, rows: Rows) -> Read:
    try:
        import webdataset as wds
    except ImportError:
        raise Missing("webdataset is not there: make bench installs it") from None
    with wds.TarWriter(str(folder / "rows.tar")) as tar:
        for i, row in enumerate(rows):
            tar.write({"__key__": f"{i:06d}", "bin": row.tobytes()})

    def read() -> Iterator[torch.Tensor]:
        samples = wds.WebDataset(str(folder / "rows.tar"), shardshuffle=False).shuffle(1000)
        pairs = samples.map(lambda sample: np.frombuffer(sample["bin"], np.float16))
        yield from pairs.batched(BATCH, collation_fn=lambda some: torch.from_numpy(np.stack(some)))

    return read


CONTAINERS: dict[str, Callable[[Path, Rows], Read]] = {
    "files": one_file_each,
    "hdf5": hdf5_by_row,
    "lmdb": lmdb,
    "webdataset": webdataset,
}
