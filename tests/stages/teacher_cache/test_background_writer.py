"""Shards are written in the background while the teacher computes the next one, in order and to the same bits."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.base.errors import CacheError
from softcache.pipeline.cache.manifest import ShardSpec
from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.pipeline.cache.writer import CacheWriter
from softcache.stages.teacher_cache.targets import TargetGenerator, _store_batch
from softcache.stages.teacher_cache.writing import BackgroundWriter
from tests.helpers.caches import interrupt_after_shards
from tests.helpers.commands import Stages, tiny_cache_command


def test_one_task_runs_at_a_time_in_order_and_its_error_is_raised_by_the_next_call() -> None:
    done: list[int] = []
    slot = threading.Semaphore(1)

    def work(number: int) -> None:
        assert slot.acquire(blocking=False)
        time.sleep(0.01)
        done.append(number)
        slot.release()
        if number == 3:
            raise OSError("full")

    def submit_all() -> None:
        with BackgroundWriter() as writer:
            for number in range(10):
                writer.submit(work, number)

    with pytest.raises(OSError, match="full"):
        submit_all()
    assert done == [0, 1, 2, 3]


def test_after_ctrl_c_the_task_in_progress_is_finished() -> None:
    done: list[str] = []
    started = threading.Event()

    def work() -> None:
        started.set()
        time.sleep(0.1)
        done.append("task")

    def interrupt() -> None:
        with BackgroundWriter() as writer:
            writer.submit(work)
            started.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert done == ["task"]


def test_an_error_is_raised_before_the_next_shard_is_finished(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while the teacher computes the third shard: that shard is never finished."""
    finished: list[str] = []
    compute_shard, write_shard = TargetGenerator.compute_shard, CacheWriter.write_shard

    def compute_slowly(self: TargetGenerator, spec: ShardSpec, on_progress: Any) -> Any:
        def wait(rows: int) -> None:
            time.sleep(0.2)
            on_progress(rows)

        computed = compute_shard(self, spec, wait)
        finished.append(spec.path)
        return computed

    def write_to_full_disk(self: CacheWriter, spec: ShardSpec, arrays: Any, measurements: Any) -> None:
        if spec.start > 0:
            raise OSError(28, "No space left on device")
        write_shard(self, spec, arrays, measurements)

    monkeypatch.setattr(TargetGenerator, "compute_shard", compute_slowly)
    monkeypatch.setattr(CacheWriter, "write_shard", write_to_full_disk)
    assert "No space left on device" in stages.fails(1, *tiny_cache_command(tiny)[:-1], tmp_path / "c")
    assert len(finished) == 2
    assert [path.name for path in sorted((tmp_path / "c").rglob("*.h5"))] == ["shard-00000.h5"]


def test_shards_are_listed_in_order_when_some_of_them_exist_already(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*tiny_cache_command(tiny)[:-1], tmp_path / "c"]
    with monkeypatch.context() as patch:
        interrupt_after_shards(5, patch)
        stages.fails(130, *command)
    for path in ("draw-000/shard-00001.h5", "draw-001/shard-00000.h5"):
        (tmp_path / "c" / path).unlink()
    stages(*command)
    paths, expected = ([s.path for s in read_manifest(c).shards] for c in (tmp_path / "c", tiny / "cache"))
    assert paths == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_rows_have_the_bits_of_numpys_conversion(dtype: torch.dtype) -> None:
    """float16 of maps in either layout, from the smallest numbers to the largest that can be stored."""
    values = torch.randn(7, 5, 4, 3, generator=torch.Generator().manual_seed(0)).mul(1e-4).exp2().sub(1)
    values.view(-1)[:6] = torch.tensor([0.0, -0.0, 6e-8, -65504.0, 65504.0, 1e-9])
    values = values.to(dtype).clamp(
        -65504 if dtype == torch.float32 else -65280, 65504 if dtype == torch.float32 else 65280
    )
    for x in (values, values.contiguous(memory_format=torch.channels_last)):
        rows = np.empty(x.shape, np.float16)
        _store_batch(x, rows, 65504.0, ShardSpec("p", "train", 0, 0, 7, {}), np.arange(7), "output")
        assert rows.tobytes() == x.float().contiguous().numpy().astype(np.float16).tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 65505.0, -70000.0])
def test_a_value_that_cannot_be_stored_is_named(bad: float) -> None:
    """65,505 would be rounded to 65,504 without notice."""
    values = torch.zeros(4, 3)
    values[2, 1] = bad
    spec = ShardSpec("p", "train", 5, 0, 4, {})
    reason = r"it cannot be stored \(largest 65504\)" if np.isfinite(bad) else "it is not a finite number"
    with pytest.raises(CacheError, match=rf"train index 12, draw 5 is {bad}: {reason}"):
        _store_batch(values, np.empty((4, 3), np.float16), 65504.0, spec, np.arange(10, 14), "output")
