"""Work that is done as often as needed and no oftener: opening files, reading bytes, copying, running the teacher."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.data.transfer_set import TransferSet, load_transfer_set
from softcache.pipeline.cache import reader
from softcache.pipeline.cache.manifest import ShardSpec
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.loading.stream import BatchStream
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import CacheConfig, CheckConfig
from softcache.stages.teacher_cache.inference import TeacherInference
from softcache.stages.teacher_cache.targets import TargetGenerator
from softcache.stages.teacher_cache.teachers.cache_teacher import load_cache_teacher
from tests.helpers.commands import Stages

_opened: list[str] | None = None


def _record_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_record_open)  # a hook cannot be removed: it does nothing outside record_opened_files


@contextmanager
def record_opened_files() -> Iterator[list[str]]:
    """The names of the files that this process opens, in whatever way."""
    global _opened
    _opened = names = []
    try:
        yield names
    finally:
        _opened = None


@contextmanager
def record_bytes_read(patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes that each read by offset returns; the reader reads rows in no other way."""
    counts: list[int] = []
    preadv = os.preadv

    def recording_preadv(*arguments: Any) -> int:
        counts.append(preadv(*arguments))
        return counts[-1]

    with patch.context() as inner:
        inner.setattr(os, "preadv", recording_preadv)
        yield counts


@pytest.fixture
def data() -> TransferSet:
    return load_transfer_set("digits", Path("."), val_fraction=0.125, train_size=300)


def make_stream(cache: CacheReader, data: TransferSet, draws: int, taps: tuple[str, ...] = ()) -> BatchStream:
    rows = data.splits["train"]
    positions = np.arange(len(rows))
    return BatchStream(rows, cache.views, cache.seed, 0, 64, rows.labels, positions, draws, cache, taps)


def test_an_epoch_in_memory_opens_no_file_and_reads_no_byte_after_the_first_round(
    tiny: Path, data: TransferSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream(CacheReader(tiny / "cache"), data, draws=2)
    steps = stream.steps_per_epoch
    with record_opened_files() as opened, record_bytes_read(monkeypatch) as counts:
        first = list(stream.batches(0, 2 * steps))
        assert [name for name in opened if name.endswith(".h5")]
        assert sum(counts) > 0
        opened.clear()
        counts.clear()
        later = list(stream.batches(2 * steps, 6 * steps))
        assert opened == []
        assert counts == []
    assert sum(len(batch.views) for batch in later) == 2 * sum(len(batch.views) for batch in first)


@pytest.mark.parametrize("with_tap", [False, True])
def test_an_epoch_from_disk_reads_hardly_more_than_the_rows_that_it_uses(
    tiny: Path, data: TransferSet, monkeypatch: pytest.MonkeyPatch, with_tap: bool
) -> None:
    monkeypatch.setattr(reader, "RESIDENT_BYTES", 0)
    cache = CacheReader(tiny / "cache")
    taps = tuple(cache.manifest.taps)[:1] if with_tap else ()
    stream = make_stream(cache, data, draws=1, taps=taps)
    steps = stream.steps_per_epoch
    list(stream.batches(0, steps))  # verifies the checksum of each shard, once
    with record_opened_files() as opened, record_bytes_read(monkeypatch) as counts:
        rows = sum(len(batch.views) for batch in stream.batches(steps, 2 * steps))
    used = [cache.manifest.datasets[name] for name in ("logits", *(f"features/{tap}" for tap in taps))]
    useful = rows * sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in used)
    assert useful <= sum(counts) <= 1.05 * useful
    assert opened == []


def test_batches_of_a_group_are_parts_of_one_tensor_not_copies(tiny: Path, data: TransferSet) -> None:
    stream = make_stream(CacheReader(tiny / "cache"), data, draws=1)
    batches = list(stream.batches(0, stream.steps_per_epoch))
    assert len(batches) > 2
    assert len({batch.views.untyped_storage().data_ptr() for batch in batches}) == 1
    assert len({batch.logits.untyped_storage().data_ptr() for batch in batches if batch.logits is not None}) == 1


@pytest.mark.parametrize("batch_size", [64, 100, 300])
def test_the_teacher_runs_once_for_each_batch_of_a_shard(
    tiny: Path, data: TransferSet, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheReader(tiny / "cache")
    teacher = load_cache_teacher(cache, CheckConfig(weights=str(tiny / "runs/teacher")))
    config = CacheConfig(batch_size=batch_size)
    generator = TargetGenerator(data, cache.views, TeacherInference(teacher, ()), config)
    batches: list[int] = []
    forward = PreparedModel.forward

    def recording_forward(self: PreparedModel, views: Any) -> Any:
        batches.append(len(views))
        return forward(self, views)

    monkeypatch.setattr(PreparedModel, "forward", recording_forward)
    rows = 230
    logits = {"logits": ((10,), "<f2")}
    generator.compute_shard(ShardSpec("draw-000/shard-00000.h5", "train", 0, 0, rows, logits), lambda n: None)
    assert len(batches) == -(-rows // batch_size)
    assert sum(batches) == rows


def test_training_a_student_builds_no_teacher_and_reads_no_weights_of_one(
    tiny: Path, tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.stages.student import early_checks
    from softcache.stages.teacher_cache.teachers import teacher_source

    shutil.copytree(tiny / "cache", tmp_path / "c")
    built: list[str] = []
    build = early_checks.build

    def recording_build(arch: str, *arguments: Any, **more: Any) -> Any:
        built.append(arch)
        return build(arch, *arguments, **more)

    for module in (early_checks, teacher_source):
        monkeypatch.setattr(module, "build", recording_build)
    monkeypatch.setattr(TargetGenerator, "compute_shard", None)  # calling it would be an error
    with record_opened_files() as opened:
        stages("student", "--cache", "c", "--arch", "mlp:8", "--epochs", "2", "--out", "r")
    assert set(built) == {"mlp:8"}
    assert [name for name in opened if "teacher" in Path(name).name and name.endswith((".pt", ".th"))] == []
