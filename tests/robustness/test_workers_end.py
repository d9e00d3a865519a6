"""Worker processes that cannot go on end the command in one line; two commands take two folders."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers import processes
from tests.helpers.processes import Forks, wait_until

forks = processes.forks
TEACHER = ("teacher", "--train-size", 200, "--arch", "mlp:8")


def test_too_little_shared_memory_is_one_line(forks: Forks, tmp_path: Path) -> None:
    """A container of Docker has 64 MB; here it is less than a batch."""
    if not forks.can_mount:
        pytest.skip("needs a mount of its own: unshare --map-root-user --mount")
    command = ("teacher", "--arch", "mlp:8", "--train-size", 1000, "--batch-size", 500, "--epochs", 1, "--workers", 2)
    for size in ("4k", "80k"):  # too little for the semaphores of the queues, and for the views of 1,000 images
        forks.succeeds("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm", program=True)
        try:
            error = forks.fails(*command, "--out", tmp_path / size, finalize=True)
        finally:
            forks.succeeds("umount", "/dev/shm", program=True)
        assert "--shm-size" in error
        assert "--workers" in error
    forks.succeeds("teacher", "--resume", "--workers", 1, "--out", tmp_path / size)


def test_a_worker_that_is_killed_is_one_line(forks: Forks, tmp_path: Path) -> None:
    """As the kernel kills one when the memory is full."""
    child = forks.start(*TEACHER, "--epochs", 10_000, "--workers", 1, "--out", tmp_path / "run", finalize=True)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists(), seconds=60)
    wait_until(lambda: bool(children.read_text().split()))
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert child.wait() == 1
    assert "--workers" in child.error


def test_commands_that_are_started_at_once_take_folders_of_their_own(forks: Forks, tmp_path: Path) -> None:
    children = [forks.start(*TEACHER, "--epochs", 1, cwd=tmp_path) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    folders = {path.parent.name for path in (tmp_path / "runs").glob("*/result.json")}
    assert folders == {f"digits-teacher-{n}" for n in range(1, 5)}


def test_of_two_commands_with_one_folder_the_second_is_refused(forks: Forks, tmp_path: Path) -> None:
    children = [forks.start(*TEACHER, "--epochs", 300, "--out", tmp_path / "run") for _ in range(2)]
    wait_until(lambda: any(child.has_ended() for child in children), seconds=60)
    (loser,) = [child for child in children if child.has_ended()]
    (winner,) = [child for child in children if child is not loser]
    loser.wait()
    assert "is being written by" in loser.error or "another process" in loser.error
    winner.terminate()


def test_a_command_that_fails_before_its_run_leaves_no_folder(forks: Forks, tmp_path: Path) -> None:
    forks.fails("student", "--cache", tmp_path / "nothing", "--arch", "mlp:4", cwd=tmp_path)
    assert not (tmp_path / "runs").exists()
