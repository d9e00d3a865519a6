"""What a cache takes on disk, and its reader in memory."""

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
from softcache.pipeline.cache.reader import Cache
from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.student.phases import make_training_run

from . import fixtures
from .interleaved import Found, Given, Missing

WIDE = {"wide": [4096]}  # 8 kB a row in float16


def _views(cache: Cache) -> int:
    return sum(n * (cache.manifest.draws if split == "train" else 1) for split, n in cache.manifest.splits.items())


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def made(given: Given, rows: int, classes: int, codec: str = "float16") -> Cache:
    """A cache of so many rows, with nothing but logits."""
    data = fixtures.in_memory(given.few(rows, 2 * classes + 400), channels=1, size=8, classes=classes)
    return Cache(fixtures.fake_cache(given.folder / f"rows-{rows}-{classes}-{codec}", data, codec=codec))


def bytes_per_view(given: Given, classes: int, codec: str = "float16") -> Found:
    """Every file of a cache of some 100,000 rows, by the views in it."""
    cache = made(given, 100_000, classes, codec)
    size, views = _on_disk(cache.folder), _views(cache)
    return Found(
        [size / views], f"{size:,} bytes of {views:,} views, {count_row_bytes(cache.manifest.datasets)} a row"
    )


def overhead(given: Given) -> Found:
    """What is not rows, as a share of the rows, with 10 classes, where it is largest."""
    cache = made(given, 100_000, 10)
    payload = _views(cache) * count_row_bytes(cache.manifest.datasets)
    size = _on_disk(cache.folder)
    return Found([100 * (size - payload) / payload], f"{size - payload:,} bytes beside {payload:,}")


def index_memory(given: Given) -> Found:
    """MiB that an open cache of 1.28 million rows keeps: order, labels of the rows, manifest; no row itself."""
    data = fixtures.in_memory(given.few(1_306_123, 1000), channels=1, size=8)
    folder = fixtures.fake_cache(given.folder / "long", data)
    shown = fixtures.transfer_set(data)
    tracemalloc.start()
    try:
        cache = Cache(folder)
        cache.check_transfer_set(shown)
        cache.row_order("train")
        cache.read_stored("train", 0, np.arange(128))
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return Found([kept / 2**20], f"{kept:,} bytes of {cache.manifest.splits['train']:,} rows")


def memory(given: Given, gigabytes: float) -> Found:
    """Peak MiB of stage two over a cache that is read from disk, above the model and the images; its own process."""
    rows = given.few(round(gigabytes * 1e9 / 8192), 1000)
    room = shutil.disk_usage(given.folder).free
    if room < 1.2e9 * gigabytes:
        raise Missing(f"{gigabytes:g} GB of rows do not fit: {room / 1e9:.0f} GB are free at {given.folder}")
    begun = time.perf_counter()
    data = fixtures.in_memory(rows, channels=1, size=8)
    cache = fixtures.fake_cache(given.folder / "wide", data, taps=WIDE)
    size, wrote = _on_disk(cache), time.perf_counter() - begun
    try:
        command = [sys.executable, "-m", "bench.footprint", str(cache), str(rows), str(given.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise Missing((done.stderr.strip().splitlines() or ["its process failed"])[-1][:120])
        seen = json.loads(done.stdout)
    finally:
        shutil.rmtree(cache)
    return Found(
        [(seen["peak"] - seen["before"]) / 2**20],
        f"{size / 1e9:.1f} GB, written in {wrote:.0f} s, one epoch in {seen['seconds']:.0f} s, of"
        f" {seen['before'] / 2**20:.0f} MiB before",
    )


def _resident() -> tuple[int, int]:
    """Bytes of this process in memory: now, and at most so far."""
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if "VmRSS" in line or "VmHWM" in line
    )
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024


def _epoch(cache: Path, rows: int, folder: Path) -> dict[str, float]:
    """An epoch of a small student that reads every row with its 8 kB; memory before the cache is opened, and at most.

    Before: PyTorch, the images, the model and a step of it.
    """
    data = fixtures.in_memory(rows, channels=1, size=8)
    shown: object = fixtures.transfer_set(data)
    from softcache.pipeline.models import build

    network = build("mlp:64", 10, 1, 8)
    network(torch.zeros(1024, 1, 8, 8)).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the images
    before = _resident()[0]
    del shown
    fixtures.transfer_set.cache_clear()  # they are read again below
    from .student import Ours

    config, opened = fixtures.opened(cache, data, "mlp:64", batch_size=1024)
    labels = opened.transfer_set.splits["train"].labels
    ours = make_training_run("student", config, opened, network, opened.losses, labels, folder / "memory-run")
    ours = replace(ours, stream=replace(ours.stream, taps=tuple(WIDE)))
    begun = time.perf_counter()
    Ours(ours, ours.steps)()
    return {"before": before, "peak": _resident()[1], "seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    keep_large_blocks()  # as `stages` does
    print(json.dumps(_epoch(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
