"""A crafted or damaged tar file is one error line, and nothing is written outside the target folder."""

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
from tests.helpers.tars import BLOCK, Member, make_tar, read_tree, unpack, unpack_refused
from tests.helpers.trial import MEMORY, attempt, check_output, run_command

packed, members, work_folder = tars.packed, tars.members, tars.work_folder
Dose = Callable[[int, int], int]
H5 = "c/draw-000/shard-00000.h5"


def test_the_tool_of_these_tests_makes_tars_that_are_taken(
    members: list[Member], packed: Path, work_folder: Path
) -> None:
    assert unpack(make_tar(members), work_folder) == (0, "")
    assert read_tree(work_folder / "d") == read_tree(packed / "c")


# Members that should not be there


@pytest.mark.parametrize(
    ("position", "name"),
    [
        *((position, "../beside/precious") for position in (1, 2, 3, -1)),
        *((position, "c/more") for position in (1, -1)),
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
    members: list[Member], work_folder: Path, position: int, name: str
) -> None:
    name = name.replace("/FOLDER", str(work_folder.parent))
    members.insert(position if position > 0 else len(members), Member(name, b"evil"))
    line = unpack_refused(make_tar(members), work_folder)
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
def test_a_member_that_is_no_plain_file_is_refused(members: list[Member], work_folder: Path, kind: bytes) -> None:
    """Links, devices, pipes, folders and headers of other formats, also under the name of an expected file."""
    evil = Member(H5, b"../beside/precious\0", kind=kind, link="../beside/precious")
    members.insert(next(i for i, m in enumerate(members) if m.name == H5), evil)
    assert "which is no plain file" in unpack_refused(make_tar(members), work_folder)


def test_members_that_come_twice_are_refused(members: list[Member], work_folder: Path) -> None:
    assert "'x.tar' holds 'head.h5'" in unpack_refused(make_tar([*members[:3], *members[2:]]), work_folder)


@pytest.mark.parametrize("order", ["last", "absent", "card first", "two roots"])
def test_a_tar_that_does_not_begin_with_its_manifest_is_refused(
    members: list[Member], work_folder: Path, order: str
) -> None:
    first, *others = members
    ordered_members = {
        "last": [*others, first],
        "absent": others,
        "card first": [others[0], first, *others[1:]],
        "two roots": [Member("a/b/manifest.json", first.data), *others],
    }[order]
    assert "it does not begin with manifest.json" in unpack_refused(make_tar(ordered_members), work_folder)


@pytest.mark.parametrize("root", ["..", ".", "/", "a", "\x1b[2J"])
def test_the_name_of_the_outer_folder_is_used_for_nothing(
    members: list[Member], packed: Path, work_folder: Path, root: str
) -> None:
    for member in members:
        member.name = f"{root}/{member.name.partition('/')[2]}"
    code, _ = unpack(make_tar(members), work_folder)
    if code == 0:
        assert read_tree(work_folder / "d") == read_tree(packed / "c")


# Sizes and bytes


@pytest.mark.parametrize("which", ["c/manifest.json", "c/README.md", "c/head.h5", H5])
@pytest.mark.parametrize("size", [0, 1, -1, -512, -1024, -(2**62), 2**33, 2**62, 2**63])
def test_a_size_that_is_not_true_is_refused_at_once(
    members: list[Member], work_folder: Path, which: str, size: int
) -> None:
    """Negative sizes, which would send a reader backwards, and sizes larger than any disk."""
    next(member for member in members if member.name == which).size = size
    unpack_refused(make_tar(members), work_folder)


@pytest.mark.parametrize("which", ["c/manifest.json", "c/README.md"])
def test_a_size_of_minus_one_does_not_read_the_whole_file(
    members: list[Member], work_folder: Path, which: str
) -> None:
    """The file may be larger than memory: here it ends in a hole of a gigabyte."""
    next(member for member in members if member.name == which).size = -1
    (work_folder / "x.tar").write_bytes(make_tar(members))
    os.truncate(work_folder / "x.tar", 1 << 30)
    outcome = attempt(lambda: run_command("cache-unpack", "x.tar", "d"), limit=20)
    assert check_output(outcome.value) == 1
    assert outcome.extra_memory < MEMORY, f"{outcome.extra_memory / 1e6:.0f} MB"


@pytest.mark.parametrize("by", [-1, 1, 512, -512])
def test_a_shard_of_another_size_than_the_manifest_says_is_named(
    members: list[Member], work_folder: Path, by: int
) -> None:
    shard = next(member for member in members if member.name == H5)
    shard.data = shard.data[:by] if by < 0 else shard.data + bytes(by)
    assert "draw-000/shard-00000.h5 has " in unpack_refused(make_tar(members), work_folder)


def test_a_shard_with_other_bytes_is_named_and_not_left_behind(members: list[Member], work_folder: Path) -> None:
    shard = next(member for member in members if member.name == H5)
    shard.data = shard.data[:1000] + bytes([shard.data[1000] ^ 1]) + shard.data[1001:]
    assert "draw-000/shard-00000.h5 is damaged" in unpack_refused(make_tar(members), work_folder)
    assert not (work_folder / "d/draw-000/shard-00000.h5").exists()


def test_a_missing_shard_is_named(members: list[Member], work_folder: Path) -> None:
    assert "ends without draw-000/shard-00000.h5" in unpack_refused(
        make_tar([m for m in members if m.name != H5]), work_folder
    )


def test_a_card_that_is_too_large_is_refused(members: list[Member], work_folder: Path) -> None:
    members[1].data = b"x" * (2 << 20)
    assert "'x.tar' holds 'README.md'" in unpack_refused(make_tar(members), work_folder)


def test_a_manifest_that_is_hostile_is_refused_as_in_a_cache(
    packed: Path, members: list[Member], work_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(packed / "c", tmp_path / "copy"))
    edit_manifest(copy, lambda record: record["shards"][0].update(path="../beside/precious"))
    members[0].data = (copy / "manifest.json").read_bytes()
    members[-1].name = "c/../beside/precious"
    assert "is not the file of a shard" in unpack_refused(make_tar(members), work_folder)
    members[0].data = members[0].data.replace(b"c", b"d", 1)
    assert "damaged or edited" in unpack_refused(make_tar(members), work_folder)


# Whole files that are something else


def make_other_files(original: bytes, packed: Path) -> dict[str, bytes]:
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as tar:
        info = tarfile.TarInfo("c.tar")
        info.size = len(original)
        tar.addfile(info, io.BytesIO(original))
    return {
        "empty": b"",
        "zeros": bytes(10_240),
        "text": b"not a tar\n" * 500,
        "noise": random.Random(0).randbytes(9000),
        "gz": gzip.compress(original),
        "tar of a tar": outer.getvalue(),
        "shard": (packed / H5).read_bytes(),
        "manifest": (packed / "c/manifest.json").read_bytes(),
        "short": original[:100],
        "begins late": b"\n" + original,
        "zeros first": bytes(BLOCK) + original,
        "half a block": original[: BLOCK // 2],
    }


def test_files_that_are_no_packed_cache_are_refused(packed: Path, work_folder: Path) -> None:
    for name, data in make_other_files((packed / "c.tar").read_bytes(), packed).items():
        assert "x.tar" in unpack_refused(data, work_folder), name
    for name in ("/dev/zero", "/dev/null", str(work_folder)):
        assert "there is no file" in run_command("cache-unpack", name, "d")[2]


def test_a_tar_that_is_cut_or_flipped_anywhere_gives_the_same_cache_or_none(
    packed: Path, work_folder: Path, dose: Dose
) -> None:
    """The intact tar then completes the partial cache. README.md alone has no checksum."""
    original, draw, trials, taken = (packed / "c.tar").read_bytes(), random.Random(3), dose(24, 300), 0
    expected = read_tree(packed / "c")
    for trial in range(trials):
        position = (
            draw.randrange(len(original)) if draw.random() < 0.6 else BLOCK * draw.randrange(len(original) // BLOCK)
        )
        flipped = bytearray(original)
        flipped[position] ^= 1 << draw.randrange(8)
        code, err = unpack(original[:position] if trial % 2 else bytes(flipped), work_folder)
        found = read_tree(work_folder / "d") if (work_folder / "d").exists() else {}
        if code == 0:
            assert {**found, "README.md": ""} == {**expected, "README.md": ""}
            taken += 1
        else:
            assert "x.tar" in err
            assert "manifest.json" not in found
            assert {k: v for k, v in found.items() if k != "README.md" and v != "folder"}.items() <= expected.items()
        if trial % 8 == 0:
            assert unpack(original, work_folder)[0] == 0
            assert {**read_tree(work_folder / "d"), "README.md": ""} == {**expected, "README.md": ""}
        shutil.rmtree(work_folder / "d", ignore_errors=True)
    print(f"damaged tars: {trials - taken} of {trials} refused, {taken} gave the same cache (end mark, card, padding)")
