"""Unpacking into a folder where something lies already, and packing a cache that changes meanwhile."""

import os
from pathlib import Path

import pytest

from softcache.pipeline.cache import archive as pack
from softcache.pipeline.cache.reader import Cache
from tests.helpers import tars
from tests.helpers.tars import everything, refused, unpacked
from tests.helpers.trial import attempt, command, untouched

packed, place = tars.packed, tars.place


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
    packed: Path, place: Path, name: str, target: str
) -> None:
    (place / "d" / name).parent.mkdir(parents=True)
    (place / "d" / name).symlink_to(place.parent / target)
    with untouched(place.parent / "beside"):
        attempt(lambda: command("cache-unpack", str(packed / "c.tar"), "d"), limit=10)
    refused((packed / "c.tar").read_bytes(), place)
    assert (place / "d" / name).is_symlink()


@pytest.mark.parametrize("name", ["draw-000/shard-00000.h5", "head.h5", "manifest.json", "README.md", "draw-000"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "file"])
def test_what_lies_in_the_folder_under_those_names_hangs_nothing_and_is_not_lost(
    packed: Path, place: Path, name: str, kind: str
) -> None:
    """A pipe would hang a reader; a folder or a file may be somebody's, unless it is a shard that is to be mended."""
    path = place / "d" / name
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "precious").write_text("mine")
    else:
        path.write_text("mine")
    code, err = unpacked((packed / "c.tar").read_bytes(), place)
    if kind == "folder":
        assert code == 1, err
        assert (path / "precious").read_text() == "mine"
    elif kind == "file" and name in ("README.md", "draw-000", "manifest.json"):
        assert path.read_text() == "mine", err
    if code == 0:
        there = everything(place / "d")
        assert {**there, "README.md": ""} == {**everything(packed / "c"), "README.md": ""}


def test_a_shard_that_is_cut_while_it_is_packed_is_one_line(cache: Path, place: Path) -> None:
    """After its first bytes were taken. No tar is left, whole or half."""
    done = [0]

    def cut(count: int) -> None:
        done[0] += count
        if done[0] > 60_000:
            for path in cache.glob("*/*.h5"):
                os.truncate(path, 700)

    def work() -> None:
        pack.pack_cache(cache, Cache(cache).manifest, place / "x.tar", cut)

    found = attempt(work)
    assert not found.failed, found.failed
    assert "shard-00000.h5: " in found.refused
    assert not list(place.iterdir())
