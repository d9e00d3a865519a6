"""A shard is written while the teacher is asked for the next, and rows are copied once: nothing else changes."""

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
from softcache.stages.teacher_cache.background import BackgroundWriter
from softcache.stages.teacher_cache.targets import TargetGenerator, _store_batch
from tests.helpers.caches import stop_after
from tests.helpers.commands import Stages, tiny_cache_command


def test_one_work_at_a_time_in_order_and_what_it_raises_is_raised_by_the_next_call() -> None:
    done: list[int] = []
    under_way = threading.Semaphore(1)

    def work(number: int) -> None:
        assert under_way.acquire(blocking=False)
        time.sleep(0.01)
        done.append(number)
        under_way.release()
        if number == 3:
            raise OSError("full")

    def all_of_them() -> None:
        with BackgroundWriter() as behind:
            for number in range(10):
                behind.submit(work, number)

    with pytest.raises(OSError, match="full"):
        all_of_them()
    assert done == [0, 1, 2, 3]


def test_left_by_ctrl_c_it_ends_when_the_work_is_done() -> None:
    done: list[str] = []
    begun = threading.Event()

    def work() -> None:
        begun.set()
        time.sleep(0.1)
        done.append("whole")

    def interrupted() -> None:
        with BackgroundWriter() as behind:
            behind.submit(work)
            begun.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["whole"]


def test_what_failed_is_seen_before_the_next_shard_is_done(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full while the teacher is asked for the third shard: that shard is never finished."""
    finished: list[str] = []
    piece, add = TargetGenerator.compute_shard, CacheWriter.write_shard

    def slow(self: TargetGenerator, wanted: ShardSpec, shown: Any) -> Any:
        def patient(rows: int) -> None:
            time.sleep(0.2)
            shown(rows)

        found = piece(self, wanted, patient)
        finished.append(wanted.path)
        return found

    def full(self: CacheWriter, wanted: ShardSpec, arrays: Any, facts: Any) -> None:
        if wanted.start > 0:
            raise OSError(28, "No space left on device")
        add(self, wanted, arrays, facts)

    monkeypatch.setattr(TargetGenerator, "compute_shard", slow)
    monkeypatch.setattr(CacheWriter, "write_shard", full)
    assert "No space left on device" in stages.fails(1, *tiny_cache_command(tiny)[:-1], tmp_path / "c")
    assert len(finished) == 2
    assert [path.name for path in sorted((tmp_path / "c").rglob("*.h5"))] == ["shard-00000.h5"]


def test_shards_are_noted_in_their_order_though_some_are_there(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*tiny_cache_command(tiny)[:-1], tmp_path / "c"]
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        stages.fails(130, *command)
    for path in ("draw-000/shard-00001.h5", "draw-001/shard-00000.h5"):
        (tmp_path / "c" / path).unlink()
    stages(*command)
    found, wanted = ([s.path for s in read_manifest(c).shards] for c in (tmp_path / "c", tiny / "cache"))
    assert found == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_bits_that_numpy_would_have_made_of_them(dtype: torch.dtype) -> None:
    """float16 of maps in either layout, from the smallest numbers to the largest that is kept."""
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
def test_one_value_that_cannot_be_kept_is_found_and_said(bad: float) -> None:
    """65,505 would be rounded to 65,504 without a word."""
    values = torch.zeros(4, 3)
    values[2, 1] = bad
    piece = ShardSpec("p", "train", 5, 0, 4, {})
    with pytest.raises(CacheError, match=rf"train index 12, draw 5 is {bad}: it cannot be stored \(largest 65504\)"):
        _store_batch(values, np.empty((4, 3), np.float16), 65504.0, piece, np.arange(10, 14), "output")
