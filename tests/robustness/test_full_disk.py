"""A full disk or memory is one error line and exit code 1; once there is space, the same command continues."""

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
    find_bad_shards,
    list_temporary_files,
    make_cache_command,
    make_resume_command,
    make_student_command,
    read_events,
    read_payloads,
    stat_shards,
)

forks = processes.forks
Dose = Callable[[int, int], int]
FULL = f"Error: {os.strerror(errno.ENOSPC)}: "


def count_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def assert_no_temporaries(folder: Path) -> None:
    """Check that a folder has no temporary file and no lock."""
    if folder.exists():
        assert list_temporary_files(folder) == []
        assert not (folder / ".lock").exists()


def test_a_disk_that_is_full_after_so_many_bytes_stops_stage_one_in_one_line(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """Published shards are complete; once there is space, the cache ends with the same digests."""
    random, reference = Random(3), tmp_path / "whole/cache"
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW))
    for trial in range(trials := dose(4, 20)):
        cache = tmp_path / f"full-{trial}/cache"
        command = make_cache_command(tiny, cache, *ONE_DRAW)
        room = random.randrange(count_bytes(reference)) if trial else random.randrange(2000)
        assert forks.fails(*command, trap={"room": room}).startswith(FULL)
        assert not (cache / "manifest.json").exists()
        assert find_bad_shards(cache, read_payloads(reference)) == []
        assert_no_temporaries(cache)
        before = stat_shards(cache)
        forks.succeeds(*command)
        assert before.items() <= stat_shards(cache).items()
        assert_equal_caches(forks, cache, reference)
    print(f"\nstage one on a disk that was full {trials} times: one line, nothing bad or left over, digests equal")


def test_a_call_that_finds_no_room_stops_stage_one_in_one_line(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """Space runs out when a folder or a name is made, or when bytes are synced, as on a network file system."""
    reference, log, random = tmp_path / "whole/cache", tmp_path / "log", Random(4)
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW), trap={"log": str(log)})
    calls = [i for i, e in enumerate(read_events(log), 1) if e["when"] == "before" and e["call"] != "unlink"]
    for point in random.sample(calls, trials := min(dose(4, 10**6), len(calls))):
        cache, where = tmp_path / f"full-{point}/cache", read_events(log)[point - 1]
        error = forks.fails(
            *(command := make_cache_command(tiny, cache, *ONE_DRAW)), trap={"at": point, "act": "full"}
        )
        assert error.startswith(FULL), where
        assert_no_temporaries(cache)
        again = forks.run(*command)
        assert again.code == 0, (where, again.output)
        assert_equal_caches(forks, cache, reference)
    print(f"\nstage one without room at {trials} of {len(calls)} calls: one line, nothing left over, digests equal")


def test_a_cache_that_cannot_grow_for_want_of_room_is_the_old_one(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    reference, cache = tmp_path / "whole/cache", tmp_path / "full/cache"
    forks.succeeds(*make_cache_command(tiny, cache, *ONE_DRAW))
    command, old = ("--draws", 2, "--shard-rows", 150), read_payloads(cache)
    assert forks.fails(*make_cache_command(tiny, cache, *command), trap={"room": 600_000}).startswith(FULL)
    assert read_payloads(cache) == old
    assert_no_temporaries(cache)
    forks.succeeds("check-cache", cache)
    for folder in (reference, cache):
        forks.succeeds(*make_cache_command(tiny, folder, *command))
    assert_equal_caches(forks, cache, reference)


def test_a_disk_that_is_full_stops_a_student_in_one_line(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    """Its checkpoint cannot be written; once there is space, --resume ends with the same weights."""
    random, reference, log = Random(6), tmp_path / "whole", tmp_path / "log"
    command = make_student_command(tiny / "cache", reference, 3, "--baseline")
    forks.succeeds(*command, trap={"log": str(log)})
    rooms = {0, 900, *(random.randrange(120_000) for _ in range(dose(1, 18)))}
    for room in sorted(rooms):
        run = tmp_path / f"full-{room}"
        command = make_student_command(tiny / "cache", run, 3, "--baseline")
        assert forks.fails(*command, trap={"room": room}).startswith(FULL), room
        assert_no_temporaries(run)
        assert not (run / "result.json").exists()
        again = forks.run(*make_resume_command(run, command))
        assert again.code == 0, (room, again.output)
        assert_equal_runs(run, reference)
    print(f"\na student on a disk that was full {len(rooms)} times: one line, weights equal to the bit")


def test_a_limit_on_the_size_of_files_is_one_line(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    reference, cache, run = tmp_path / "whole/cache", tmp_path / "small/cache", tmp_path / "run"
    line = f"Error: {os.strerror(errno.EFBIG)}: "
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW))
    assert forks.fails(*make_cache_command(tiny, cache, *ONE_DRAW), file_size=100_000).startswith(line)
    assert_no_temporaries(cache)
    forks.succeeds(*make_cache_command(tiny, cache, *ONE_DRAW))
    assert_equal_caches(forks, cache, reference)
    assert forks.fails(*make_student_command(cache, run, 1), file_size=5000).startswith(line)
    assert_no_temporaries(run)
    forks.succeeds("student", "--resume", "--out", run)


# A real disk


class SmallDisk:
    """A file system in memory, mounted for the processes of `forks` only; others read it through /proc."""

    def __init__(self, forks: Forks, mount_point: Path):
        self.forks, self.mount_point = forks, mount_point
        self.visible_path = Path(f"/proc/{forks.server.pid}/root{mount_point}")

    def mount(self, size: int) -> None:
        self.forks.succeeds("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.mount_point, program=True)

    def grow(self) -> None:
        self.forks.succeeds("mount", "-o", "remount,size=64m", self.mount_point, program=True)

    def unmount(self) -> None:
        self.forks.succeeds("umount", self.mount_point, program=True)


@pytest.fixture
def small_disk(forks: Forks, tmp_path: Path) -> Iterator[SmallDisk]:
    if not forks.can_mount:
        pytest.skip("needs a mount of its own: unshare --map-root-user --mount")
    (tmp_path / "disk").mkdir()
    disk = SmallDisk(forks, tmp_path / "disk")
    yield disk
    disk.forks.run("umount", disk.mount_point, program=True)  # still mounted where a test failed


def test_stage_one_on_a_small_disk_goes_on_when_it_is_larger(
    tiny: Path, forks: Forks, small_disk: SmallDisk, tmp_path: Path, dose: Dose
) -> None:
    reference, random = tmp_path / "whole/cache", Random(8)
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW))
    command = make_cache_command(tiny, small_disk.mount_point / "cache", *ONE_DRAW)
    visible_path = small_disk.visible_path / "cache"
    for _ in range(trials := dose(1, 20)):
        small_disk.mount(random.randrange(20_000, count_bytes(reference) - 50_000))
        assert forks.fails(*command, unchecked=True).startswith(FULL)
        assert find_bad_shards(visible_path, read_payloads(reference)) == []
        assert_no_temporaries(visible_path)
        small_disk.grow()
        forks.succeeds(*command)
        forks.succeeds("check-cache", small_disk.mount_point / "cache")
        assert read_payloads(visible_path) == read_payloads(reference)
        small_disk.unmount()
    print(f"\nstage one on {trials} disks that were too small: one line, nothing bad or left over, digests equal")


def test_a_student_on_a_small_disk_goes_on_when_it_is_larger(
    tiny: Path, forks: Forks, small_disk: SmallDisk, tmp_path: Path, dose: Dose
) -> None:
    reference, run = tmp_path / "whole", small_disk.mount_point / "run"
    forks.succeeds(*make_student_command(tiny / "cache", reference, 3))
    command = make_student_command(tiny / "cache", run, 3)
    for pages in Random(9).sample(range(3, 10), dose(1, 7)):
        small_disk.mount(pages * 4096)
        assert forks.fails(*command).startswith(FULL)
        assert_no_temporaries(small_disk.visible_path / "run")
        small_disk.grow()
        forks.succeeds(*make_resume_command(small_disk.visible_path / "run", command)[:-1], run)
        assert_equal_runs(small_disk.visible_path / "run", reference)
        small_disk.unmount()


def test_a_cache_that_will_not_fit_is_refused_before_it_is_begun(
    tiny: Path, forks: Forks, small_disk: SmallDisk
) -> None:
    small_disk.mount(1 << 20)
    error = forks.fails(*make_cache_command(tiny, small_disk.mount_point / "cache", *ONE_DRAW))
    assert "the cache needs" in error
    assert "free at" in error
    assert stat_shards(small_disk.visible_path / "cache") == {}
    small_disk.grow()
    forks.succeeds(*make_cache_command(tiny, small_disk.mount_point / "cache", *ONE_DRAW))
    small_disk.unmount()


# Memory


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_memory_that_is_full_is_one_line_and_the_same_command_goes_on(
    tiny: Path, forks: Forks, tmp_path: Path, kind: str
) -> None:
    """NumPy and PyTorch raise different errors for it."""
    reference, cache = tmp_path / "whole/cache", tmp_path / "full/cache"
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW))
    error = forks.fails(*make_cache_command(tiny, cache, *ONE_DRAW), starve=(12, kind))
    assert error == "Error: out of memory: what was finished is kept. A smaller --batch-size takes less"
    assert len(before := stat_shards(cache)) >= 2
    assert_no_temporaries(cache)
    forks.succeeds(*make_cache_command(tiny, cache, *ONE_DRAW))
    assert before.items() <= stat_shards(cache).items()
    assert_equal_caches(forks, cache, reference)


def test_memory_that_is_full_while_a_student_trains_is_one_line_and_resume_goes_on(
    tiny: Path, forks: Forks, tmp_path: Path
) -> None:
    reference, run = tmp_path / "whole", tmp_path / "run"
    forks.succeeds(*make_student_command(tiny / "cache", reference, 3))
    assert "out of memory" in forks.fails(*make_student_command(tiny / "cache", run, 3), starve=(14, "torch"))
    assert_no_temporaries(run)
    assert (run / "checkpoint.pt").exists()
    forks.succeeds("student", "--resume", "--out", run)
    assert_equal_runs(run, reference)
