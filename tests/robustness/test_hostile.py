"""A cache whose folder or manifest was crafted is refused quickly and by name, and nothing outside it is touched.

Every checksum is valid: only the structure reveals these caches.
"""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.damage import SHARD, Record, edit_manifest, find_shard, read_manifest
from tests.helpers.trial import assert_unopened, attempt, get_both_error_lines, get_quick_refusals

STUDENT_OPTIONS = ("--arch", "mlp:8", "--epochs", 3, "--out", "r")
Forge = Callable[[Path, Path], None]  # (cache, outside)


@pytest.fixture
def outside(tiny: Path, tmp_path: Path) -> Path:
    """A folder that no reader may open: a copy of the cache, and a pipe that would block whoever opens it."""
    folder = Path(shutil.copytree(tiny / "cache", tmp_path / "outside", copy_function=os.link))
    os.mkfifo(folder / "pipe")
    return folder


def replace_by_link(name: str, target: str) -> Forge:
    """Replace a name in the cache by a link, to a file with the right bytes where there is one."""

    def forge(cache: Path, outside: Path) -> None:
        path = cache / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        path.symlink_to(target if target.startswith("/") else outside / target)

    return forge


def replace_by_pipe(name: str) -> Forge:
    def forge(cache: Path, outside: Path) -> None:
        (cache / name).unlink()
        os.mkfifo(cache / name)

    return forge


def replace_by_socket(name: str) -> Forge:
    def forge(cache: Path, outside: Path) -> None:
        (cache / name).unlink()
        working_directory = Path.cwd()
        os.chdir((cache / name).parent)  # the name of a socket has 108 bytes at most
        with socket.socket(socket.AF_UNIX) as new_socket:
            new_socket.bind((cache / name).name)
        os.chdir(working_directory)

    return forge


def replace_by_folder(name: str) -> Forge:
    def forge(cache: Path, outside: Path) -> None:
        (cache / name).unlink()
        (cache / name).mkdir()

    return forge


def extend_to_terabyte(name: str) -> Forge:
    """Extend a file to a terabyte; as a sparse file it takes no disk space."""

    def forge(cache: Path, outside: Path) -> None:
        os.truncate(cache / name, 1 << 40)

    return forge


def extend_to_terabyte_with_manifest(cache: Path, outside: Path) -> None:
    os.truncate(cache / SHARD, 1 << 40)
    edit_manifest(cache, lambda record: find_shard(record).update(bytes=1 << 40))


@pytest.mark.parametrize(
    ("forge", "name"),
    [
        (replace_by_link(SHARD, SHARD), SHARD),
        (replace_by_link(SHARD, "pipe"), SHARD),
        (replace_by_link(SHARD, "/dev/zero"), SHARD),
        (replace_by_link(SHARD, "/proc/self/mem"), SHARD),
        (replace_by_link(SHARD, "nowhere"), SHARD),
        (replace_by_link("draw-001", "draw-001"), "draw-001/shard-0000"),
        (replace_by_link("draw-001", "nowhere"), "draw-001/shard-0000"),
        (replace_by_link("draw-001", "/dev/fd"), "draw-001/shard-0000"),
        (replace_by_link("val", "val"), "val/shard-0000"),
        (replace_by_link("manifest.json", "manifest.json"), "manifest.json"),
        (replace_by_link("manifest.json", "pipe"), "manifest.json"),
        (replace_by_link("manifest.json", "/dev/zero"), "manifest.json"),
        (replace_by_pipe(SHARD), SHARD),
        (replace_by_socket(SHARD), SHARD),
        (replace_by_folder(SHARD), SHARD),
        (replace_by_pipe("manifest.json"), "manifest.json"),
        (replace_by_socket("manifest.json"), "manifest.json"),
        (replace_by_folder("manifest.json"), "manifest.json"),
        (extend_to_terabyte(SHARD), SHARD),
        (extend_to_terabyte("val/shard-00000.h5"), "val/shard-00000.h5"),
        (extend_to_terabyte("manifest.json"), "manifest.json"),
        (extend_to_terabyte_with_manifest, SHARD),
    ],
)
def test_what_is_no_plain_file_of_its_size_is_refused_and_not_opened(
    cache: Path, outside: Path, stages: Stages, forge: Forge, name: str
) -> None:
    """Also a link to the expected bytes is refused, because a file outside the cache may change."""
    forge(cache, outside)
    with assert_unopened(outside):
        get_quick_refusals(cache, name)
        code, out, err = stages.call("check-cache", cache)
        assert code == 1
        assert name in out + err
        stages.fails(1, "cache-pack", cache, "c.tar")
    assert not Path("c.tar").exists()


@pytest.mark.parametrize(
    "forge", [replace_by_link("head.h5", "head.h5"), replace_by_link("head.h5", "pipe"), extend_to_terabyte("head.h5")]
)
def test_a_head_that_is_no_plain_file_is_named_by_check_cache_and_not_packed(
    cache: Path, outside: Path, stages: Stages, forge: Forge
) -> None:
    forge(cache, outside)
    with assert_unopened(outside):
        assert f"head.h5: {cache}" in stages.call("check-cache", cache)[1]
        stages.fails(1, "check-cache", cache)
        assert "head.h5" in stages.fails(1, "cache-pack", cache, "c.tar")


def test_the_cache_itself_may_be_reached_through_a_link(cache: Path, stages: Stages) -> None:
    """The user chose the path of the cache, so folders above it are trusted."""
    Path("link").symlink_to(cache)
    stages("check-cache", "link")
    stages("student", "--cache", "link", *STUDENT_OPTIONS)


def test_names_of_stray_files_reach_no_terminal_unchanged(cache: Path, stages: Stages) -> None:
    """With an unfinished addition they are listed; without one they are an error."""
    for name in (b"\x1b[2J\x1b]0;owned\x07.h5", b"a\nhead.h5: good.h5", b"\xff\xfe.h5"):
        Path(os.fsdecode(os.fsencode(cache / "draw-000") + b"/" + name)).write_bytes(b"")
    for code in (1, 0):
        found, out, err = stages.call("check-cache", cache)
        assert found == code, err
        assert all(c.isprintable() or c == "\n" for c in out + err)
        assert len(err.splitlines()) == (code != 0)
        assert len(out.splitlines()) == (0 if code else 15 + 3 + 1)
        (cache / "unfinished.json").write_text("{}")


# Writing into a cache that leads elsewhere


def make_growing_command(tiny: Path, cache: Path) -> tuple[str, ...]:
    return (*tiny_cache_command(tiny)[:-1], str(cache), "--draws", "4")


@pytest.mark.parametrize("target", ["draw-000", "empty"])
def test_a_cache_does_not_grow_through_a_link(
    tiny: Path, cache: Path, outside: Path, stages: Stages, target: str
) -> None:
    """The folder of the new draw is a link: nothing is written or overwritten at its target."""
    (outside / "empty").mkdir()
    before = {path: path.read_bytes() for path in outside.rglob("*.h5")}
    (cache / "draw-003").symlink_to(outside / target)
    line = stages.fails(1, *make_growing_command(tiny, cache))
    assert "draw-003" in line
    assert {path: path.read_bytes() for path in outside.rglob("*.h5")} == before
    stages("check-cache", cache)


@pytest.mark.parametrize(
    "forge",
    [replace_by_link("README.md", "pipe"), replace_by_link("README.md", "/dev/zero"), replace_by_pipe("README.md")],
)
def test_a_card_that_is_no_plain_file_is_not_read_when_a_cache_grows(
    tiny: Path, cache: Path, outside: Path, stages: Stages, forge: Forge
) -> None:
    """Reading it would block or never end."""
    forge(cache, outside)

    def work() -> None:
        from softcache.stages.main import main

        main([*make_growing_command(tiny, cache), "--json"])

    with assert_unopened(outside):
        outcome = attempt(work, limit=20)
    assert not outcome.failure, outcome.failure
    assert outcome.extra_memory < 400 << 20
    assert get_both_error_lines(cache) == ["", ""]
    assert read_manifest(cache)["draws"] == 4


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_that_is_no_plain_file_is_one_line(tiny: Path, cache: Path, stages: Stages, kind: str) -> None:
    lock = cache / ".lock"
    if kind == "link":
        lock.symlink_to(cache / "manifest.json")
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    before = (cache / "manifest.json").read_bytes()
    stages.fails(1, *make_growing_command(tiny, cache))
    assert (cache / "manifest.json").read_bytes() == before
    stages("check-cache", cache)


# What a manifest claims


@pytest.mark.parametrize(
    "name",
    [
        "../outside.h5",
        "/etc/passwd",
        "a/../../b",
        "a/b/c.h5",
        "",
        "draw-000\\x.h5",
        "draw-001/../draw-001/shard-00001.h5",
        "./draw-001/shard-00001.h5",
        "draw-001//shard-00001.h5",
        "draw-001/shard-00001.h5/",
        "draw-001/shard-00001.h5\n",
        "draw-001/shard-00001-0.h5",
        "draw-1/shard-00001.h5",
        "draw-002/shard-00001.h5",
        "val/shard-00001.h5",
        "draw-001/shard-０0001.h5",
        "DRAW-001/shard-00001.h5",
        "draw-001/shard-00001.h5\0",
        "\ud800",
        "draw-001/" + "0" * 60000,
    ],
)
def test_a_manifests_paths_stay_inside_the_cache(cache: Path, stages: Stages, name: str) -> None:
    edit_manifest(cache, lambda record: find_shard(record).update(path=name))
    line = stages.fails(1, "check-cache", cache)
    assert "is not the file of a shard" in line or "two shards have one path" in line
    assert len(line) < 1000


@pytest.mark.parametrize("name", ["../head.h5", "/etc/passwd", "draw-001/shard-00001.h5", "head.h5\n"])
def test_the_path_of_the_head_is_its_name(cache: Path, stages: Stages, name: str) -> None:
    edit_manifest(cache, lambda record: record["head"].update(path=name))
    assert ".head" in stages.fails(1, "check-cache", cache)


def test_an_edited_identity_is_refused(cache: Path, stages: Stages) -> None:
    edit_manifest(cache, lambda record: record["identity"]["views"].update(pad=2))
    assert "its identity was edited" in stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 2}', "\x00", '{"format": "1"}'])
def test_a_broken_manifest_is_one_line(cache: Path, stages: Stages, text: str) -> None:
    (cache / "manifest.json").write_text(text)
    assert "manifest.json: " in stages.fails(1, "check-cache", cache)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"splits": 10**12}, "splits.test: 1000000000000 is not between 1 and"),
        ({"splits": 2**32 - 1}, "test/shard-00000.h5 with 4294967295 rows has"),
        ({"draws": 10**12}, "draws: 1000000000000 is not between 1 and"),
        ({"draws": 100_000}, "are too few for 100002 draws"),
        ({"classes": 10**12}, "classes: 1000000000000 is not between 1 and"),
        ({"classes": 1 << 24}, "they need"),
        ({"taps": {"pool1": [2**20, 2**20], "flatten": [512]}}, "taps.pool1: 1099511627776 is not between 1 and"),
        ({"taps": {"pool1": [1] * 33, "flatten": [512]}}, "pool1' cannot have 33 dimensions"),
        ({"taps": {"pool1": [64, 4, 0], "flatten": [512]}}, "taps.pool1: 0 is not between 1 and"),
    ],
)
def test_a_manifest_that_claims_too_much_is_refused_before_memory_is_taken(
    cache: Path, claim: dict[str, Any], reason: str
) -> None:
    def edit(record: Record) -> None:
        if "splits" in claim:
            tests = [shard for shard in record["shards"] if shard["split"] == "test"]
            record["shards"] = [shard for shard in record["shards"] if shard not in tests[1:]]
            tests[0]["rows"] = record["splits"]["test"] = claim["splits"]
        else:
            record.update(claim)

    edit_manifest(cache, edit)
    for path in (cache / "test").glob("*-0000[12].h5"):
        path.unlink()
    for line in get_quick_refusals(cache, "manifest.json"):
        assert reason in line


def test_a_missing_shard_record_is_named(cache: Path, stages: Stages) -> None:
    edit_manifest(cache, lambda record: record["shards"].pop(4))
    (cache / SHARD).unlink()
    assert "draw 1" in stages.fails(1, "check-cache", cache)
