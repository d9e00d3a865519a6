"""One process at a time writes a folder; its lock ends with the process, however that ended."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import processes
from tests.helpers.processes import (
    ONE_DRAW,
    Child,
    Forks,
    assert_equal_caches,
    assert_equal_runs,
    find_point,
    list_files,
    make_cache_command,
    make_resume_command,
    make_student_command,
)

forks = processes.forks
Command = Callable[[Path], list[object]]
Snapshot = dict[str, tuple[int, int, int]]


def snapshot(folder: Path) -> Snapshot:
    """Return {name: (inode, bytes, time of the last change)} of everything below a folder."""
    stats = {str(path): path.lstat() for path in (folder, *folder.rglob("*"))}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def start_holder(forks: Forks, command: Command, reference: Path, folder: Path, name: str, act: str = "stop") -> Child:
    """Start a process that stops itself, or acts otherwise, just after it has published the file `name`."""
    log = reference.with_name("log")
    reference.parent.mkdir(exist_ok=True)
    forks.succeeds(*command(reference), trap={"log": str(log)})
    child = forks.start(*command(folder), trap={"at": find_point(log, "after", "replace", name), "act": act})
    assert child.wait() is None, child.output
    return child


def assert_names(error: str, folder: Path, child: Child) -> None:
    """Check that the error names the folder, the process that writes it, its host and since when."""
    found = re.search(
        r"'(.+)' is being written by process (\d+) on '(.+)' since (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", error
    )
    assert found, error
    assert found.groups()[:3] == (str(folder), str(child.pid), socket.gethostname())


@pytest.fixture
def stage_one(tiny: Path) -> Command:
    return lambda out: make_cache_command(tiny, out, *ONE_DRAW)


@pytest.fixture
def stage_two(tiny: Path) -> Command:
    return lambda out: make_student_command(tiny / "cache", out, 3)


def test_a_second_writer_of_a_cache_is_told_who_holds_it_and_writes_nothing(
    stage_one: Command, forks: Forks, tmp_path: Path
) -> None:
    """Once the first is killed, the second continues at once."""
    reference, cache = tmp_path / "whole/cache", tmp_path / "held/cache"
    first = start_holder(forks, stage_one, reference, cache, "val/shard-00000.h5")
    before = snapshot(cache)
    assert_names(forks.fails(*stage_one(cache)), cache, first)
    assert snapshot(cache) == before
    first.kill()
    assert ".lock" in list_files(cache)
    forks.succeeds(*stage_one(cache))
    assert_equal_caches(forks, cache, reference)


def test_a_writer_that_was_stopped_for_a_while_goes_on_unharmed_by_those_it_kept_out(
    stage_one: Command, forks: Forks, tmp_path: Path
) -> None:
    reference, cache = tmp_path / "whole/cache", tmp_path / "held/cache"
    first = start_holder(forks, stage_one, reference, cache, "unfinished.json")
    for _ in range(3):
        assert_names(forks.fails(*stage_one(cache)), cache, first)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0, first.output
    assert_equal_caches(forks, cache, reference)


def test_a_cache_is_not_repaired_while_it_grows(tiny: Path, stage_one: Command, forks: Forks, tmp_path: Path) -> None:
    reference, cache = tmp_path / "whole/cache", tmp_path / "held/cache"
    for folder in (reference, cache):
        forks.succeeds(*stage_one(folder))
    first = start_holder(
        forks, lambda out: make_cache_command(tiny, out, "--draws", 2), reference, cache, "draw-001/shard-00000.h5"
    )
    (cache / "head.h5").write_bytes(b"damaged")
    error = forks.fails("check-cache", cache, "--repair", "--weights", tiny / "runs/teacher")
    assert_names(error, cache, first)
    first.kill()
    forks.succeeds("check-cache", cache, "--repair", "--weights", tiny / "runs/teacher")


def test_a_second_process_for_a_run_is_told_who_holds_it_and_writes_nothing(
    stage_two: Command, forks: Forks, tmp_path: Path
) -> None:
    reference, run = tmp_path / "whole", tmp_path / "run"
    first = start_holder(forks, stage_two, reference, run, "metrics.jsonl")
    before = snapshot(run)
    assert_names(forks.fails("student", "--resume", "--out", run), run, first)
    assert snapshot(run) == before
    first.kill()
    forks.succeeds("student", "--resume", "--out", run)
    assert_equal_runs(run, reference)


@pytest.mark.parametrize("pid", [1, 4_194_304, "no number"])
def test_the_words_of_a_lock_stop_nobody(stage_one: Command, forks: Forks, tmp_path: Path, pid: object) -> None:
    """A killed process leaves its lock file; its process id may be unused, or that of another process."""
    lock_content = {"host": socket.gethostname(), "pid": pid, "since": "2001-01-01T00:00:00"}
    reference, cache = tmp_path / "whole/cache", tmp_path / "cache"
    cache.mkdir()
    (cache / ".lock").write_text(json.dumps(lock_content))
    for folder in (reference, cache):
        forks.succeeds(*stage_one(folder))
    assert_equal_caches(forks, cache, reference)


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(
    request: pytest.FixtureRequest, forks: Forks, tmp_path: Path, stage: str
) -> None:
    """The worker was forked while the lock was held, and still has its file open."""
    command: Command = request.getfixturevalue(stage)
    reference, folder = tmp_path / "whole/x", tmp_path / "held/x"
    name = "val/shard-00000.h5" if stage == "stage_one" else "metrics.jsonl"
    first = start_holder(forks, command, reference, folder, name, act="fork")
    worker = int(re.findall(r"^worker (\d+)$", first.output, re.MULTILINE)[0])
    try:
        first.kill()
        assert any(os.readlink(fd).startswith(f"{folder}/.lock") for fd in Path(f"/proc/{worker}/fd").iterdir())
        forks.succeeds(*make_resume_command(folder, command(folder)))
    finally:
        os.kill(worker, signal.SIGKILL)
    assert list_files(folder) == list_files(reference)
