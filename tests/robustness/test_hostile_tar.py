"""A tar file that someone made on purpose, or that was damaged: one line, and nothing is written outside."""

import gzip
import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import tars
from tests.helpers.damage import edit_manifest
from tests.helpers.tars import BLOCK, Member, everything, refused, tar_of, unpacked
from tests.helpers.trial import MEMORY, attempt, command, one_line

packed, members, place = tars.packed, tars.members, tars.place
Dose = Callable[[int, int], int]
H5 = "c/draw-000/shard-00000.h5"


def test_the_tool_of_these_tests_makes_tars_that_are_taken(members: list[Member], packed: Path, place: Path) -> None:
    assert unpacked(tar_of(members), place) == (0, "")
    assert everything(place / "d") == everything(packed / "c")


# Members that should not be there


@pytest.mark.parametrize(
    ("at", "name"),
    [
        *((at, "../beside/precious") for at in (1, 2, 3, -1)),
        *((at, "c/more") for at in (1, -1)),
        *(
            (3, name)
            for name in [
                "c/../../beside/precious",
                "c/draw-000/../../../beside/precious",
                "/FOLDER/evil",
                "/",
                "beside/precious",
                "c/.lock",
                "c/unfinished.json",
                "c/draw-000/.shard-00000.h5.1.tmp",
                "c/draw-001/shard-00000.h5",
                "c/./head.h5",
                "c//head.h5",
                "d/head.h5",
                "head.h5",
                "c/head.h5/",
                "C/head.h5",
                "c/manifest.json",
                "\x1b[2J\nError: nothing",
                "é" * 40,
            ]
        ),
    ],
)
def test_a_member_that_the_manifest_does_not_name_is_refused(
    members: list[Member], place: Path, at: int, name: str
) -> None:
    name = name.replace("/FOLDER", str(place.parent))
    members.insert(at if at > 0 else len(members), Member(name, b"evil"))
    line = refused(tar_of(members), place)
    assert "'x.tar' holds " in line or "head.h5 has 4 bytes" in line


@pytest.mark.parametrize(
    "kind",
    [
        b"1",
        b"2",
        b"3",
        b"4",
        b"5",
        b"6",
        b"7",
        b"L",
        b"K",
        b"x",
        b"g",
        b"X",
        b"S",
        b"V",
        b"M",
        b"D",
        b"N",
        b"Z",
        b"\xff",
    ],
)
def test_a_member_that_is_no_plain_file_is_refused(members: list[Member], place: Path, kind: bytes) -> None:
    """Links, devices, pipes, folders, the headers of other formats: also under the name of a file that is wanted."""
    evil = Member(H5, b"../beside/precious\0", kind=kind, link="../beside/precious")
    members.insert(next(i for i, m in enumerate(members) if m.name == H5), evil)
    assert "which is no plain file" in refused(tar_of(members), place)


def test_members_that_come_twice_are_refused(members: list[Member], place: Path) -> None:
    assert "'x.tar' holds 'head.h5'" in refused(tar_of([*members[:3], *members[2:]]), place)


@pytest.mark.parametrize("order", ["last", "absent", "card first", "two roots"])
def test_a_tar_that_does_not_begin_with_its_manifest_is_refused(
    members: list[Member], place: Path, order: str
) -> None:
    first, *others = members
    given = {
        "last": [*others, first],
        "absent": others,
        "card first": [others[0], first, *others[1:]],
        "two roots": [Member("a/b/manifest.json", first.data), *others],
    }[order]
    assert "it does not begin with manifest.json" in refused(tar_of(given), place)


@pytest.mark.parametrize("root", ["..", ".", "/", "a", "\x1b[2J"])
def test_the_name_of_the_outer_folder_is_used_for_nothing(
    members: list[Member], packed: Path, place: Path, root: str
) -> None:
    for member in members:
        member.name = f"{root}/{member.name.partition('/')[2]}"
    code, _ = unpacked(tar_of(members), place)
    if code == 0:
        assert everything(place / "d") == everything(packed / "c")


# Sizes and bytes


@pytest.mark.parametrize("which", ["c/manifest.json", "c/README.md", "c/head.h5", H5])
@pytest.mark.parametrize("size", [0, 1, -1, -512, -1024, -(2**62), 2**33, 2**62, 2**63])
def test_a_size_that_is_not_true_is_refused_at_once(members: list[Member], place: Path, which: str, size: int) -> None:
    """Less than nothing, which would send a reader back to where it came from; or more than any disk holds."""
    next(member for member in members if member.name == which).size = size
    refused(tar_of(members), place)


@pytest.mark.parametrize("which", ["c/manifest.json", "c/README.md"])
def test_a_size_of_minus_one_does_not_read_the_whole_file(members: list[Member], place: Path, which: str) -> None:
    """Which may be larger than the memory there is: here it ends in a hole of a gigabyte."""
    next(member for member in members if member.name == which).size = -1
    (place / "x.tar").write_bytes(tar_of(members))
    os.truncate(place / "x.tar", 1 << 30)
    found = attempt(lambda: command("cache-unpack", "x.tar", "d"), limit=20)
    assert one_line(found.value) == 1
    assert found.extra < MEMORY, f"{found.extra / 1e6:.0f} MB"


@pytest.mark.parametrize("by", [-1, 1, 512, -512])
def test_a_shard_of_another_size_than_the_manifest_says_is_named(members: list[Member], place: Path, by: int) -> None:
    shard = next(member for member in members if member.name == H5)
    shard.data = shard.data[:by] if by < 0 else shard.data + bytes(by)
    assert "draw-000/shard-00000.h5 has " in refused(tar_of(members), place)


def test_a_shard_with_other_bytes_is_named_and_not_left_behind(members: list[Member], place: Path) -> None:
    shard = next(member for member in members if member.name == H5)
    shard.data = shard.data[:1000] + bytes([shard.data[1000] ^ 1]) + shard.data[1001:]
    assert "draw-000/shard-00000.h5 is damaged" in refused(tar_of(members), place)
    assert not (place / "d/draw-000/shard-00000.h5").exists()


def test_a_missing_shard_is_named(members: list[Member], place: Path) -> None:
    assert "ends without draw-000/shard-00000.h5" in refused(tar_of([m for m in members if m.name != H5]), place)


def test_a_card_that_is_too_large_is_refused(members: list[Member], place: Path) -> None:
    members[1].data = b"x" * (2 << 20)
    assert "'x.tar' holds 'README.md'" in refused(tar_of(members), place)


def test_a_manifest_that_is_hostile_is_refused_as_in_a_cache(
    packed: Path, members: list[Member], place: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(packed / "c", tmp_path / "copy"))
    edit_manifest(copy, lambda record: record["shards"][0].update(path="../beside/precious"))
    members[0].data = (copy / "manifest.json").read_bytes()
    members[-1].name = "c/../beside/precious"
    assert "is not the file of a shard" in refused(tar_of(members), place)
    members[0].data = members[0].data.replace(b"c", b"d", 1)
    assert "damaged or edited" in refused(tar_of(members), place)


# Whole files that are something else


def other_files(whole: bytes, packed: Path) -> dict[str, bytes]:
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as tar:
        info = tarfile.TarInfo("c.tar")
        info.size = len(whole)
        tar.addfile(info, io.BytesIO(whole))
    return {
        "empty": b"",
        "zeros": bytes(10_240),
        "text": b"not a tar\n" * 500,
        "noise": random.Random(0).randbytes(9000),
        "gz": gzip.compress(whole),
        "tar of a tar": outer.getvalue(),
        "shard": (packed / H5).read_bytes(),
        "manifest": (packed / "c/manifest.json").read_bytes(),
        "short": whole[:100],
        "begins late": b"\n" + whole,
        "zeros first": bytes(BLOCK) + whole,
        "half a block": whole[: BLOCK // 2],
    }


def test_files_that_are_no_packed_cache_are_refused(packed: Path, place: Path) -> None:
    for name, data in other_files((packed / "c.tar").read_bytes(), packed).items():
        assert "x.tar" in refused(data, place), name
    for name in ("/dev/zero", "/dev/null", str(place)):
        assert "there is no file" in command("cache-unpack", name, "d")[2]


def test_a_tar_that_is_cut_or_flipped_anywhere_gives_the_same_cache_or_none(
    packed: Path, place: Path, dose: Dose
) -> None:
    """And what it left is gone on from by the whole one. The card alone is not vouched for."""
    whole, draw, trials, taken = (packed / "c.tar").read_bytes(), random.Random(3), dose(24, 300), 0
    expected = everything(packed / "c")
    for trial in range(trials):
        at = draw.randrange(len(whole)) if draw.random() < 0.6 else BLOCK * draw.randrange(len(whole) // BLOCK)
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        code, err = unpacked(whole[:at] if trial % 2 else bytes(flipped), place)
        found = everything(place / "d") if (place / "d").exists() else {}
        if code == 0:
            assert {**found, "README.md": ""} == {**expected, "README.md": ""}
            taken += 1
        else:
            assert "x.tar" in err
            assert "manifest.json" not in found
            assert {k: v for k, v in found.items() if k != "README.md" and v != "folder"}.items() <= expected.items()
        if trial % 8 == 0:
            assert unpacked(whole, place)[0] == 0
            assert {**everything(place / "d"), "README.md": ""} == {**expected, "README.md": ""}
        shutil.rmtree(place / "d", ignore_errors=True)
    print(f"damaged tars: {trials - taken} of {trials} refused, {taken} gave the same cache (end mark, card, padding)")
