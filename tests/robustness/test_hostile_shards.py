"""Crafted shards are refused by name, quickly and with little memory, and no other file is read.

Every checksum is valid: only the structure reveals these files.
"""

import os
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t, h5z

from tests.helpers.commands import Stages
from tests.helpers.damage import SHARD, update_shard_record
from tests.helpers.trial import assert_unopened, get_quick_refusals

Change = Callable[[h5py.File], None]
STUDENT_OPTIONS = ("--arch", "mlp:8", "--epochs", 3, "--out", "r")
V110 = ("v110", "v110")


@pytest.fixture
def outside(tiny: Path, tmp_path: Path) -> Path:
    """A folder that no reader may open: a valid shard, plain bytes, and a pipe that would block whoever opens it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "other.h5").write_bytes((tiny / "cache" / SHARD).read_bytes())
    (folder / "raw.bin").write_bytes(b"SECRET" * 1000)
    os.mkfifo(folder / "pipe")
    return folder


# Links and data that lead elsewhere


def make_soft_link(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/index")


def make_soft_link_to_itself(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/label")


def make_soft_link_in_a_group(file: h5py.File) -> None:
    file["features"].move("pool1", "pool2")
    file["features/pool1"] = h5py.SoftLink("/features/pool2")


def make_soft_link_to_a_group(file: h5py.File) -> None:
    file.move("features", "elsewhere")
    file["features"] = h5py.SoftLink("/elsewhere")


def put_group_in_itself(file: h5py.File) -> None:
    del file["features/pool1"]
    file["features/pool1"] = file["/"]


def link_to_external_file(target: str, name: str) -> Change:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = h5py.ExternalLink(f"../../outside/{target}", name)

    return change


def store_in_external_file(target: str) -> Change:
    def change(file: h5py.File) -> None:
        del file["label"]
        folder = Path(file.filename).parent.parent.parent
        file.create_dataset("label", (100,), "<i4", external=[(str(folder / "outside" / target), 0, 400)])

    return change


def make_virtual(target: str) -> Change:
    def change(file: h5py.File) -> None:
        del file["label"]
        layout = h5py.VirtualLayout((100,), "<i4")
        layout[:] = h5py.VirtualSource(f"../../outside/{target}", "label", (100,))
        file.create_virtual_dataset("label", layout)

    return change


def make_unlimited_virtual(file: h5py.File) -> None:
    """HDF5 determines its shape by opening every file that a pattern names."""
    del file["label"]
    layout = h5py.VirtualLayout((100,), "<i4", maxshape=(None,))
    source = h5py.VirtualSource("../../outside/pipe", "label", (100,), maxshape=(None,))
    endless = slice(0, h5s.UNLIMITED, 1)
    layout[endless] = source[endless]
    file.create_virtual_dataset("label", layout)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (make_soft_link, "SoftLink"),
        (make_soft_link_to_itself, "SoftLink"),
        (make_soft_link_in_a_group, "not those of the manifest|SoftLink"),
        (make_soft_link_to_a_group, "not those of the manifest|SoftLink"),
        (put_group_in_itself, "features/pool1 is no dataset"),
        (link_to_external_file("other.h5", "label"), "ExternalLink"),
        (link_to_external_file("pipe", "label"), "ExternalLink"),
        (link_to_external_file("other.h5", "features"), "ExternalLink"),
        (link_to_external_file("pipe", "features"), "ExternalLink"),
        (link_to_external_file("other.h5", "features/pool1"), "ExternalLink"),
        (store_in_external_file("raw.bin"), "other files"),
        (store_in_external_file("pipe"), "other files"),
        (make_virtual("other.h5"), "other files"),
        (make_virtual("pipe"), "other files"),
        (make_unlimited_virtual, "other files"),
    ],
)
def test_a_shard_that_leads_elsewhere_is_refused_and_not_followed(
    cache: Path, outside: Path, stages: Stages, change: Change, reason: str
) -> None:
    """Opening a pipe without a writer would block; inotify reports any other file that is opened."""
    with h5py.File(cache / SHARD, "r+") as file:
        change(file)
    update_shard_record(cache)
    with assert_unopened(outside):
        for line in (
            *get_quick_refusals(cache, SHARD),
            stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS),
        ):
            assert any(part in line for part in reason.split("|")), line
            assert "SECRET" not in line
        assert "1 of 15 files are bad" in stages.fails(1, "check-cache", cache)


# Datasets that are not what they seem


def replace_dataset(name: str = "label", **more: object) -> Change:
    """Replace a dataset by another one of the same name."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **more)

    return change


def add_dataset(file: h5py.File) -> None:
    file["more"] = np.zeros(3)


def delete_dataset(file: h5py.File) -> None:
    del file["view_crc32"]


def replace_dataset_by_group(file: h5py.File) -> None:
    del file["label"]
    file.create_group("label/inner")


def replace_group_by_dataset(file: h5py.File) -> None:
    del file["features"]
    file["features"] = np.zeros(3)


def nest_groups(file: h5py.File) -> None:
    del file["features/pool1"]
    file.create_group("features/pool1/" + "g/" * 200)


def replace_dataset_by_type(file: h5py.File) -> None:
    del file["label"]
    file["label"] = np.dtype("<i4")


def create_label(
    dims: tuple[int, ...], most: tuple[int, ...] | None, prepare: Callable[[h5p.PropDCID], None]
) -> Change:
    """Create a dataset `label` with properties that h5py's high-level calls do not offer."""

    def change(file: h5py.File) -> None:
        del file["label"]
        properties = h5p.create(h5p.DATASET_CREATE)
        prepare(properties)
        dataset = h5d.create(file.id, b"label", h5t.STD_I32LE, h5s.create_simple(dims, most), properties)
        if properties.get_layout() == h5d.CHUNKED and properties.get_nfilters() == 2:
            dataset.write_direct_chunk((0,), make_zip_bomb())

    return change


@lru_cache(maxsize=1)
def make_zip_bomb() -> bytes:
    """Return 512 MiB of zeros, deflated twice to 6 kB."""
    compressor, zeros = zlib.compressobj(1), bytes(1 << 24)
    return zlib.compress(b"".join([*(compressor.compress(zeros) for _ in range(32)), compressor.flush()]), 9)


def deflate_twice(properties: h5p.PropDCID) -> None:
    properties.set_chunk((1 << 27,))
    properties.set_deflate(1)
    properties.set_deflate(9)


def set_unknown_filter(properties: h5p.PropDCID) -> None:
    properties.set_chunk((100,))
    properties.set_filter(32_000, h5z.FLAG_OPTIONAL)


def allocate_late(properties: h5p.PropDCID) -> None:
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_LATE)


def set_compact_layout(properties: h5p.PropDCID) -> None:
    properties.set_layout(h5d.COMPACT)


ENDLESS = (h5s.UNLIMITED,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_dataset, "not those of the manifest: more"),
        (delete_dataset, "not those of the manifest: view_crc32"),
        (replace_dataset_by_group, "not those of the manifest: label"),
        (replace_group_by_dataset, "not those of the manifest: features"),
        (nest_groups, "features/pool1 is no dataset"),
        (replace_dataset_by_type, "neither a dataset nor a small group"),
        (replace_dataset(shape=(10**12,), dtype="<i4", chunks=(1000,)), "instead of int32 (100,)"),
        (replace_dataset(shape=(10**12,), dtype="<i4"), "instead of int32 (100,)"),
        (replace_dataset(shape=(100, 10**10), dtype="<i4"), "instead of int32 (100,)"),
        (replace_dataset(shape=(), dtype="<i4"), "instead of int32 (100,)"),
        (replace_dataset(data=h5py.Empty("<i4")), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype=">i4"), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype="<u4"), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype="<f4"), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype="S4"), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype="V4"), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype=h5py.string_dtype()), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype=h5py.vlen_dtype("<i4")), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype=h5py.ref_dtype), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype=[("a", "<i2"), ("b", "<i2")]), "instead of int32 (100,)"),
        (replace_dataset(shape=(100,), dtype="<i4", chunks=(10,)), "not stored whole in one piece"),
        (
            replace_dataset(shape=(100,), dtype="<i4", chunks=(100,), compression="gzip"),
            "not stored whole in one piece",
        ),
        (replace_dataset(shape=(100,), dtype="<i4", chunks=(100,), fletcher32=True), "not stored whole in one piece"),
        (create_label((100,), ENDLESS, deflate_twice), "not stored whole in one piece"),
        (create_label((1 << 27,), ENDLESS, deflate_twice), "instead of int32 (100,)"),
        (create_label((100,), None, set_unknown_filter), "not stored whole in one piece"),
        (create_label((100,), None, allocate_late), "not stored whole in one piece"),
        (create_label((100,), None, set_compact_layout), "not stored whole in one piece"),
    ],
)
def test_a_dataset_that_is_not_what_it_should_be_is_refused_unread(cache: Path, change: Change, reason: str) -> None:
    with h5py.File(cache / SHARD, "r+", libver=V110) as file:
        change(file)
    update_shard_record(cache)
    assert os.path.getsize(cache / SHARD) < 2 << 20
    for line in get_quick_refusals(cache, SHARD):
        assert reason in line
