"""Tar files of a packed cache, made member by member, and checks of what unpacking one of them does.

A test module gets the fixtures by `packed, members, work_folder = tars.packed, tars.members, tars.work_folder`.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.commands import tiny_cache_command
from tests.helpers.trial import MEMORY, attempt, check_output, run_command

BLOCK = 512
SECONDS = 5.0


@dataclass
class Member:
    """A member of a tar file.

    Attributes:
        name: in the header.
        data: the bytes after the header.
        size: in the header; by default the true one.
        kind: type byte of the header.
        link: target in the header, of a link.
    """

    name: str
    data: bytes
    size: int | None = None
    kind: bytes = tarfile.REGTYPE
    link: str = ""

    def encode(self) -> bytes:
        """Return header, data and padding."""
        info = tarfile.TarInfo(self.name)
        info.type, info.linkname, info.size = self.kind, self.link, len(self.data) if self.size is None else self.size
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        return header + self.data + bytes(-len(self.data) % BLOCK)


def make_tar(members: list[Member]) -> bytes:
    """Return the bytes of a tar file with these members and its end mark."""
    return b"".join(member.encode() for member in members) + bytes(2 * BLOCK)


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `c`, a small cache of one draw in five files, and `c.tar`, the same cache packed."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("packed")
    small = [("--draws", "1"), ("--taps", ""), ("--shard-rows", "150")]
    arguments = tiny_cache_command(tiny)
    for name, value in small:
        position = arguments.index(name)
        arguments[position : position + 2] = [name, value] if value else []
    main([*arguments[:-1], f"{folder}/c"])
    main(["cache-pack", f"{folder}/c", f"{folder}/c.tar"])
    return folder


@pytest.fixture
def members(packed: Path) -> list[Member]:
    """The members of the tar: manifest, README.md, head and shards."""
    with tarfile.open(packed / "c.tar") as tar:
        members = [Member(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert [member.name for member in members[:3]] == ["c/manifest.json", "c/README.md", "c/head.h5"]
    return members


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory to unpack in, next to a folder that must not change."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/precious").write_text("mine")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def read_tree(folder: Path) -> dict[str, bytes | str]:
    """Return {name: bytes of a file, target of a link, or the kind of anything else} of all that is below a folder."""
    tree: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        kind: bytes | str = path.readlink().name if path.is_symlink() else "folder" if path.is_dir() else "other"
        tree[str(path.relative_to(folder))] = path.read_bytes() if kind == "other" and path.is_file() else kind
    return tree


def unpack(tar: bytes, work_folder: Path) -> tuple[int, str]:
    """Unpack these bytes into `d`, check that nothing else changed, and return the exit code and the error."""
    (work_folder / "x.tar").write_bytes(tar)
    before = {
        name: content for name, content in read_tree(work_folder.parent).items() if not name.startswith("work/d")
    }
    assert Path.cwd() == work_folder
    outcome = attempt(lambda: run_command("cache-unpack", "x.tar", "d"), limit=10)
    assert not outcome.failure, outcome.failure
    assert outcome.seconds < SECONDS
    assert outcome.extra_memory < MEMORY, f"{outcome.extra_memory / 1e6:.0f} MB"
    assert before == {n: content for n, content in read_tree(work_folder.parent).items() if not n.startswith("work/d")}
    assert not list(work_folder.rglob("*.tmp"))
    return check_output(outcome.value), outcome.value[2]


def unpack_refused(tar: bytes, work_folder: Path) -> str:
    """Unpack bytes that must be refused, check that this leaves no cache, and return the error line."""
    code, err = unpack(tar, work_folder)
    assert code == 1, err
    assert not (work_folder / "d/manifest.json").exists() or (work_folder / "d/manifest.json").is_symlink()
    return err
