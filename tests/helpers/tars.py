"""Tar files of a packed cache, made member by member, and what unpacking one of them does.

A test module has the fixtures after `packed, members, place = tars.packed, tars.members, tars.place`.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.commands import tiny_cache_command
from tests.helpers.trial import MEMORY, attempt, command, one_line

BLOCK = 512
SECONDS = 5.0


@dataclass
class Member:
    """name, and what follows its header; size: what the header says, where that is not so; kind: of the member."""

    name: str
    data: bytes
    size: int | None = None
    kind: bytes = tarfile.REGTYPE
    link: str = ""

    def packed(self) -> bytes:
        info = tarfile.TarInfo(self.name)
        info.type, info.linkname, info.size = self.kind, self.link, len(self.data) if self.size is None else self.size
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        return header + self.data + bytes(-len(self.data) % BLOCK)


def tar_of(members: list[Member]) -> bytes:
    return b"".join(member.packed() for member in members) + bytes(2 * BLOCK)


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small cache `c` of one draw in five files, and it packed: `c.tar`."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("packed")
    small = [("--draws", "1"), ("--taps", ""), ("--shard-rows", "150")]
    asked = tiny_cache_command(tiny)
    for name, value in small:
        at = asked.index(name)
        asked[at : at + 2] = [name, value] if value else []
    main([*asked[:-1], f"{folder}/c"])
    main(["cache-pack", f"{folder}/c", f"{folder}/c.tar"])
    return folder


@pytest.fixture
def members(packed: Path) -> list[Member]:
    """What is in the tar: manifest, card, head and shards."""
    with tarfile.open(packed / "c.tar") as tar:
        found = [Member(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert [member.name for member in found[:3]] == ["c/manifest.json", "c/README.md", "c/head.h5"]
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to unpack in, with something beside it that must stay as it is."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/precious").write_text("mine")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def everything(folder: Path) -> dict[str, bytes | str]:
    """{name: bytes, or where a link leads to, or what else it is} of all that is below a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        what: bytes | str = path.readlink().name if path.is_symlink() else "folder" if path.is_dir() else "other"
        found[str(path.relative_to(folder))] = path.read_bytes() if what == "other" and path.is_file() else what
    return found


def unpacked(tar: bytes, place: Path) -> tuple[int, str]:
    """Exit code and error of unpacking these bytes into `d`, which is all that may have changed."""
    (place / "x.tar").write_bytes(tar)
    before = {name: what for name, what in everything(place.parent).items() if not name.startswith("work/d")}
    assert Path.cwd() == place
    found = attempt(lambda: command("cache-unpack", "x.tar", "d"), limit=10)
    assert not found.failed, found.failed
    assert found.seconds < SECONDS
    assert found.extra < MEMORY, f"{found.extra / 1e6:.0f} MB"
    assert before == {n: what for n, what in everything(place.parent).items() if not n.startswith("work/d")}
    assert not list(place.rglob("*.tmp"))
    return one_line(found.value), found.value[2]


def refused(tar: bytes, place: Path) -> str:
    """The one line; no cache is there."""
    code, err = unpacked(tar, place)
    assert code == 1, err
    assert not (place / "d/manifest.json").exists() or (place / "d/manifest.json").is_symlink()
    return err
