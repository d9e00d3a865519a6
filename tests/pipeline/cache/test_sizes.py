"""What a writer and a reader hold in memory is what `sizes.py` computes."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from softcache.pipeline.cache.manifest import list_datasets
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.sizes import estimate_reader_memory, estimate_writer_memory, measure_size
from tests.helpers.paths import ROOT

WRITER = """
import json, sys
import numpy as np
from pathlib import Path
from bench.footprint import read_memory
from softcache.pipeline.cache.codecs import CODECS
from softcache.pipeline.cache.shards import write_shard
from softcache.stages.teacher_cache.encoding import encode_targets
from softcache.stages.teacher_cache.writing import BackgroundWriter

codec, rows, classes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
labels, keys = np.zeros(rows, np.int64), np.zeros(rows, np.uint64)
encode_targets(CODECS[codec], np.zeros((9, classes), np.float32), keys[:9], labels[:9], "classes")
before = read_memory("VmRSS")
with BackgroundWriter() as background:
    for k in range(3):
        logits = np.full((rows, classes), k + 0.5, np.float32)
        logits[:, 0] = -k
        arrays = encode_targets(CODECS[codec], logits, keys, labels, "classes")[0]
        del logits
        background.submit(write_shard, Path(f"{k}.h5"), arrays, {"draw": k})
print(json.dumps(read_memory("VmHWM") - before))
"""


@pytest.mark.parametrize("codec", ["float16", "sqrt8"])
def test_the_memory_of_the_writer_is_bounded(codec: str, tmp_path: Path) -> None:
    rows, classes = 16_384, 1000
    datasets = list_datasets(classes, codec, {})
    size = measure_size(datasets, {"train": rows}, 3, task="classes", shard_rows=rows)
    command = [sys.executable, "-c", WRITER, codec, str(rows), str(classes)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured, computed = json.loads(done.stdout), estimate_writer_memory(size, classes)
    assert 0.4 * computed < measured < 1.1 * computed


def test_the_memory_of_the_reader_is_as_computed(tmp_path: Path) -> None:
    from bench.opening import CLASSES, make_large_cache
    from softcache.pipeline.loading.order import EpochOrder

    rows = 600_000
    folder = make_large_cache(tmp_path / "large", rows, 40)
    tracemalloc.start()
    try:
        cache = CacheReader(folder)
        order = EpochOrder(0, np.arange(rows), np.zeros(0, np.int64), 256, 40, 1, "", cache)
        (draw,), batches = next(order.batches(0, 16))
        cache.read_targets("train", draw, np.concatenate(batches))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    manifest = cache.manifest
    size = measure_size(manifest.datasets, manifest.splits, 40, task="classes", classes=CLASSES)
    assert size.shards == len(manifest.shards)
    computed = estimate_reader_memory(size, manifest.datasets, rows, CLASSES)
    not_read = rows * (2 * CLASSES + 4 + 4)  # the other draw, and the checksums of this one
    assert held == pytest.approx(computed - not_read, rel=0.2)
