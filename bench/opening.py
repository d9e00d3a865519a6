"""Rows about opening very large caches, which are made up: a manifest with all shards, sparse files in their place,
and rows in those shards alone that the first batch reads.

`python -m bench.opening CACHE` is the process that `measure_opening` starts: it opens CACHE and reads its first batch,
and prints what that took, as JSON.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from softcache.pipeline.cache.codecs import CODECS, FIDELITY, measure_fidelity
from softcache.pipeline.cache.manifest import Manifest, ShardRecord, ShardSpec, count_row_bytes
from softcache.pipeline.cache.plan import CachePlan
from softcache.pipeline.cache.reader import RESIDENT_BYTES, CacheReader
from softcache.pipeline.cache.rows import make_row_order
from softcache.pipeline.cache.writer import CacheWriter
from softcache.pipeline.loading.groups import TargetWindow
from softcache.pipeline.loading.order import BLOCK_ROWS, WINDOW_BLOCKS, EpochOrder

from .footprint import read_memory
from .measurement import BenchOptions, Measurement, NotMeasurable

CLASSES, DRAWS, BATCH, SEED = 20, 90, 256, 0
_SPARSE_OVERHEAD = 4096  # bytes of a sparse file beside its rows


def measure_opening(options: BenchOptions, rows: int, value: str) -> Measurement:
    """Open a made-up cache of so many rows in 90 draws in a process of its own, and read its first batch.

    Args:
        options: of the benchmark.
        rows: training rows.
        value: "open": seconds until the cache is open and the order of its rows known; "first": seconds from there to
            the first batch; "memory": the most MiB above the imports until it is open.

    Raises:
        NotMeasurable: when the process fails.
    """
    cache = make_large_cache(options.folder / f"large-{rows}", options.scale(rows, 300_000), options.scale(DRAWS, 2))
    command = [sys.executable, "-m", "bench.opening", str(cache)]
    turns = []
    for _ in range(options.scale(3, 1)):
        process = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if process.returncode:
            raise NotMeasurable((process.stderr.strip().splitlines() or ["its process failed"])[-1][:120])
        turns.append(json.loads(process.stdout))
    turn = turns[-1]
    return Measurement(
        [turn[value] for turn in turns],
        f"{turn['shards']:,} shards, manifest of {turn['manifest'] / 1e6:.1f} MB; open in {turn['open']:.1f} s with"
        f" {turn['memory']:.0f} MiB, first batch {turn['first']:.1f} s later with {turn['first_memory']:.0f} MiB",
    )


def make_large_cache(folder: Path, rows: int, draws: int) -> Path:
    """Make up a cache of random logits, unless it is there, and return its folder."""
    if (folder / "manifest.json").exists():
        return folder
    splits = {"train": rows, "val": 1000}
    plan = CachePlan(_make_identity(), CLASSES, draws, splits, {})
    writer = CacheWriter.examine(folder, plan)
    order = {split: make_row_order(SEED, split, count) for split, count in splits.items()}
    draw, positions = _find_first_rows(rows, draws)
    row_bytes = count_row_bytes(writer.missing[0].datasets)
    if rows * row_bytes <= RESIDENT_BYTES:  # the draw is read whole
        positions = np.arange(rows)
    records = []
    for spec in writer.missing:
        path = folder / spec.path
        path.parent.mkdir(parents=True, exist_ok=True)
        is_read = (spec.split, spec.draw) == ("train", draw)
        if is_read and ((positions >= spec.start) & (positions < spec.start + spec.rows)).any():
            _write_rows(writer, spec, order[spec.split])
            records.append(writer.records[-1])
        else:
            size = spec.rows * row_bytes + _SPARSE_OVERHEAD
            with open(path, "wb") as file:
                os.truncate(file.fileno(), size)
            names = list(spec.datasets)
            place = (spec.path, spec.split, spec.draw, spec.start, spec.rows)
            records.append(ShardRecord(*place, size, "0" * 32, "0" * 32, 0, names))
    fidelity = dict.fromkeys(("rows", *FIDELITY["classes"]), 0.0)
    teacher = {split: {"accuracy": None} for split in splits}
    Manifest(plan.identity, CLASSES, draws, splits, {}, tuple(records), None, teacher, fidelity, 0.0).write(folder)
    return folder


def _make_identity() -> dict[str, Any]:
    return {
        "format": 1,
        "transfer_set": {
            "name": "folder",
            "classes": [f"c{i}" for i in range(CLASSES)],
            "content": {"train": "0" * 64, "val": "0" * 64},
            "cut": {"val_fraction": 0.1, "seed": SEED, "train_size": 0},
        },
        "views": {"policy": "none", "size": 8, "resize": 0, "mixup": 0.0, "seed": SEED},
        "teacher": {
            "arch": "resnet56", "weights": "0" * 64, "channels": 1, "size": 8, "mean": [0.5], "std": [0.25],
        },
        "codec": "float16",
        "precision": "float32",
    }  # fmt: skip


def _make_epoch_order(cache: Any, rows: int, draws: int) -> EpochOrder:
    return EpochOrder(SEED, np.arange(rows), np.zeros(0, np.int64), BATCH, draws, 1, "", cache)


class _OnDisk:
    """In place of a cache, for the order of one whose draws do not fit in memory."""

    def fits_in_memory(self, *_: object) -> bool:
        return False


def _find_first_rows(rows: int, draws: int) -> tuple[int, np.ndarray[Any, Any]]:
    """Find the draw of the first epoch and the positions of its first window."""
    (draw,), batches = next(_make_epoch_order(_OnDisk(), rows, draws).batches(0, BLOCK_ROWS * WINDOW_BLOCKS // BATCH))
    return draw, np.concatenate(batches)


def _write_rows(writer: CacheWriter, spec: ShardSpec, order: np.ndarray[Any, Any]) -> None:
    """Write a shard with random logits."""
    logits = np.random.default_rng(spec.start).standard_normal((spec.rows, CLASSES), np.float32)
    index = order[spec.start : spec.start + spec.rows].astype("<u4")
    labels = (index % CLASSES).astype("<i4")
    stored = CODECS["float16"].encode(logits, index.astype(np.uint64))
    correct = int((CODECS["float16"].decode(stored, logits.shape[1]).argmax(1) == labels).sum())
    arrays = {**stored, "index": index, "label": labels, "view_crc32": np.zeros(spec.rows, "<u4")}
    writer.write_shard(spec, arrays, {"seconds": 0.0, "correct": correct, **measure_fidelity(logits[:9], logits[:9])})


def _open_and_read(folder: Path) -> dict[str, float]:
    """Open a cache, find the order of its rows, and read the targets of the first window of an epoch."""
    before = read_memory("VmRSS")
    start = time.perf_counter()
    cache = CacheReader(folder)
    cache.index_at("train", np.arange(1))
    opened, memory = time.perf_counter(), read_memory("VmHWM")
    order = _make_epoch_order(cache, cache.manifest.splits["train"], cache.manifest.draws)
    draws, batches = next(order.batches(0, order.steps_per_epoch))
    window = TargetWindow(cache, (), draws, np.concatenate(batches[: BLOCK_ROWS * WINDOW_BLOCKS // BATCH]), "train")
    logits, _ = window.read(0, BATCH)
    assert logits is not None
    return {
        "open": opened - start,
        "first": time.perf_counter() - opened,
        "memory": (memory - before) / 2**20,
        "first_memory": (read_memory("VmHWM") - before) / 2**20,
        "shards": len(cache.manifest.shards),
        "manifest": (folder / "manifest.json").stat().st_size,
    }


if __name__ == "__main__":
    print(json.dumps(_open_and_read(Path(sys.argv[1]))))
