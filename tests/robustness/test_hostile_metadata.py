"""Shards with crafted metadata: too much of it, of other types, or edited with HDF5's own checksums updated."""

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
from tests.helpers.damage import SHARD, find_object_headers, update_header_checksums, update_shard_record
from tests.helpers.trial import attempt, get_both_error_lines, get_quick_refusals

Change = Callable[[h5py.File], None]
Forge = Callable[[Path], None]
Dose = Callable[[int, int], int]
V110 = ("v110", "v110")

# Attributes, and very many names


def set_attribute(name: str, value: object, dtype: object = None) -> Change:
    def change(file: h5py.File) -> None:
        if name in file.attrs:
            del file.attrs[name]
        file.attrs.create(name, value, dtype=dtype)

    return change


def add_ten_thousand_attributes(file: h5py.File) -> None:
    one = h5s.create(h5s.SCALAR)
    for i in range(10_000):
        h5a.create(file.id, b"a%d" % i, h5t.STD_I8LE, one)


def add_hundred_thousand_names(file: h5py.File) -> None:
    for i in range(100_000):
        file.id.links.create_soft(b"x%d" % i, b"/label")


def add_names_to_a_group(file: h5py.File) -> None:
    group = file["features"]
    for i in range(20_000):
        group.id.links.create_soft(b"x%d" % i, b"/label")


def add_name_that_is_not_text(file: h5py.File) -> None:
    file.id.links.create_hard(b"\xff\xfe\x1b[31m", file.id, b"label")


def add_name_with_control_characters(file: h5py.File) -> None:
    file["\x1b]0;owned\x07\x1b[31m\rgood"] = np.zeros(3)


def delete_attribute(name: str) -> Change:
    def change(file: h5py.File) -> None:
        del file.attrs[name]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_attribute("note", "of any length"), "attribute note"),
        (set_attribute("note", ["a", "b"], h5py.string_dtype()), "attribute note"),
        (set_attribute("note", np.zeros(10**6, "<i8")), "attribute note"),
        (set_attribute("note", np.zeros((1, 1))), "attribute note"),
        (set_attribute("note", h5py.Empty("<i8")), "attribute note"),
        (set_attribute("note", 1.5), "attribute note"),
        (set_attribute("note", np.void(b"abc")), "attribute note"),
        (set_attribute("note", np.zeros((), [("a", "<i4")])), "attribute note"),
        (set_attribute("note", np.bytes_(b"x" * 2000)), "attribute note"),
        (set_attribute("split", np.zeros(3, "<i4")), "attribute split"),
        (set_attribute("draw", "1"), "attribute draw"),
        (set_attribute("draw", 2), "its draw is 2 instead of 1"),
        (set_attribute("draw", np.bytes_(b"1")), "its draw is 1 instead of 1"),
        (set_attribute("start", -(2**63)), "its start is -9223372036854775808 instead of"),
        (set_attribute("split", np.bytes_(b"val")), "its split is val instead of train"),
        (delete_attribute("fingerprint"), "its fingerprint is None instead of"),
        (add_ten_thousand_attributes, "10006 attributes, more than a shard has"),
        (add_hundred_thousand_names, "100005 names and 6 attributes, more than a shard has"),
        (add_names_to_a_group, "neither a dataset nor a small group"),
        (add_name_that_is_not_text, SHARD),
        (add_name_with_control_characters, "not those of the manifest"),
    ],
)
def test_metadata_that_no_shard_has_are_refused(cache: Path, change: Change, reason: str) -> None:
    with h5py.File(cache / SHARD, "r+", libver=V110) as file:
        change(file)
    update_shard_record(cache)
    for line in get_quick_refusals(cache, SHARD):
        assert reason in line


@pytest.mark.parametrize(
    "change",
    [
        add_name_with_control_characters,
        add_name_that_is_not_text,
        set_attribute("split", np.bytes_(b"\x1b[2J\x1b]0;owned\x07")),
        set_attribute("payload", np.bytes_(b"a\nb: good\x1b[2J")),
        set_attribute("\x1b[2Jnote", 1.5),
    ],
)
def test_what_a_shard_says_reaches_no_terminal_unchanged(cache: Path, stages: Stages, change: Change) -> None:
    """Control characters and line breaks are escaped in the output of check-cache and in errors."""
    with h5py.File(cache / SHARD, "r+") as file:
        change(file)
    update_shard_record(cache)
    code, out, err = stages.call("check-cache", cache)
    assert code == 1
    assert all(c.isprintable() or c == "\n" for c in out + err), out
    assert len(out.splitlines()) == 15  # a line per file
    assert len(err.splitlines()) == 1
    stages.fails(1, "check-cache", cache, "--json")


# Files that HDF5 reads and we do not


def rewrite_file(path: Path, **more: object) -> None:
    """Write the same datasets and attributes into a file with other creation options."""
    with h5py.File(path, "r") as old, h5py.File(path.with_suffix(".new"), "w", **more) as new:
        for name in old:
            old.copy(name, new)
        for key, value in old.attrs.items():
            new.attrs[key] = value
    path.with_suffix(".new").rename(path)


def convert_to_old_format(path: Path) -> None:
    rewrite_file(path, libver="earliest")


def add_user_block(path: Path) -> None:
    rewrite_file(path, libver=V110, userblock_size=512)


def add_script(path: Path) -> None:
    add_user_block(path)
    with open(path, "r+b") as file:
        file.write(b"#!/bin/sh\necho owned\nexit\n")


def convert_to_file_family(path: Path) -> None:
    """Convert to the first of several files, whose superblock names the driver that opens the others."""
    with h5py.File(path, "r") as old, h5py.File(path.with_name("f%d"), "w", driver="family", libver=V110) as new:
        for name in old:
            old.copy(name, new)
    path.with_name("f0").rename(path)


def keep_only_signature(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9] + bytes(5000))


def replace_by_noise(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9] + random.Random(0).randbytes(300_000))


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (convert_to_old_format, "not an HDF5 file with checksums in its metadata"),
        (add_user_block, "not an HDF5 file with checksums in its metadata"),
        (add_script, "not an HDF5 file with checksums in its metadata"),
        (convert_to_file_family, "not a"),
        (keep_only_signature, "not a readable HDF5 file"),
        (replace_by_noise, "not a readable HDF5 file"),
    ],
)
def test_a_file_of_another_make_is_refused(cache: Path, forge: Forge, reason: str) -> None:
    forge(cache / SHARD)
    for path in (cache / SHARD).parent.glob("f[0-9]*"):
        path.unlink()
    need = 312_000  # bytes that the manifest wants of so many rows: a shorter file is refused by it alone
    with open(cache / SHARD, "ab") as file:
        file.write(bytes(max(0, need - file.tell())))
    update_shard_record(cache)
    for line in get_quick_refusals(cache, SHARD):
        assert reason in line


# Edited headers with HDF5's own checksums updated


def find_location(raw: bytes, name: str, path: Path) -> int:
    """Return the position of a dataset's location in a shard's header: 8 bytes of offset, 8 of size."""
    with h5py.File(path, "r") as file:
        location = struct.pack("<QQ", file[name].id.get_offset(), file[name].id.get_storage_size())
    assert raw.count(location) == 1
    return raw.index(location)


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
    """It is refused before a byte is read from there."""
    path = cache / SHARD
    raw = bytearray(path.read_bytes())
    position = find_location(bytes(raw), "label", path)
    if offset is not None:
        raw[position : position + 8] = offset.to_bytes(8, "little")
    if size is not None:
        raw[position + 8 : position + 16] = size.to_bytes(8, "little")
    update_header_checksums(raw)
    path.write_bytes(raw)
    update_shard_record(cache)
    for line in get_quick_refusals(cache, SHARD):
        assert re.search(reason, line)


@pytest.mark.parametrize("name", ["index", "label", "logits", "features/pool1"])
def test_datasets_that_lie_over_other_bytes_are_refused(cache: Path, name: str) -> None:
    """A dataset overlaps the metadata at the front. The shard's payload digest or the order of rows reveals it."""
    path = cache / SHARD
    raw = bytearray(path.read_bytes())
    position = find_location(bytes(raw), name, path)
    raw[position : position + 8] = (48).to_bytes(8, "little")
    update_header_checksums(raw)
    path.write_bytes(raw)
    update_shard_record(cache)
    outcome = attempt(lambda: get_both_error_lines(cache, SHARD))
    assert not outcome.failure
    assert SHARD in outcome.value[1]


def test_headers_of_any_content_crash_nothing_and_change_no_row(cache: Path, dose: Dose) -> None:
    """Random bytes in HDF5's object headers with valid checksums: refused, or the same rows as before."""
    draw, trials, slowest, largest, same = random.Random(7), dose(25, 600), 0.0, 0, 0
    path, original = cache / SHARD, (cache / SHARD).read_bytes()
    manifest = (cache / "manifest.json").read_bytes()
    headers = find_object_headers(original)
    assert len(headers) == 9  # the superblock, the root, a group and six datasets
    for _ in range(trials):
        raw = bytearray(original)
        begin, end = draw.choice(headers)
        for _ in range(draw.choice([1, 1, 2, 4])):
            position = draw.randrange(begin + 9 if begin == 0 else begin + 4, end)
            raw[position] = draw.choice([0, 1, 255, raw[position] ^ 1 << draw.randrange(8), draw.randrange(256)])
        update_header_checksums(raw)
        path.write_bytes(raw)
        update_shard_record(cache)
        outcome = attempt(lambda: get_both_error_lines(cache, SHARD), limit=10)
        assert not outcome.failure, (outcome.failure, raw[begin:end].hex())
        assert all(SHARD in line for line in outcome.value if line), outcome.value
        assert bool(outcome.value[1]) >= bool(outcome.value[0])  # check-cache finds what a student is refused for
        same += not outcome.value[1]
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.extra_memory)
        (cache / "manifest.json").write_bytes(manifest)
    assert largest < 200 << 20
    print(
        f"edited headers: {trials - same} of {trials} refused, {same} without effect, no crash;"
        f" slowest {slowest:.2f} s, most memory {largest / 1e6:.0f} MB"
    )
