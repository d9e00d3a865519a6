"""A disk or a memory that is full is one line and exit code 1; after there is room the same command goes on."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.helpers import processes
from tests.helpers.processes import (
    ONE_DRAW,
    Forks,
    assert_equal_caches,
    assert_equal_runs,
    bad_shards,
    cache_command,
    events,
    going_on,
    payloads,
    shards,
    student_command,
    temporaries,
)

forks = processes.forks
Dose = Callable[[int, int], int]
FULL = f"Error: {os.strerror(errno.ENOSPC)}: "


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def assert_tidy(folder: Path) -> None:
    """No temporary file, and nobody holds it."""
    if folder.exists():
        assert temporaries(folder) == []
        assert not (folder / ".lock").exists()


def test_a_disk_that_is_full_after_so_many_bytes_stops_stage_one_in_one_line(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """What was published is whole; once there is room, it goes on to the same digests."""
    random, whole = Random(3), tmp_path / "whole/cache"
    forks.succeeds(*cache_command(tiny, whole, *ONE_DRAW))
    for trial in range(trials := dose(4, 20)):
        cache = tmp_path / f"full-{trial}/cache"
        command = cache_command(tiny, cache, *ONE_DRAW)
        room = random.randrange(size_of(whole)) if trial else random.randrange(2000)
        assert forks.fails(*command, trap={"room": room}).startswith(FULL)
        assert not (cache / "manifest.json").exists()
        assert bad_shards(cache, payloads(whole)) == []
        assert_tidy(cache)
        before = shards(cache)
        forks.succeeds(*command)
        assert before.items() <= shards(cache).items()
        assert_equal_caches(forks, cache, whole)
    print(f"\nstage one on a disk that was full {trials} times: one line, nothing bad or left over, digests equal")


def test_a_call_that_finds_no_room_stops_stage_one_in_one_line(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """Room is missing for a folder, a name, or when bytes are synced, as on a network's disk."""
    whole, log, random = tmp_path / "whole/cache", tmp_path / "log", Random(4)
    forks.succeeds(*cache_command(tiny, whole, *ONE_DRAW), trap={"log": str(log)})
    calls = [i for i, e in enumerate(events(log), 1) if e["when"] == "before" and e["call"] != "unlink"]
    for at in random.sample(calls, trials := min(dose(4, 10**6), len(calls))):
        cache, where = tmp_path / f"full-{at}/cache", events(log)[at - 1]
        error = forks.fails(*(command := cache_command(tiny, cache, *ONE_DRAW)), trap={"at": at, "act": "full"})
        assert error.startswith(FULL), where
        assert_tidy(cache)
        again = forks.run(*command)
        assert again.code == 0, (where, again.output)
        assert_equal_caches(forks, cache, whole)
    print(f"\nstage one without room at {trials} of {len(calls)} calls: one line, nothing left over, digests equal")


def test_a_cache_that_cannot_grow_for_want_of_room_is_the_old_one(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    whole, cache = tmp_path / "whole/cache", tmp_path / "full/cache"
    forks.succeeds(*cache_command(tiny, cache, *ONE_DRAW))
    command, old = ("--draws", 2, "--shard-rows", 150), payloads(cache)
    assert forks.fails(*cache_command(tiny, cache, *command), trap={"room": 600_000}).startswith(FULL)
    assert payloads(cache) == old
    assert_tidy(cache)
    forks.succeeds("check-cache", cache)
    for folder in (whole, cache):
        forks.succeeds(*cache_command(tiny, folder, *command))
    assert_equal_caches(forks, cache, whole)


def test_a_disk_that_is_full_stops_a_student_in_one_line(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    """Its checkpoint cannot be written; with room, --resume ends with the same weights."""
    random, whole, log = Random(6), tmp_path / "whole", tmp_path / "log"
    command = student_command(tiny / "cache", whole, 3, "--baseline")
    forks.succeeds(*command, trap={"log": str(log)})
    rooms = {0, 900, *(random.randrange(120_000) for _ in range(dose(1, 18)))}
    for room in sorted(rooms):
        run = tmp_path / f"full-{room}"
        command = student_command(tiny / "cache", run, 3, "--baseline")
        assert forks.fails(*command, trap={"room": room}).startswith(FULL), room
        assert_tidy(run)
        assert not (run / "result.json").exists()
        again = forks.run(*going_on(run, command))
        assert again.code == 0, (room, again.output)
        assert_equal_runs(run, whole)
    print(f"\na student on a disk that was full {len(rooms)} times: one line, weights equal to the bit")


def test_a_limit_on_the_size_of_files_is_one_line(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    whole, cache, run = tmp_path / "whole/cache", tmp_path / "small/cache", tmp_path / "run"
    line = f"Error: {os.strerror(errno.EFBIG)}: "
    forks.succeeds(*cache_command(tiny, whole, *ONE_DRAW))
    assert forks.fails(*cache_command(tiny, cache, *ONE_DRAW), file_size=100_000).startswith(line)
    assert_tidy(cache)
    forks.succeeds(*cache_command(tiny, cache, *ONE_DRAW))
    assert_equal_caches(forks, cache, whole)
    assert forks.fails(*student_command(cache, run, 1), file_size=5000).startswith(line)
    assert_tidy(run)
    forks.succeeds("student", "--resume", "--out", run)


# A real disk


class SmallDisk:
    """A file system in memory that only the processes of its `forks` see; others find it through /proc."""

    def __init__(self, forks: Forks, place: Path):
        self.forks, self.place = forks, place
        self.seen = Path(f"/proc/{forks.server.pid}/root{place}")

    def mount(self, size: int) -> None:
        self.forks.succeeds("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.place, program=True)

    def grow(self) -> None:
        self.forks.succeeds("mount", "-o", "remount,size=64m", self.place, program=True)

    def unmount(self) -> None:
        self.forks.succeeds("umount", self.place, program=True)


@pytest.fixture
def small_disk(forks: Forks, tmp_path: Path) -> Iterator[SmallDisk]:
    if not forks.can_mount:
        pytest.skip("needs a mount of its own: unshare --map-root-user --mount")
    (tmp_path / "disk").mkdir()
    disk = SmallDisk(forks, tmp_path / "disk")
    yield disk
    disk.forks.run("umount", disk.place, program=True)  # where a test failed


def test_stage_one_on_a_small_disk_goes_on_when_it_is_larger(
    tiny: Path, forks: Forks, small_disk: SmallDisk, tmp_path: Path, dose: Dose
) -> None:
    whole, random = tmp_path / "whole/cache", Random(8)
    forks.succeeds(*cache_command(tiny, whole, *ONE_DRAW))
    command = cache_command(tiny, small_disk.place / "cache", *ONE_DRAW)
    seen = small_disk.seen / "cache"
    for _ in range(trials := dose(1, 20)):
        small_disk.mount(random.randrange(20_000, size_of(whole) - 50_000))
        assert forks.fails(*command, unchecked=True).startswith(FULL)
        assert bad_shards(seen, payloads(whole)) == []
        assert_tidy(seen)
        small_disk.grow()
        forks.succeeds(*command)
        forks.succeeds("check-cache", small_disk.place / "cache")
        assert payloads(seen) == payloads(whole)
        small_disk.unmount()
    print(f"\nstage one on {trials} disks that were too small: one line, nothing bad or left over, digests equal")


def test_a_student_on_a_small_disk_goes_on_when_it_is_larger(
    tiny: Path, forks: Forks, small_disk: SmallDisk, tmp_path: Path, dose: Dose
) -> None:
    whole, run = tmp_path / "whole", small_disk.place / "run"
    forks.succeeds(*student_command(tiny / "cache", whole, 3))
    command = student_command(tiny / "cache", run, 3)
    for pages in Random(9).sample(range(3, 10), dose(1, 7)):
        small_disk.mount(pages * 4096)
        assert forks.fails(*command).startswith(FULL)
        assert_tidy(small_disk.seen / "run")
        small_disk.grow()
        forks.succeeds(*going_on(small_disk.seen / "run", command)[:-1], run)
        assert_equal_runs(small_disk.seen / "run", whole)
        small_disk.unmount()


def test_a_cache_that_will_not_fit_is_refused_before_it_is_begun(
    tiny: Path, forks: Forks, small_disk: SmallDisk
) -> None:
    small_disk.mount(1 << 20)
    error = forks.fails(*cache_command(tiny, small_disk.place / "cache", *ONE_DRAW))
    assert "the cache needs" in error
    assert "free at" in error
    assert shards(small_disk.seen / "cache") == {}
    small_disk.grow()
    forks.succeeds(*cache_command(tiny, small_disk.place / "cache", *ONE_DRAW))
    small_disk.unmount()


# Memory


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_memory_that_is_full_is_one_line_and_the_same_command_goes_on(
    tiny: Path, forks: Forks, tmp_path: Path, kind: str
) -> None:
    """Both libraries say it in their own way."""
    whole, cache = tmp_path / "whole/cache", tmp_path / "full/cache"
    forks.succeeds(*cache_command(tiny, whole, *ONE_DRAW))
    error = forks.fails(*cache_command(tiny, cache, *ONE_DRAW), starve=(6, kind))
    assert error == "Error: out of memory: what was finished is kept. A smaller --batch-size takes less"
    assert len(before := shards(cache)) >= 2
    assert_tidy(cache)
    forks.succeeds(*cache_command(tiny, cache, *ONE_DRAW))
    assert before.items() <= shards(cache).items()
    assert_equal_caches(forks, cache, whole)


def test_memory_that_is_full_while_a_student_trains_is_one_line_and_resume_goes_on(
    tiny: Path, forks: Forks, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    forks.succeeds(*student_command(tiny / "cache", whole, 3))
    assert "out of memory" in forks.fails(*student_command(tiny / "cache", run, 3), starve=(14, "torch"))
    assert_tidy(run)
    assert (run / "checkpoint.pt").exists()
    forks.succeeds("student", "--resume", "--out", run)
    assert_equal_runs(run, whole)
