"""Unpacking into a folder that is not empty, and packing a cache that changes meanwhile."""

import os
from pathlib import Path

import pytest

from softcache.pipeline.cache import archive as pack
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers import tars
from tests.helpers.tars import read_tree, unpack, unpack_refused
from tests.helpers.trial import assert_unopened, attempt, run_command

packed, work_folder = tars.packed, tars.work_folder


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("draw-000", "beside"),
        ("draw-000", "nowhere"),
        ("draw-000/shard-00000.h5", "beside/precious"),
        ("draw-000/shard-00000.h5", "nowhere"),
        ("head.h5", "beside/precious"),
        ("manifest.json", "beside/precious"),
        ("README.md", "beside/precious"),
        ("README.md", "nowhere"),
        (".lock", "beside/precious"),
        ("more", "beside"),
    ],
)
def test_links_in_the_folder_are_neither_followed_nor_written_through(
    packed: Path, work_folder: Path, name: str, target: str
) -> None:
    (work_folder / "d" / name).parent.mkdir(parents=True)
    (work_folder / "d" / name).symlink_to(work_folder.parent / target)
    with assert_unopened(work_folder.parent / "beside"):
        attempt(lambda: run_command("cache-unpack", str(packed / "c.tar"), "d"), limit=10)
    unpack_refused((packed / "c.tar").read_bytes(), work_folder)
    assert (work_folder / "d" / name).is_symlink()


@pytest.mark.parametrize("name", ["draw-000/shard-00000.h5", "head.h5", "manifest.json", "README.md", "draw-000"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "file"])
def test_what_lies_in_the_folder_under_those_names_hangs_nothing_and_is_not_lost(
    packed: Path, work_folder: Path, name: str, kind: str
) -> None:
    """A pipe would block a reader. A folder or a file may belong to the user; a damaged shard is replaced."""
    path = work_folder / "d" / name
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "precious").write_text("mine")
    else:
        path.write_text("mine")
    code, err = unpack((packed / "c.tar").read_bytes(), work_folder)
    if kind == "folder":
        assert code == 1, err
        assert (path / "precious").read_text() == "mine"
    elif kind == "file" and name in ("README.md", "draw-000", "manifest.json"):
        assert path.read_text() == "mine", err
    if code == 0:
        tree = read_tree(work_folder / "d")
        assert {**tree, "README.md": ""} == {**read_tree(packed / "c"), "README.md": ""}


def test_a_shard_that_is_cut_while_it_is_packed_is_one_line(cache: Path, work_folder: Path) -> None:
    """It is cut after its first bytes were packed. No tar file is left, complete or partial."""
    done = [0]

    def cut(count: int) -> None:
        done[0] += count
        if done[0] > 60_000:
            for path in cache.glob("*/*.h5"):
                os.truncate(path, 700)

    def work() -> None:
        pack.pack_cache(cache, CacheReader(cache).manifest, work_folder / "x.tar", cut)

    outcome = attempt(work)
    assert not outcome.failure, outcome.failure
    assert "shard-00000.h5: " in outcome.error_line
    assert not list(work_folder.iterdir())
