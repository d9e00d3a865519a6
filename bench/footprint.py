"""Rows about bytes: what a cache takes on disk, and what its reader takes in memory.

`python -m bench.footprint CACHE ROWS FOLDER` is the process that `measure_peak_memory` starts: it reads CACHE for one
epoch and prints what that took in memory, as JSON.
"""

import json
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from softcache.pipeline.cache.manifest import count_row_bytes
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.student.phases import make_training_run

from . import fixtures
from .measurement import BenchOptions, Measurement, NotMeasurable
from .student import TrainingLoop

WIDE = {"wide": [4096]}  # 8 kB a row in float16


def measure_bytes_per_view(
    options: BenchOptions, classes: int, codec: str = "float16", rows: int = 100_000
) -> Measurement:
    """Size of all files of a cache of logits / number of its views, of so many rows or a little more."""
    cache = _write_cache(options, classes, codec, rows)
    size, views = _count_bytes(cache.folder), cache.manifest.count_views()
    row_bytes = count_row_bytes(cache.manifest.datasets)
    return Measurement([size / views], f"{size:,} bytes of {views:,} views, {row_bytes} a row")


def measure_overhead(options: BenchOptions) -> Measurement:
    """Bytes that are no rows, in per cent of the rows; with 10 classes, where the share is largest."""
    cache = _write_cache(options, classes=10)
    row_bytes = cache.manifest.count_views() * count_row_bytes(cache.manifest.datasets)
    overhead = _count_bytes(cache.folder) - row_bytes
    return Measurement([100 * overhead / row_bytes], f"{overhead:,} bytes beside {row_bytes:,}")


def measure_index_memory(options: BenchOptions) -> Measurement:
    """MiB that an open cache of 1.28 million rows keeps: order and labels of the rows and the manifest, but no row."""
    data = fixtures.add_data_set(options.scale(1_306_123, 1000), channels=1, size=8)
    folder = fixtures.write_random_cache(options.folder / "long", data)
    transfer_set = fixtures.load_data(data)
    tracemalloc.start()
    try:
        cache = CacheReader(folder)
        cache.check_transfer_set(transfer_set)
        cache.row_order("train")
        cache.read_stored("train", 0, np.arange(128))
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return Measurement([allocated / 2**20], f"{allocated:,} bytes of {cache.manifest.splits['train']:,} rows")


def measure_peak_memory(options: BenchOptions, gigabytes: float) -> Measurement:
    """Peak MiB of stage two above model and images, while it reads every row of a cache from disk.

    Args:
        options: of the benchmark.
        gigabytes: size of the cache.

    Raises:
        NotMeasurable: when the disk has too little space, or the process that trains fails.
    """
    rows = options.scale(round(gigabytes * 1e9 / 8192), 1000)
    free = shutil.disk_usage(options.folder).free
    if free < 1.2e9 * gigabytes:
        raise NotMeasurable(f"{gigabytes:g} GB of rows do not fit: {free / 1e9:.0f} GB are free at {options.folder}")
    start = time.perf_counter()
    data = fixtures.add_data_set(rows, channels=1, size=8)
    cache = fixtures.write_random_cache(options.folder / "wide", data, taps=WIDE)
    size, write_seconds = _count_bytes(cache), time.perf_counter() - start
    try:
        command = [sys.executable, "-m", "bench.footprint", str(cache), str(rows), str(options.folder)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if process.returncode:
            raise NotMeasurable((process.stderr.strip().splitlines() or ["its process failed"])[-1][:120])
        epoch = json.loads(process.stdout)
    finally:
        shutil.rmtree(cache)
    return Measurement(
        [(epoch["peak"] - epoch["before"]) / 2**20],
        f"{size / 1e9:.1f} GB, written in {write_seconds:.0f} s, one epoch in {epoch['seconds']:.0f} s, of"
        f" {epoch['before'] / 2**20:.0f} MiB before",
    )


def _write_cache(options: BenchOptions, classes: int, codec: str = "float16", rows: int = 100_000) -> CacheReader:
    """Write a cache of so many training rows with nothing but logits."""
    rows = options.scale(rows, min(rows, 2 * classes + 400))
    data = fixtures.add_data_set(rows, channels=1, size=8, classes=classes)
    folder = options.folder / f"rows-{rows}-{classes}-{codec.replace(':', '')}"
    return CacheReader(fixtures.write_random_cache(folder, data, codec=codec))


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _run_epoch(cache: Path, rows: int, folder: Path) -> dict[str, float]:
    """Train a small student for one epoch that reads every row with its 8 kB.

    Returns:
        Bytes of this process before the cache is opened (with PyTorch, the images, the model and a step of it) and at
        the peak, and the seconds of the epoch.
    """
    data = fixtures.add_data_set(rows, channels=1, size=8)
    transfer_set: object = fixtures.load_data(data)
    network = build("mlp:64", 10, 1, 8)
    network(torch.zeros(1024, 1, 8, 8)).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which so far is that of making the images
    before = read_memory("VmRSS")
    del transfer_set
    fixtures.load_data.cache_clear()  # the images are loaded again below
    config, setup = fixtures.open_setup(cache, data, "mlp:64", batch_size=1024)
    labels = setup.transfer_set.splits["train"].labels
    run = make_training_run("student", config, setup, network, setup.losses, labels, folder / "memory-run")
    run = replace(run, stream=replace(run.stream, taps=tuple(WIDE)))
    start = time.perf_counter()
    TrainingLoop(run, run.steps)()
    return {"before": before, "peak": read_memory("VmHWM"), "seconds": time.perf_counter() - start}


def read_memory(field: str) -> int:
    """Return bytes of this process in memory: VmRSS is now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024


if __name__ == "__main__":
    keep_large_blocks()  # as the commands of softcache do
    print(json.dumps(_run_epoch(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
