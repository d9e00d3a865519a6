"""An error that no code expects, raised at any call, ends the process, and the same command goes on."""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.helpers import processes
from tests.helpers.processes import (
    ONE_DRAW,
    Child,
    Forks,
    assert_equal_caches,
    assert_equal_runs,
    find_bad_shards,
    make_cache_command,
    make_resume_command,
    make_student_command,
    read_payloads,
)

forks = processes.forks
Dose = Callable[[int, int], int]
MOST_SECONDS = 10
KINDS = ("call", "event")  # see forked.FailingCall


def choose_calls(forks: Forks, log: Path, kind: str, count: int, command: list[object]) -> list[int]:
    """Run a command and return the numbers of `count` random calls of it."""
    forks.succeeds(*command, failing_call=(kind, 0, str(log)))
    return sorted(Random(count).sample(range(1, int(log.read_text().split()[0])), count))


def run_with_failing_call(forks: Forks, log: Path, kind: str, call: int, command: list[object]) -> Child:
    """Run a command that fails at a call, and check that it then ends in time, with exit code 1.

    Libraries drop the errors of some calls, such as those of a callback: the command is then done, with exit code 0.
    """
    child = forks.run(*command, failing_call=(kind, call, str(log)), finalize=True)
    seconds = time.monotonic() - float(log.read_text().split()[1])
    assert child.code in (0, 1), (call, child.code, child.output)
    assert child.code == 0 or seconds < MOST_SECONDS, (call, seconds, child.output)
    return child


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_fails_at_any_call_ends_and_resumes_to_the_same_weights(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose, kind: str
) -> None:
    log, reference = tmp_path / "log", tmp_path / "whole"
    forks.succeeds(*make_student_command(tiny / "cache", reference, 2))
    calls = choose_calls(forks, log, kind, dose(2, 100), make_student_command(tiny / "cache", tmp_path / "counted", 2))
    failed = 0
    for call in calls:
        run = tmp_path / f"failed-{call}"
        command = make_student_command(tiny / "cache", run, 2)
        failed += run_with_failing_call(forks, log, kind, call, command).code == 1
        again = forks.run(*make_resume_command(run, command))
        assert again.code == 0, (call, again.output)
        assert_equal_runs(run, reference)
    print(f"\na student with an error at {len(calls)} {kind}s: {failed} ended with code 1, all to the same weights")


@pytest.mark.parametrize("kind", KINDS)
def test_stage_one_that_fails_at_any_call_ends_and_goes_on_to_the_same_cache(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose, kind: str
) -> None:
    log, reference = tmp_path / "log", tmp_path / "whole/cache"
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW))
    counted = make_cache_command(tiny, tmp_path / "counted/cache", *ONE_DRAW)
    calls = choose_calls(forks, log, kind, dose(2, 100), counted)
    failed = 0
    for call in calls:
        cache = tmp_path / f"failed-{call}/cache"
        command = make_cache_command(tiny, cache, *ONE_DRAW)
        failed += run_with_failing_call(forks, log, kind, call, command).code == 1
        assert find_bad_shards(cache, read_payloads(reference)) == []
        again = forks.run(*command)
        assert again.code == 0, (call, again.output)
        assert_equal_caches(forks, cache, reference)
    print(f"\nstage one with an error at {len(calls)} {kind}s: {failed} ended with code 1, all to the same digests")
