"""A cache as one tar file: complete or refused, readable by any tar program, and never unpacked over another cache."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softcache.pipeline.cache import archive
from tests.helpers.caches import CACHE_COMMAND, make_folder_with_cache, read_payloads, stat_files, stat_tree
from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def home(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher, a cache `c` of 2 draws and a tap that was added later, and `c.tar`, packed of it."""
    from softcache.stages.main import main

    folder = make_folder_with_cache(tiny, tmp_path_factory.mktemp("home"), "--draws", "2")
    make_folder_with_cache(tiny, folder, "--taps", "flatten")
    main(["cache-pack", f"{folder}/c", f"{folder}/c.tar"])
    return folder


@pytest.fixture
def small(home: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of the cache `c`, and of `c.tar`, in the folder of the test."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def read_files(folder: Path) -> dict[str, bytes]:
    """{name: content} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Packing and unpacking


def test_an_unpacked_cache_is_the_packed_one_to_the_byte(small: Path, stages: Stages) -> None:
    stages("cache-unpack", "c.tar", "unpacked/c")
    assert read_files(Path("unpacked/c")) == read_files(small)
    assert {"manifest.json", "README.md", "head.h5"} <= read_files(small).keys()
    stages("check-cache", "unpacked/c", "--deep")


def test_equal_caches_in_folders_of_one_name_give_equal_tars(small: Path, stages: Stages) -> None:
    os.utime("c.tar", (0, 0))
    shutil.copytree(small, "elsewhere/c", copy_function=shutil.copyfile)
    result = stages("cache-pack", "elsewhere/c", "again.tar")
    assert Path("again.tar").read_bytes() == Path("c.tar").read_bytes()
    assert result["bytes"] == Path("again.tar").stat().st_size


@pytest.mark.parametrize("tool", ["python", "tar"])
def test_any_tar_program_unpacks_a_cache_that_works(small: Path, stages: Stages, tool: str) -> None:
    if tool == "tar" and shutil.which("tar") is None:
        pytest.skip("there is no tar program")
    Path("out").mkdir()
    if tool == "tar":
        subprocess.run(["tar", "xf", "c.tar", "-C", "out"], check=True, timeout=60)
    else:
        with tarfile.open("c.tar") as tar:
            assert tar.getnames()[0] == "c/manifest.json"
            tar.extractall("out", filter="data")
    assert read_files(Path("out/c")) == read_files(small)
    stages("check-cache", "out/c", "--deep")
    stages("student", "--cache", "out/c", "--arch", "mlp:8", "--epochs", "1")


@pytest.mark.parametrize("name", ["Größe und Maß", "x" * 120, "x" * 200])
def test_a_folder_of_any_name_can_be_packed(small: Path, stages: Stages, name: str) -> None:
    small.rename(name)
    stages("cache-pack", name, "any.tar")
    stages("cache-unpack", "any.tar", "d")
    assert read_payloads(Path("d")) == read_payloads(Path(name))


# What is not packed


def flip_one_bit(path: Path) -> None:
    flip_bit(path, 4 * path.stat().st_size)


def cut_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path) -> None:
    path.unlink()


def replace_by_link(path: Path) -> None:
    path.rename("elsewhere.h5")
    path.symlink_to(Path("elsewhere.h5").resolve())


@pytest.mark.parametrize("damage", [flip_one_bit, cut_last_byte, remove, replace_by_link])
@pytest.mark.parametrize("name", ["draw-001/shard-00001-1.h5", "head.h5", "manifest.json"])
def test_a_damaged_cache_is_not_packed(small: Path, stages: Stages, name: str, damage: Callable[[Path], None]) -> None:
    damage(small / name)
    before = stat_files(Path.cwd())
    assert name in stages.fails(1, "cache-pack", "c", "new.tar")
    assert stat_files(Path.cwd()) == before


def test_an_existing_file_is_not_overwritten_by_a_tar(small: Path, stages: Stages) -> None:
    Path("mine").write_text("precious")
    assert "'mine' exists" in stages.fails(2, "cache-pack", "c", "mine")
    assert Path("mine").read_text() == "precious"
    assert "there is no folder" in stages.fails(2, "cache-pack", "c", "nowhere/c.tar")
    assert "there is no cache at 'd'" in stages.fails(1, "cache-pack", "d", "d.tar")


# Unpacking where files exist


def test_unpacking_over_the_same_cache_changes_nothing(small: Path, stages: Stages) -> None:
    (small / "README.md").write_text("# My own words\n")
    before = stat_files(small)
    stages("cache-unpack", "c.tar", "c")
    assert stat_files(small) == before


def test_unpacking_restores_missing_and_damaged_files_and_no_others(small: Path, stages: Stages) -> None:
    contents, before = read_files(small), stat_files(small)
    flip_one_bit(small / "draw-000/shard-00000.h5")
    remove(small / "val/shard-00000.h5")
    stages("cache-unpack", "c.tar", "c")
    assert read_files(small) == contents
    now = stat_files(small)
    assert {n for n in before if now[n] != before[n]} == {"draw-000/shard-00000.h5", "val/shard-00000.h5"}


@pytest.mark.parametrize("options", [("--codec", "float32"), ("--draws", "3")])
def test_unpacking_over_another_cache_is_refused(small: Path, stages: Stages, options: tuple[str, ...]) -> None:
    """It is of another identity; or it is the same cache, grown since, of which the tar holds only a part."""
    out = "c" if "--draws" in options else "d"
    stages(*CACHE_COMMAND, *options, "--out", out)
    before = stat_files(Path(out))
    assert f"'{out}' holds another cache than 'c.tar'" in stages.fails(1, "cache-unpack", "c.tar", out)
    assert stat_files(Path(out)) == before


def test_unpacking_over_foreign_files_is_refused(small: Path, stages: Stages) -> None:
    Path("mine").mkdir()
    Path("mine/precious.txt").write_text("precious")
    assert "'mine' holds precious.txt" in stages.fails(1, "cache-unpack", "c.tar", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["precious.txt"]
    assert "is a file: a cache is a folder" in stages.fails(1, "cache-unpack", "c.tar", "mine/precious.txt")
    assert "there is no file 'd.tar'" in stages.fails(2, "cache-unpack", "d.tar", "d")


# Interruptions and damage


@pytest.mark.parametrize("count", [0, 1, 5])
def test_interrupted_unpacking_leaves_no_cache_and_goes_on(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    publish = archive.publish
    published: list[str] = []

    def publish_until_stopped(path: Path, write: Any) -> None:
        if len(published) == count:
            raise KeyboardInterrupt
        publish(path, write)
        published.append(str(path.relative_to("d")))

    with monkeypatch.context() as patch:
        patch.setattr(archive, "publish", publish_until_stopped)
        assert stages.call("cache-unpack", "c.tar", "d")[0] == 130
    assert "manifest.json" not in published
    assert sorted(read_files(Path("d"))) == sorted(published)
    assert "'d' is no cache" in stages.fails(1, "student", "--cache", "d")
    before = stat_files(Path("d"))
    with monkeypatch.context() as patch:
        count = 1000
        patch.setattr(archive, "publish", publish_until_stopped)
        stages("cache-unpack", "c.tar", "d")
    assert published[-1] == "manifest.json"
    assert read_files(Path("d")) == read_files(small)
    now = stat_files(Path("d"))
    assert {name for name in before if now[name] != before[name]} <= {"README.md"}


@pytest.mark.parametrize("length", [100, 1000, 60_000, -500, -1])
def test_a_tar_that_was_cut_gives_no_cache(small: Path, stages: Stages, length: int) -> None:
    """Cut after so many bytes; a negative number counts from the last byte before the end mark."""
    content = Path("c.tar").read_bytes().rstrip(b"\0")
    Path("cut.tar").write_bytes(content[:length])
    line = stages.fails(1, "cache-unpack", "cut.tar", "d")
    assert "'cut.tar'" in line or "cut.tar: " in line
    assert not Path("d/manifest.json").exists()
    stages("cache-unpack", "c.tar", "d")
    assert read_files(Path("d")) == read_files(small)


@pytest.mark.parametrize("byte", [100, 5000, 60_000, -500])
def test_a_tar_with_one_flipped_bit_gives_no_cache(small: Path, stages: Stages, byte: int) -> None:
    """In the first header, in the manifest, in a shard, in the last shard."""
    shutil.copy("c.tar", "bad.tar")
    flip_bit(Path("bad.tar"), 8 * (byte if byte > 0 else len(Path("c.tar").read_bytes().rstrip(b"\0")) + byte))
    assert "bad.tar" in stages.fails(1, "cache-unpack", "bad.tar", "d")
    assert not Path("d/manifest.json").exists()


# Commands that read a cache

READERS = (
    "student --cache c --arch mlp:8 --epochs 2 --loss kd --loss hint:teacher=flatten,student=relu1 --out r",
    "evaluate r",
    "check-cache c",
    "check-cache c --deep --repair --weights teacher",
    "cache-pack c new.tar",
)


def test_commands_that_read_a_cache_write_nothing_into_it(small: Path, stages: Stages) -> None:
    """Not even a file that is removed again, which the time of a folder would show."""
    before = stat_tree(small)
    for command in READERS:
        stages(*command.split())
        assert stat_tree(small) == before, command


def test_a_cache_on_a_read_only_mount_can_be_read(small: Path) -> None:
    """On a real mount, in a name space of its own; one process runs all commands."""
    mount = "mount --bind c c && mount -o remount,ro,bind c"
    probe = ["unshare", "-rm", "sh", "-c", f"{mount} && ! touch c/x 2>/dev/null"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, timeout=60).returncode:
        pytest.skip("needs unshare and mount, for a name space with a read-only mount")
    commands = f"from softcache.stages.main import main\nfor command in {READERS!r}: main(command.split())"
    program = f"{mount} && exec {shlex.quote(sys.executable)} -c {shlex.quote(commands)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert {path.name for path in Path("r").iterdir()} >= {"student.pt", "result.json"}
    assert Path("new.tar").read_bytes() == Path("c.tar").read_bytes()
