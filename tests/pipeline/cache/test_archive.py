"""A cache travels as one tar: whole or not at all, readable by `tar`, and never in the place of another one."""

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

from softcache.pipeline.cache import archive as packing
from tests.helpers.caches import CACHE_COMMAND, make_folder_with_cache, read_payloads, stat_files, stat_tree
from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher, a cache `c` of 2 draws and a tap that was added later, and it packed: `c.tar`."""
    from softcache.stages.main import main

    folder = make_folder_with_cache(tiny, tmp_path_factory.mktemp("made"), "--draws", "2")
    make_folder_with_cache(tiny, folder, "--taps", "flatten")
    main(["cache-pack", f"{folder}/c", f"{folder}/c.tar"])
    return folder


@pytest.fixture
def small(made: Path, tmp_path: Path, stages: Stages) -> Path:
    """The cache `c` in the folder where a test is."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unpacked_it_is_the_same_to_the_byte(small: Path, stages: Stages) -> None:
    stages("cache-unpack", "c.tar", "there/c")
    assert contents(Path("there/c")) == contents(small)
    assert {"manifest.json", "README.md", "head.h5"} <= contents(small).keys()
    stages("check-cache", "there/c", "--deep")


def test_equal_caches_in_folders_of_one_name_give_equal_files(small: Path, stages: Stages) -> None:
    os.utime("c.tar", (0, 0))
    shutil.copytree(small, "elsewhere/c", copy_function=shutil.copyfile)
    said = stages("cache-pack", "elsewhere/c", "again.tar")
    assert Path("again.tar").read_bytes() == Path("c.tar").read_bytes()
    assert said["bytes"] == Path("again.tar").stat().st_size


@pytest.mark.parametrize("tool", ["python", "tar"])
def test_any_tar_program_takes_out_a_cache_that_works(small: Path, stages: Stages, tool: str) -> None:
    if tool == "tar" and shutil.which("tar") is None:
        pytest.skip("there is no tar program")
    Path("out").mkdir()
    if tool == "tar":
        subprocess.run(["tar", "xf", "c.tar", "-C", "out"], check=True, timeout=60)
    else:
        with tarfile.open("c.tar") as tar:
            assert tar.getnames()[0] == "c/manifest.json"
            tar.extractall("out", filter="data")
    assert contents(Path("out/c")) == contents(small)
    stages("check-cache", "out/c", "--deep")
    stages("student", "--cache", "out/c", "--arch", "mlp:8", "--epochs", "1")


def flip(path: Path) -> None:
    flip_bit(path, 4 * path.stat().st_size)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path) -> None:
    path.unlink()


def make_a_link(path: Path) -> None:
    path.rename("elsewhere.h5")
    path.symlink_to(Path("elsewhere.h5").resolve())


@pytest.mark.parametrize("damage", [flip, cut, remove, make_a_link])
@pytest.mark.parametrize("name", ["draw-001/shard-00001-1.h5", "head.h5", "manifest.json"])
def test_a_damaged_cache_is_not_packed(small: Path, stages: Stages, name: str, damage: Callable[[Path], None]) -> None:
    damage(small / name)
    before = stat_files(Path.cwd())
    assert name in stages.fails(1, "cache-pack", "c", "new.tar")
    assert stat_files(Path.cwd()) == before


def test_a_file_that_exists_is_not_packed_over(small: Path, stages: Stages) -> None:
    Path("mine").write_text("precious")
    assert "'mine' exists" in stages.fails(2, "cache-pack", "c", "mine")
    assert Path("mine").read_text() == "precious"
    assert "there is no folder" in stages.fails(2, "cache-pack", "c", "nowhere/c.tar")
    assert "there is no cache at 'd'" in stages.fails(1, "cache-pack", "d", "d.tar")


def test_a_cache_that_is_there_already_is_left_as_it_is(small: Path, stages: Stages) -> None:
    (small / "README.md").write_text("# My own words\n")
    before = stat_files(small)
    stages("cache-unpack", "c.tar", "c")
    assert stat_files(small) == before


def test_unpacking_puts_back_what_is_missing_or_damaged_and_nothing_else(small: Path, stages: Stages) -> None:
    whole, before = contents(small), stat_files(small)
    flip(small / "draw-000/shard-00000.h5")
    remove(small / "val/shard-00000.h5")
    stages("cache-unpack", "c.tar", "c")
    assert contents(small) == whole
    now = stat_files(small)
    assert {n for n in before if now[n] != before[n]} == {"draw-000/shard-00000.h5", "val/shard-00000.h5"}


@pytest.mark.parametrize("more", [("--codec", "float32"), ("--draws", "3")])
def test_another_cache_is_not_unpacked_over(small: Path, stages: Stages, more: tuple[str, ...]) -> None:
    """Of another identity, or the same one grown since: the tar holds less than the folder."""
    out = "c" if "--draws" in more else "d"
    stages(*CACHE_COMMAND, *more, "--out", out)
    before = stat_files(Path(out))
    assert f"'{out}' holds another cache than 'c.tar'" in stages.fails(1, "cache-unpack", "c.tar", out)
    assert stat_files(Path(out)) == before


def test_a_folder_or_a_file_of_something_else_is_not_unpacked_over(small: Path, stages: Stages) -> None:
    Path("mine").mkdir()
    Path("mine/precious.txt").write_text("precious")
    assert "'mine' holds precious.txt" in stages.fails(1, "cache-unpack", "c.tar", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["precious.txt"]
    assert "is a file: a cache is a folder" in stages.fails(1, "cache-unpack", "c.tar", "mine/precious.txt")
    assert "there is no file 'd.tar'" in stages.fails(2, "cache-unpack", "d.tar", "d")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_unpacking_that_is_stopped_leaves_no_cache_and_goes_on(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    publish = packing.publish
    published: list[str] = []

    def stopping(path: Path, write: Any) -> None:
        if len(published) == count:
            raise KeyboardInterrupt
        publish(path, write)
        published.append(str(path.relative_to("d")))

    with monkeypatch.context() as patch:
        patch.setattr(packing, "publish", stopping)
        assert stages.call("cache-unpack", "c.tar", "d")[0] == 130
    assert "manifest.json" not in published
    assert sorted(contents(Path("d"))) == sorted(published)
    assert "'d' is no cache" in stages.fails(1, "student", "--cache", "d")
    before = stat_files(Path("d"))
    with monkeypatch.context() as patch:
        count = 1000
        patch.setattr(packing, "publish", stopping)
        stages("cache-unpack", "c.tar", "d")
    assert published[-1] == "manifest.json"
    assert contents(Path("d")) == contents(small)
    now = stat_files(Path("d"))
    assert {name for name in before if now[name] != before[name]} <= {"README.md"}


@pytest.mark.parametrize("where", [100, 1000, 60_000, -500, -1])
def test_a_tar_that_was_cut_gives_no_cache(small: Path, stages: Stages, where: int) -> None:
    """Counted from the last byte that is not of the end mark."""
    whole = Path("c.tar").read_bytes().rstrip(b"\0")
    Path("cut.tar").write_bytes(whole[:where])
    line = stages.fails(1, "cache-unpack", "cut.tar", "d")
    assert "'cut.tar'" in line or "cut.tar: " in line
    assert not Path("d/manifest.json").exists()
    stages("cache-unpack", "c.tar", "d")
    assert contents(Path("d")) == contents(small)


@pytest.mark.parametrize("where", [100, 5000, 60_000, -500])
def test_a_tar_of_which_one_bit_was_flipped_gives_no_cache(small: Path, stages: Stages, where: int) -> None:
    """In the first header, in the manifest, in a shard, in the last shard."""
    shutil.copy("c.tar", "bad.tar")
    flip_bit(Path("bad.tar"), 8 * (where if where > 0 else len(Path("c.tar").read_bytes().rstrip(b"\0")) + where))
    assert "bad.tar" in stages.fails(1, "cache-unpack", "bad.tar", "d")
    assert not Path("d/manifest.json").exists()


@pytest.mark.parametrize("name", ["Größe und Maß", "x" * 120, "x" * 200])
def test_a_folder_of_any_name_can_be_packed(small: Path, stages: Stages, name: str) -> None:
    small.rename(name)
    stages("cache-pack", name, "any.tar")
    stages("cache-unpack", "any.tar", "d")
    assert read_payloads(Path("d")) == read_payloads(Path(name))


READERS = (
    "student --cache c --arch mlp:8 --epochs 2 --loss kd --loss hint:teacher=flatten,student=relu1 --out r",
    "evaluate r",
    "check-cache c",
    "check-cache c --deep --repair --weights teacher",
    "cache-pack c new.tar",
)


def test_those_who_read_a_cache_leave_no_trace_in_it(small: Path, stages: Stages) -> None:
    """Not even a file that is removed again, which a folder's time would show."""
    before = stat_tree(small)
    for command in READERS:
        stages(*command.split())
        assert stat_tree(small) == before, command


def test_a_cache_on_a_read_only_mount_is_read(small: Path) -> None:
    """A real mount, in a name space of its own; one process for all commands."""
    mount = "mount --bind c c && mount -o remount,ro,bind c"
    tried = ["unshare", "-rm", "sh", "-c", f"{mount} && ! touch c/x 2>/dev/null"]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True, timeout=60).returncode:
        pytest.skip("needs unshare and mount, for a name space with a read-only mount")
    commands = f"from softcache.stages.main import main\nfor command in {READERS!r}: main(command.split())"
    program = f"{mount} && exec {shlex.quote(sys.executable)} -c {shlex.quote(commands)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path("r").iterdir()} >= {"student.pt", "result.json"}
    assert Path("new.tar").read_bytes() == Path("c.tar").read_bytes()
