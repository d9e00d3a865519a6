"""Shards whose metadata someone made on purpose: too much, of other kinds, or with HDF5's own checksums mended."""

import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5a, h5s, h5t

from tests.helpers.commands import Stages
from tests.helpers.damage import SHARD, mend, mend_headers, object_headers
from tests.helpers.trial import attempt, both, refused_quickly

Change = Callable[[h5py.File], None]
Forge = Callable[[Path], None]
Dose = Callable[[int, int], int]
V110 = ("v110", "v110")

# Attributes, and very many names


def attribute(name: str, value: object, dtype: object = None) -> Change:
    def change(file: h5py.File) -> None:
        if name in file.attrs:
            del file.attrs[name]
        file.attrs.create(name, value, dtype=dtype)

    return change


def ten_thousand_attributes(file: h5py.File) -> None:
    one = h5s.create(h5s.SCALAR)
    for i in range(10_000):
        h5a.create(file.id, b"a%d" % i, h5t.STD_I8LE, one)


def hundred_thousand_names(file: h5py.File) -> None:
    for i in range(100_000):
        file.id.links.create_soft(b"x%d" % i, b"/label")


def many_names_in_a_group(file: h5py.File) -> None:
    group = file["features"]
    for i in range(20_000):
        group.id.links.create_soft(b"x%d" % i, b"/label")


def name_that_is_no_text(file: h5py.File) -> None:
    file.id.links.create_hard(b"\xff\xfe\x1b[31m", file.id, b"label")


def name_for_a_terminal(file: h5py.File) -> None:
    file["\x1b]0;owned\x07\x1b[31m\rgood"] = np.zeros(3)


def without(name: str) -> Change:
    def change(file: h5py.File) -> None:
        del file.attrs[name]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (attribute("note", "of any length"), "attribute note"),
        (attribute("note", ["a", "b"], h5py.string_dtype()), "attribute note"),
        (attribute("note", np.zeros(10**6, "<i8")), "attribute note"),
        (attribute("note", np.zeros((1, 1))), "attribute note"),
        (attribute("note", h5py.Empty("<i8")), "attribute note"),
        (attribute("note", 1.5), "attribute note"),
        (attribute("note", np.void(b"abc")), "attribute note"),
        (attribute("note", np.zeros((), [("a", "<i4")])), "attribute note"),
        (attribute("note", np.bytes_(b"x" * 2000)), "attribute note"),
        (attribute("split", np.zeros(3, "<i4")), "attribute split"),
        (attribute("draw", "1"), "attribute draw"),
        (attribute("draw", 2), "its draw is 2 instead of 1"),
        (attribute("draw", np.bytes_(b"1")), "its draw is 1 instead of 1"),
        (attribute("start", -(2**63)), "its start is -9223372036854775808 instead of"),
        (attribute("split", np.bytes_(b"val")), "its split is val instead of train"),
        (without("fingerprint"), "its fingerprint is None instead of"),
        (ten_thousand_attributes, "10006 attributes, more than a shard has"),
        (hundred_thousand_names, "100005 names and 6 attributes, more than a shard has"),
        (many_names_in_a_group, "neither a dataset nor a small group"),
        (name_that_is_no_text, SHARD),
        (name_for_a_terminal, "not those of the manifest"),
    ],
)
def test_metadata_that_no_shard_has_are_refused(cache: Path, change: Change, reason: str) -> None:
    with h5py.File(cache / SHARD, "r+", libver=V110) as file:
        change(file)
    mend(cache)
    for line in refused_quickly(cache, SHARD):
        assert reason in line


@pytest.mark.parametrize(
    "change",
    [
        name_for_a_terminal,
        name_that_is_no_text,
        attribute("split", np.bytes_(b"\x1b[2J\x1b]0;owned\x07")),
        attribute("payload", np.bytes_(b"a\nb: good\x1b[2J")),
        attribute("\x1b[2Jnote", 1.5),
    ],
)
def test_what_a_shard_says_reaches_no_terminal_unchanged(cache: Path, stages: Stages, change: Change) -> None:
    """Neither control characters nor lines of its own, in the verdicts of check-cache as in an error."""
    with h5py.File(cache / SHARD, "r+") as file:
        change(file)
    mend(cache)
    code, out, err = stages.call("check-cache", cache)
    assert code == 1
    assert all(c.isprintable() or c == "\n" for c in out + err), out
    assert len(out.splitlines()) == 15  # a verdict per file
    assert len(err.splitlines()) == 1
    stages.fails(1, "check-cache", cache, "--json")


# Files that HDF5 reads and we do not


def copied(path: Path, **more: object) -> None:
    """The same datasets and attributes, in a file that was made in another way."""
    with h5py.File(path, "r") as old, h5py.File(path.with_suffix(".new"), "w", **more) as new:
        for name in old:
            old.copy(name, new)
        for key, value in old.attrs.items():
            new.attrs[key] = value
    path.with_suffix(".new").rename(path)


def of_an_old_format(path: Path) -> None:
    copied(path, libver="earliest")


def with_a_user_block(path: Path) -> None:
    copied(path, libver=V110, userblock_size=512)


def that_is_a_script_too(path: Path) -> None:
    with_a_user_block(path)
    with open(path, "r+b") as file:
        file.write(b"#!/bin/sh\necho owned\nexit\n")


def of_a_family_of_files(path: Path) -> None:
    """The first of several files, whose superblock names the driver that would open the others."""
    with h5py.File(path, "r") as old, h5py.File(path.with_name("f%d"), "w", driver="family", libver=V110) as new:
        for name in old:
            old.copy(name, new)
    path.with_name("f0").rename(path)


def only_a_signature(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9] + bytes(5000))


def of_noise(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9] + random.Random(0).randbytes(300_000))


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (of_an_old_format, "not an HDF5 file with checksums in its metadata"),
        (with_a_user_block, "not an HDF5 file with checksums in its metadata"),
        (that_is_a_script_too, "not an HDF5 file with checksums in its metadata"),
        (of_a_family_of_files, "not a"),
        (only_a_signature, "not a readable HDF5 file"),
        (of_noise, "not a readable HDF5 file"),
    ],
)
def test_a_file_of_another_make_is_refused(cache: Path, forge: Forge, reason: str) -> None:
    forge(cache / SHARD)
    for path in (cache / SHARD).parent.glob("f[0-9]*"):
        path.unlink()
    need = 312_000  # bytes that the manifest wants of so many rows: a shorter file is refused by it alone
    with open(cache / SHARD, "ab") as file:
        file.write(bytes(max(0, need - file.tell())))
    mend(cache)
    for line in refused_quickly(cache, SHARD):
        assert reason in line


# Headers that were edited, with HDF5's own checksums mended as well


def place(raw: bytes, name: str, path: Path) -> int:
    """Where a shard's header says where a dataset is: 8 bytes of offset, 8 of size."""
    with h5py.File(path, "r") as file:
        said = struct.pack("<QQ", file[name].id.get_offset(), file[name].id.get_storage_size())
    assert raw.count(said) == 1
    return raw.index(said)


@pytest.mark.parametrize(
    ("offset", "size", "reason"),
    [
        (10**6, None, "label ends at byte 1000400 of a file of|not a readable HDF5 file"),  # as HDF5 2 itself finds
        (312_900, None, "label ends at byte 313300 of a file of|not a readable HDF5 file"),  # begins inside
        (2**63, None, "not a readable HDF5 file"),
        (2**64 - 200, None, "not a readable HDF5 file"),  # ends beyond what 64 bits can say
        (2**64 - 1, None, "not stored whole in one piece"),  # nowhere
        (None, 2**40, "not stored whole in one piece"),
        (None, 0, "not stored whole in one piece"),
        (None, 399, "not stored whole in one piece"),
        (2048, 2**64 - 1, "not stored whole in one piece"),
    ],
)
def test_an_offset_or_size_outside_the_file_is_refused(
    cache: Path, offset: int | None, size: int | None, reason: str
) -> None:
    """Before a byte is read from there."""
    path = cache / SHARD
    raw = bytearray(path.read_bytes())
    at = place(bytes(raw), "label", path)
    if offset is not None:
        raw[at : at + 8] = offset.to_bytes(8, "little")
    if size is not None:
        raw[at + 8 : at + 16] = size.to_bytes(8, "little")
    mend_headers(raw)
    path.write_bytes(raw)
    mend(cache)
    for line in refused_quickly(cache, SHARD):
        assert re.search(reason, line)


@pytest.mark.parametrize("name", ["index", "label", "logits", "features/pool1"])
def test_datasets_that_lie_over_other_bytes_are_refused(cache: Path, name: str) -> None:
    """Over the metadata at the front. The digest that the shard carries, or the rows' order, gives it away."""
    path = cache / SHARD
    raw = bytearray(path.read_bytes())
    at = place(bytes(raw), name, path)
    raw[at : at + 8] = (48).to_bytes(8, "little")
    mend_headers(raw)
    path.write_bytes(raw)
    mend(cache)
    found = attempt(lambda: both(cache, SHARD))
    assert not found.failed
    assert SHARD in found.value[1]


def test_headers_of_any_content_crash_nothing_and_change_no_row(cache: Path, dose: Dose) -> None:
    """Random bytes in HDF5's object headers, whose checksums are mended: refused, or the same rows as before."""
    draw, trials, slowest, largest, same = random.Random(7), dose(25, 600), 0.0, 0, 0
    path, whole = cache / SHARD, (cache / SHARD).read_bytes()
    manifest = (cache / "manifest.json").read_bytes()
    headers = object_headers(whole)
    assert len(headers) == 9  # the superblock, the root, a group and six datasets
    for _ in range(trials):
        raw = bytearray(whole)
        begin, end = draw.choice(headers)
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(begin + 9 if begin == 0 else begin + 4, end)
            raw[at] = draw.choice([0, 1, 255, raw[at] ^ 1 << draw.randrange(8), draw.randrange(256)])
        mend_headers(raw)
        path.write_bytes(raw)
        mend(cache)
        found = attempt(lambda: both(cache, SHARD), limit=10)
        assert not found.failed, (found.failed, raw[begin:end].hex())
        assert all(SHARD in line for line in found.value if line), found.value
        assert bool(found.value[1]) >= bool(found.value[0])  # check-cache finds what a student is refused for
        same += not found.value[1]
        slowest, largest = max(slowest, found.seconds), max(largest, found.extra)
        (cache / "manifest.json").write_bytes(manifest)
    assert largest < 200 << 20
    print(
        f"edited headers: {trials - same} of {trials} refused, {same} without effect, no crash;"
        f" slowest {slowest:.2f} s, most memory {largest / 1e6:.0f} MB"
    )
