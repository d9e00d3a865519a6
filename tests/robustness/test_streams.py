"""Standard output and standard error that are closed, or that nobody reads, change nothing but what is printed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import processes
from tests.helpers.processes import ONE_DRAW, Forks, assert_equal_runs, make_cache_command, make_student_command

forks = processes.forks
Dose = Callable[[int, int], int]
COMMANDS = ("teacher", "teacher-cache", "student", "check-cache", "losses", "--help")


def make_command(name: str, tiny: Path, out: Path) -> list[object]:
    """Return a short command of that name, which writes into a folder where it writes at all."""
    commands: dict[str, list[object]] = {
        "teacher": ["teacher", "--train-size", 200, "--arch", "mlp:8", "--epochs", 2, "--out", out],
        "teacher-cache": make_cache_command(tiny, out, *ONE_DRAW),
        "student": make_student_command(tiny / "cache", out, 2),
        "check-cache": ["check-cache", tiny / "cache"],
    }
    return commands.get(name, [name])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["closed", "broken"])
def test_streams_that_cannot_be_written_change_no_exit_code(
    tiny: Path, forks: Forks, tmp_path: Path, name: str, kind: str, dose: Dose
) -> None:
    both = {"stdout": kind, "stderr": kind}
    for i, streams in enumerate([both, {"stdout": kind}, {"stderr": kind}][: dose(1, 3)]):
        child = forks.run(*make_command(name, tiny, tmp_path / f"out-{i}"), streams=streams, finalize=True)
        assert child.code == 0, (streams, child.output)
        assert "Traceback" not in child.output
        assert "Exception ignored" not in child.output


def test_a_student_without_streams_has_the_same_files(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    """No descriptor of a closed stream is given to a file, into which a library could then print."""
    reference, run = tmp_path / "whole", tmp_path / "run"
    forks.succeeds(*make_student_command(tiny / "cache", reference, 2))
    closed = {"stdout": "closed", "stderr": "closed"}
    forks.succeeds(*make_student_command(tiny / "cache", run, 2), streams=closed, finalize=True)
    assert_equal_runs(run, reference)


def test_errors_have_their_exit_code_without_streams(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    for kind in ("closed", "broken"):
        streams = {"stdout": kind, "stderr": kind}
        assert forks.run("check-cache", tmp_path / "nothing", streams=streams, finalize=True).code == 1
        assert forks.run("student", "--epochs", "x", streams=streams, finalize=True).code == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_finds_no_space_is_incomplete_and_fails(forks: Forks) -> None:
    """Unlike a reader that has ended, which has read what it wanted."""
    child = forks.run("losses", streams={"stdout": "full"}, finalize=True)
    assert child.code == 1
    assert child.error.startswith("Error: No space left on device: standard output")
