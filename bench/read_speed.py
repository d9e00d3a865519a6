"""Rows about reading: stored rows of 2 kB in shuffled blocks, against raw reads and against other containers."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.shards import Shard, write_shard
from softcache.pipeline.loading.order import BLOCK_ROWS, WINDOW_BLOCKS, EpochOrder
from softcache.pipeline.loading.stream import BatchStream

from . import fixtures
from .measurement import BenchOptions, Measurement, NotMeasurable
from .timing import Contender, divide, format_medians, make_contender, time_in_turns

BATCH, CLASSES = 256, 1000  # 1,000 logits in float16 are 2 kB
Rows = NDArray[np.float16]
ReadAll = Callable[[], Iterator[torch.Tensor]]  # reads all rows once, in shuffled batches


class _OnDiskCache(CacheReader):
    """A cache whose draws count as larger than memory, so that a stream reads it by blocks."""

    def fits_in_memory(self, *_: object, **__: object) -> bool:
        return False


def compare_with_raw_reads(options: BenchOptions, drop_page_cache: bool) -> Measurement:
    """Rows per second of the cache / rows per second that pass when its files are read from end to end.

    Args:
        options: of the benchmark.
        drop_page_cache: before each turn, the operating system drops the files from memory.
    """
    cache, stream = _write_cache(options)
    files = [cache.folder / r.path for r in cache.manifest.shards if r.split == "train" and r.draw == 0]
    buffer, rows = bytearray(4 << 20), cache.manifest.splits["train"]

    def read_raw() -> int:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return rows

    def drop_pages_first(contender: Contender) -> Contender:
        def take_turn() -> float:
            for path in files:
                _drop_pages(path)
            return contender()

        return take_turn

    contenders = {"raw": make_contender(read_raw), "cache": make_contender(_make_block_reader(cache, stream))}
    if drop_page_cache:
        contenders = {name: drop_pages_first(contender) for name, contender in contenders.items()}
    seconds = time_in_turns(contenders, options.scale(7 if drop_page_cache else 15, 1))
    return Measurement(divide(seconds["raw"], seconds["cache"]), format_medians(seconds, 1e6, "us a row"))


def compare_with_container(options: BenchOptions, container: str) -> Measurement:
    """Time of reading rows from another container / from the cache; warm, in batches of 256.

    Args:
        options: of the benchmark.
        container: key of CONTAINERS.
    """
    n = options.scale(4000, 300)
    cache, stream = _write_cache(options)
    rows = np.asarray(cache.read_rows("train", 0, "logits", np.arange(n)), np.float16)
    folder = options.folder / f"container-{container}"
    folder.mkdir()
    start = time.perf_counter()
    read_all = CONTAINERS[container](folder, rows)
    write_seconds = (time.perf_counter() - start) / n

    def read_container() -> int:
        count = sum(len(batch) for batch in read_all())
        assert count == n, (count, n)
        return n

    contenders = {
        container: make_contender(read_container),
        "cache": make_contender(_make_block_reader(cache, stream)),
    }
    cache_write_seconds = _time_shard_writing(options)
    seconds = time_in_turns(contenders, options.scale(5, 1))
    shutil.rmtree(folder)
    writing = f"{write_seconds * 1e6:.3g}, the cache with its checks {cache_write_seconds * 1e6:.3g} us a row"
    return Measurement(
        divide(seconds[container], seconds["cache"]),
        f"reading {format_medians(seconds, 1e6, 'us a row')}; writing {writing}",
    )


def _write_cache(options: BenchOptions) -> tuple[CacheReader, BatchStream]:
    """Write a cache of rows of 2 kB; return it and a stream that reads it by blocks."""
    data = fixtures.add_data_set(options.scale(61_225, 1200), channels=1, size=8, classes=CLASSES)
    rows = fixtures.load_data(data).splits["train"]
    folder = fixtures.write_random_cache(options.folder / "reads", data)
    cache, on_disk = CacheReader(folder), _OnDiskCache(folder)
    stream = BatchStream(rows, cache.views, 0, 0, BATCH, rows.labels, np.arange(len(rows)), cache=on_disk)
    cache.read_rows("train", 0, "logits", np.arange(1))  # opens the files and verifies every checksum, once
    return cache, stream


def _make_block_reader(cache: CacheReader, stream: BatchStream) -> Callable[[], int]:
    """Return a function that reads an epoch of rows in the stream's order, a window of 64 blocks of 64 rows at a time.

    The orders are computed here, so that they are not timed.
    """
    assert isinstance(stream.order, EpochOrder)
    orders = cycle([stream.order.shuffle_rows(lap) for lap in range(8)])

    def read_epoch() -> int:
        order, window = next(orders), BLOCK_ROWS * WINDOW_BLOCKS
        for start in range(0, len(order), window):
            rows = torch.from_numpy(cache.read_rows("train", 0, "logits", order[start : start + window]))
            for first in range(0, len(rows), BATCH):
                assert rows[first : first + BATCH].shape[1] == CLASSES
        return len(order)

    return read_epoch


def _drop_pages(path: Path) -> None:
    """Drop a file from the page cache. The host of a virtual machine may still have it in memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _time_shard_writing(options: BenchOptions) -> float:
    """Return the seconds per row of writing a shard once more; its rows are rendered and drawn before."""
    cache = CacheReader(options.folder / "reads")
    record = next(r for r in cache.manifest.shards if r.split == "train")
    arrays = Shard(cache.folder, record.path, cache.manifest.get_layout(record)).read_all()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        write_shard(options.folder / "again.h5", arrays, {"fingerprint": "0" * 64})
        seconds.append((time.perf_counter() - start) / record.rows)
    return statistics.median(seconds)


# Other containers: each function writes rows into an empty folder and returns how to read them.


def _write_files(folder: Path, rows: Rows) -> ReadAll:
    """A file per row, by torch.save."""
    for i, values in enumerate(rows):
        torch.save(torch.from_numpy(values.copy()), folder / f"{i:06d}.pt")

    def read_all() -> Iterator[torch.Tensor]:
        order = _shuffle(len(rows))
        for start in range(0, len(rows), BATCH):
            paths = [folder / f"{i:06d}.pt" for i in order[start : start + BATCH]]
            yield torch.stack([torch.load(path, weights_only=True) for path in paths])

    return read_all


class _HDF5Rows(Dataset[torch.Tensor]):
    def __init__(self, path: Path):
        self.logits = h5py.File(path, "r")["logits"]

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.logits[i])


def _write_hdf5(folder: Path, rows: Rows) -> ReadAll:
    """An HDF5 file, read row by row in a DataLoader."""
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("logits", data=rows)
    data = _HDF5Rows(folder / "rows.h5")
    return lambda: iter(DataLoader(data, BATCH, shuffle=True))


def _write_lmdb(folder: Path, rows: Rows) -> ReadAll:
    """An LMDB environment, a key per row."""
    try:
        import lmdb
    except ImportError:
        raise NotMeasurable("lmdb is not installed: make bench installs it") from None
    env = lmdb.open(str(folder), map_size=4 * rows.nbytes + (64 << 20), readahead=False)
    with env.begin(write=True) as transaction:
        for i, row in enumerate(rows):
            transaction.put(i.to_bytes(4, "big"), row.tobytes())

    def read_all() -> Iterator[torch.Tensor]:
        order = _shuffle(len(rows))
        with env.begin(buffers=True) as transaction:
            for start in range(0, len(order), BATCH):
                keys = [i.to_bytes(4, "big") for i in order[start : start + BATCH]]
                yield torch.from_numpy(np.stack([np.frombuffer(transaction.get(k) or b"", np.float16) for k in keys]))

    return read_all


def _write_webdataset(folder: Path, rows: Rows) -> ReadAll:
    """A tar of webdataset, shuffled in a buffer of 1,000 rows."""
    try:
        import webdataset as wds
    except ImportError:
        raise NotMeasurable("webdataset is not installed: make bench installs it") from None
    with wds.TarWriter(str(folder / "rows.tar")) as tar:
        for i, row in enumerate(rows):
            tar.write({"__key__": f"{i:06d}", "bin": row.tobytes()})

    def read_all() -> Iterator[torch.Tensor]:
        samples = wds.WebDataset(str(folder / "rows.tar"), shardshuffle=False).shuffle(1000)
        decoded = samples.map(lambda sample: np.frombuffer(sample["bin"], np.float16))
        yield from decoded.batched(BATCH, collation_fn=lambda batch: torch.from_numpy(np.stack(batch)))

    return read_all


def _shuffle(n: int) -> list[int]:
    """Return the numbers below n in an order that is new in every call."""
    order: list[int] = np.random.default_rng(time.monotonic_ns()).permutation(n).tolist()
    return order


CONTAINERS: dict[str, Callable[[Path, Rows], ReadAll]] = {
    "files": _write_files,
    "hdf5": _write_hdf5,
    "lmdb": _write_lmdb,
    "webdataset": _write_webdataset,
}
