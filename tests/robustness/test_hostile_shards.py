"""Shards that someone made on purpose: refused by name, in no time and no memory, and nothing outside is read.

Every checksum is mended: only the structure gives these files away.
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
from tests.helpers.damage import SHARD, mend
from tests.helpers.trial import refused_quickly, untouched

Change = Callable[[h5py.File], None]
MORE = ("--arch", "mlp:8", "--epochs", 3, "--out", "r")
V110 = ("v110", "v110")


@pytest.fixture
def outside(tiny: Path, tmp_path: Path) -> Path:
    """What no reader may open: a whole shard, plain bytes, and a pipe at which an opening would hang."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "other.h5").write_bytes((tiny / "cache" / SHARD).read_bytes())
    (folder / "raw.bin").write_bytes(b"SECRET" * 1000)
    os.mkfifo(folder / "pipe")
    return folder


# Links and data that lead elsewhere


def soft_link(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/index")


def soft_link_to_itself(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/label")


def soft_link_in_a_group(file: h5py.File) -> None:
    file["features"].move("pool1", "pool2")
    file["features/pool1"] = h5py.SoftLink("/features/pool2")


def soft_link_to_a_group(file: h5py.File) -> None:
    file.move("features", "elsewhere")
    file["features"] = h5py.SoftLink("/elsewhere")


def group_in_itself(file: h5py.File) -> None:
    del file["features/pool1"]
    file["features/pool1"] = file["/"]


def external(target: str, name: str) -> Change:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = h5py.ExternalLink(f"../../outside/{target}", name)

    return change


def external_storage(target: str) -> Change:
    def change(file: h5py.File) -> None:
        del file["label"]
        folder = Path(file.filename).parent.parent.parent
        file.create_dataset("label", (100,), "<i4", external=[(str(folder / "outside" / target), 0, 400)])

    return change


def virtual(target: str) -> Change:
    def change(file: h5py.File) -> None:
        del file["label"]
        layout = h5py.VirtualLayout((100,), "<i4")
        layout[:] = h5py.VirtualSource(f"../../outside/{target}", "label", (100,))
        file.create_virtual_dataset("label", layout)

    return change


def virtual_without_end(file: h5py.File) -> None:
    """Its shape can only be told by opening every file that a pattern names."""
    del file["label"]
    layout = h5py.VirtualLayout((100,), "<i4", maxshape=(None,))
    source = h5py.VirtualSource("../../outside/pipe", "label", (100,), maxshape=(None,))
    endless = slice(0, h5s.UNLIMITED, 1)
    layout[endless] = source[endless]
    file.create_virtual_dataset("label", layout)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (soft_link, "SoftLink"),
        (soft_link_to_itself, "SoftLink"),
        (soft_link_in_a_group, "not those of the manifest|SoftLink"),
        (soft_link_to_a_group, "not those of the manifest|SoftLink"),
        (group_in_itself, "features/pool1 is no dataset"),
        (external("other.h5", "label"), "ExternalLink"),
        (external("pipe", "label"), "ExternalLink"),
        (external("other.h5", "features"), "ExternalLink"),
        (external("pipe", "features"), "ExternalLink"),
        (external("other.h5", "features/pool1"), "ExternalLink"),
        (external_storage("raw.bin"), "other files"),
        (external_storage("pipe"), "other files"),
        (virtual("other.h5"), "other files"),
        (virtual("pipe"), "other files"),
        (virtual_without_end, "other files"),
    ],
)
def test_a_shard_that_leads_elsewhere_is_refused_and_not_followed(
    cache: Path, outside: Path, stages: Stages, change: Change, reason: str
) -> None:
    """A pipe without a writer would hang whoever opens it; any other opening is seen by the kernel's own notice."""
    with h5py.File(cache / SHARD, "r+") as file:
        change(file)
    mend(cache)
    with untouched(outside):
        for line in (*refused_quickly(cache, SHARD), stages.fails(1, "student", "--cache", cache, *MORE)):
            assert any(part in line for part in reason.split("|")), line
            assert "SECRET" not in line
        assert "1 of 15 files are bad" in stages.fails(1, "check-cache", cache)


# Datasets that are not what they seem


def replaced(name: str = "label", **more: object) -> Change:
    """A dataset in the place of another."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **more)

    return change


def one_dataset_more(file: h5py.File) -> None:
    file["more"] = np.zeros(3)


def one_dataset_less(file: h5py.File) -> None:
    del file["view_crc32"]


def group_for_a_dataset(file: h5py.File) -> None:
    del file["label"]
    file.create_group("label/inner")


def dataset_for_a_group(file: h5py.File) -> None:
    del file["features"]
    file["features"] = np.zeros(3)


def nested_groups(file: h5py.File) -> None:
    del file["features/pool1"]
    file.create_group("features/pool1/" + "g/" * 200)


def committed_type(file: h5py.File) -> None:
    del file["label"]
    file["label"] = np.dtype("<i4")


def of_creation(
    dims: tuple[int, ...], most: tuple[int, ...] | None, prepare: Callable[[h5p.PropDCID], None]
) -> Change:
    """A dataset `label` with properties that h5py's own calls would not give it."""

    def change(file: h5py.File) -> None:
        del file["label"]
        properties = h5p.create(h5p.DATASET_CREATE)
        prepare(properties)
        made = h5d.create(file.id, b"label", h5t.STD_I32LE, h5s.create_simple(dims, most), properties)
        if properties.get_layout() == h5d.CHUNKED and properties.get_nfilters() == 2:
            made.write_direct_chunk((0,), bomb())

    return change


@lru_cache(maxsize=1)
def bomb() -> bytes:
    """512 MiB of zeros, deflated twice: 6 kB."""
    once, zeros = zlib.compressobj(1), bytes(1 << 24)
    return zlib.compress(b"".join([*(once.compress(zeros) for _ in range(32)), once.flush()]), 9)


def deflate_twice(properties: h5p.PropDCID) -> None:
    properties.set_chunk((1 << 27,))
    properties.set_deflate(1)
    properties.set_deflate(9)


def unknown_filter(properties: h5p.PropDCID) -> None:
    properties.set_chunk((100,))
    properties.set_filter(32_000, h5z.FLAG_OPTIONAL)


def whole_but_absent(properties: h5p.PropDCID) -> None:
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_LATE)


def compact(properties: h5p.PropDCID) -> None:
    properties.set_layout(h5d.COMPACT)


ENDLESS = (h5s.UNLIMITED,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_dataset_more, "not those of the manifest: more"),
        (one_dataset_less, "not those of the manifest: view_crc32"),
        (group_for_a_dataset, "not those of the manifest: label"),
        (dataset_for_a_group, "not those of the manifest: features"),
        (nested_groups, "features/pool1 is no dataset"),
        (committed_type, "neither a dataset nor a small group"),
        (replaced(shape=(10**12,), dtype="<i4", chunks=(1000,)), "instead of int32 (100,)"),
        (replaced(shape=(10**12,), dtype="<i4"), "instead of int32 (100,)"),
        (replaced(shape=(100, 10**10), dtype="<i4"), "instead of int32 (100,)"),
        (replaced(shape=(), dtype="<i4"), "instead of int32 (100,)"),
        (replaced(data=h5py.Empty("<i4")), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype=">i4"), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype="<u4"), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype="<f4"), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype="S4"), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype="V4"), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype=h5py.string_dtype()), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype=h5py.vlen_dtype("<i4")), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype=h5py.ref_dtype), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype=[("a", "<i2"), ("b", "<i2")]), "instead of int32 (100,)"),
        (replaced(shape=(100,), dtype="<i4", chunks=(10,)), "not stored whole in one piece"),
        (replaced(shape=(100,), dtype="<i4", chunks=(100,), compression="gzip"), "not stored whole in one piece"),
        (replaced(shape=(100,), dtype="<i4", chunks=(100,), fletcher32=True), "not stored whole in one piece"),
        (of_creation((100,), ENDLESS, deflate_twice), "not stored whole in one piece"),
        (of_creation((1 << 27,), ENDLESS, deflate_twice), "instead of int32 (100,)"),
        (of_creation((100,), None, unknown_filter), "not stored whole in one piece"),
        (of_creation((100,), None, whole_but_absent), "not stored whole in one piece"),
        (of_creation((100,), None, compact), "not stored whole in one piece"),
    ],
)
def test_a_dataset_that_is_not_what_it_should_be_is_refused_unread(cache: Path, change: Change, reason: str) -> None:
    with h5py.File(cache / SHARD, "r+", libver=V110) as file:
        change(file)
    mend(cache)
    assert os.path.getsize(cache / SHARD) < 2 << 20
    for line in refused_quickly(cache, SHARD):
        assert reason in line
