"""Two hosts: the same cache and student as one, killed ranks, and a link that is cut. `make hosts` runs them.

A host is a network namespace. `--torture` has 20 killed ranks and 10 links that are cut for ever.
"""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import hosts as helper
from tests.helpers import processes
from tests.helpers.commands import Stages
from tests.helpers.hosts import LIMIT, Hosts, Job
from tests.helpers.paths import ROOT
from tests.helpers.processes import (
    Forks,
    assert_done,
    assert_equal_runs,
    list_files,
    make_cache_command,
    make_student_command,
    read_metric_lines,
    read_payloads,
)
from tests.stages.distributed.test_ranks import EVERYTHING, furthest

pytestmark = pytest.mark.hosts
hosts, forks = helper.hosts, processes.forks
Dose = Callable[[int, int], int]

DYING_RANK, SLOW_RANK = (ROOT / "tests/helpers" / name for name in ("dying_rank.py", "slow_rank.py"))
LONGEST = LIMIT + 30  # seconds from a cut to the end of both hosts, as docs/guides/several-machines.md has it
DRAWS = ("--draws", 40, "--shard-rows", 60)  # 12,540 views in 209 shards


@pytest.fixture(autouse=True)
def mended(hosts: Hosts) -> Iterator[None]:
    """Every test starts with a link, and leaves no process behind."""
    hosts.mend(0)
    hosts.mend(1)
    yield
    for job in hosts.jobs:
        job.end()


@pytest.fixture(scope="module")
def one_cache(tiny: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one process. To be read."""
    folder = tmp_path_factory.mktemp("one") / "cache"
    forks.succeeds(*make_cache_command(tiny, folder, *DRAWS))
    return folder


def train_on_one_host(forks: Forks, tiny: Path, folder: Path, epochs: int) -> Path:
    """Train a student by two ranks of one host."""
    done = forks.run_ranks(2, *make_student_command(tiny / "cache", folder / "one", epochs), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "one"


def count_epochs(run: Path) -> int:
    """Return how many epochs a run has recorded."""
    return len(read_metric_lines(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0


def count_shards(cache: Path) -> int:
    """Return how many shards have their name."""
    return len(list(cache.glob("*/shard-*.h5")))


def assert_same_cache(cache: Path, expected: Path) -> None:
    assert read_payloads(cache) == read_payloads(expected)
    assert list_files(cache) == list_files(expected)
    assert_done(cache)


def assert_ended(job: Job, most_seconds: float, lines_of_each: bool = False) -> str:
    """Assert that both hosts ended with an error in time, and return the lines."""
    assert 0 not in job.wait(), job.output
    assert max(job.seconds) < most_seconds
    lines = job.error_lines()
    assert all(len(of_host) <= 1 for of_host in lines), job.output
    assert [len(of_host) for of_host in lines] == [1, 1] if lines_of_each else any(lines), job.output
    assert "Stopped." not in str(lines)
    assert "stopped" not in str(lines)
    assert not re.search(r"\[rank\d+\]: ", job.output), job.output  # the traceback of a rank
    return " | ".join(line for of_host in lines for line in of_host)


def cut_until_ended(hosts: Hosts, job: Job, host: int) -> float:
    """Cut the link of a host until the command has ended on both; return the seconds that the last one took."""
    hosts.cut(host)
    job.mark()
    lines = assert_ended(job, LONGEST, lines_of_each=True)
    assert "cannot be reached" in lines
    hosts.mend(host)
    return max(job.seconds)


# The same bytes


@pytest.mark.parametrize(("count", "by"), [(1, "static"), (2, "static"), (1, "c10d")])
def test_two_hosts_write_the_cache_of_one_process(
    tiny: Path, hosts: Hosts, one_cache: Path, tmp_path: Path, count: int, by: str
) -> None:
    hosts.succeeds(count, *make_cache_command(tiny, tmp_path / "two", *DRAWS), cwd=tmp_path, by=by)
    assert_same_cache(tmp_path / "two", one_cache)


@pytest.mark.parametrize("count", [1, 2])
def test_two_hosts_train_the_student_of_one_and_of_one_process(
    tiny: Path, hosts: Hosts, forks: Forks, stages: Stages, tmp_path: Path, count: int
) -> None:
    command = ("student", "--cache", tiny / "cache", *EVERYTHING)
    stages(*command, "--out", "process")
    done = forks.run_ranks(2 * count, *command, "--out", "host", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hosts.succeeds(count, *command, "--out", "hosts", cwd=tmp_path)
    assert list_files(tmp_path / "hosts") == list_files(tmp_path / "process")
    for name in [name for name in list_files(tmp_path / "process") if name.endswith(".pt")]:
        assert furthest(tmp_path / "hosts" / name, tmp_path / "process" / name) < 1e-5, name
        assert (tmp_path / "hosts" / name).read_bytes() == (tmp_path / "host" / name).read_bytes(), name


def test_a_rank_that_holds_the_interpreter_lock_beyond_the_limit_is_not_taken_for_lost(
    hosts: Hosts, tmp_path: Path
) -> None:
    hosts.succeeds(1, SLOW_RANK, 0, LIMIT + 5, cwd=tmp_path)
    hosts.succeeds(1, SLOW_RANK, 1, LIMIT + 5, cwd=tmp_path)


# Killed ranks


def test_a_cache_whose_ranks_are_killed_goes_on(
    tiny: Path, hosts: Hosts, one_cache: Path, tmp_path: Path, dose: Dose
) -> None:
    """Rank 1 and rank 0 in turn, each at its fourth shard; five in a cache, whose 209 shards suffice for that."""
    trials, longest = dose(1, 10), 0.0
    for trial in range(trials):
        out = tmp_path / f"two-{trial // 5}"
        command = make_cache_command(tiny, out, *DRAWS)
        before = count_shards(out)
        job = hosts.start(1, DYING_RANK, (trial + 1) % 2, "write_shard", 4, *command, cwd=tmp_path)
        job.wait_for(lambda out=out, before=before: count_shards(out) > before)
        job.mark()
        assert_ended(job, 60)
        longest = max(longest, *job.seconds)
        assert not (out / "manifest.json").exists()
        if trial % 5 == 4 or trial == trials - 1:
            hosts.succeeds(1, *command, cwd=tmp_path)
            assert_same_cache(out, one_cache)
    print(f"\nstage one: {trials} killed ranks, all ended and went on; at most {longest:.1f} s after the first shard")


def test_a_student_whose_ranks_are_killed_goes_on(
    tiny: Path, hosts: Hosts, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    trials, longest = dose(1, 10), 0.0
    epochs = 40 * (trials + 1)
    expected = train_on_one_host(forks, tiny, tmp_path, epochs)
    command, run = make_student_command(tiny / "cache", tmp_path / "two", epochs), tmp_path / "two"
    for trial in range(trials):
        job = hosts.start(1, *processes.make_resume_command(run, command), cwd=tmp_path)
        job.wait_for(lambda trial=trial: count_epochs(run) >= 40 * trial + 20)
        job.kill_rank((trial + 1) % 2)
        job.mark()
        assert_ended(job, 30)
        longest = max(longest, *job.seconds)
        assert not (run / "result.json").exists()
    hosts.succeeds(1, "student", "--resume", "--out", run, cwd=tmp_path)
    assert_equal_runs(run, expected)
    print(f"\nstudent: {trials} killed ranks, all ended and went on; at most {longest:.1f} s after the kill")


# Cut links


@pytest.mark.parametrize("stage", ["teacher-cache", "student"])
def test_a_cut_of_five_seconds_changes_nothing(
    tiny: Path, hosts: Hosts, forks: Forks, one_cache: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "two"
    command = (
        make_cache_command(tiny, out, *DRAWS)
        if stage == "teacher-cache"
        else make_student_command(tiny / "cache", out, 100)
    )
    job = hosts.start(1, *command, cwd=tmp_path)
    job.wait_for(lambda: count_shards(out) > 3 if stage == "teacher-cache" else count_epochs(out) > 20)
    hosts.cut()
    time.sleep(5)
    hosts.mend()
    assert job.wait() == [0, 0], job.output
    if stage == "teacher-cache":
        assert_same_cache(out, one_cache)
    else:
        assert_equal_runs(out, train_on_one_host(forks, tiny, tmp_path, 100))


def test_a_cache_whose_link_is_cut_for_ever_ends_and_goes_on(
    tiny: Path, hosts: Hosts, one_cache: Path, tmp_path: Path, dose: Dose
) -> None:
    trials, longest = dose(1, 5), 0.0
    for trial in range(trials):
        out = tmp_path / f"two-{trial}"
        command = make_cache_command(tiny, out, *DRAWS)
        job = hosts.start(1, *command, cwd=tmp_path)
        job.wait_for(
            lambda out=out, trial=trial: (out / "unfinished.json").exists() and count_shards(out) >= 20 * trial
        )
        longest = max(longest, cut_until_ended(hosts, job, trial % 2))
        hosts.succeeds(1, *command, cwd=tmp_path)
        assert_same_cache(out, one_cache)
    print(f"\nstage one: {trials} cut links, all ended and went on; at most {longest:.1f} s after the cut")


def test_a_student_whose_link_is_cut_for_ever_ends_and_goes_on(
    tiny: Path, hosts: Hosts, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """Two ranks on each host: they are in a collective of gloo, which would wait for 10 minutes."""
    trials, longest = dose(1, 5), 0.0
    epochs = 40 * (trials + 1)
    done = forks.run_ranks(4, *make_student_command(tiny / "cache", tmp_path / "one", epochs), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command, run = make_student_command(tiny / "cache", tmp_path / "two", epochs), tmp_path / "two"
    for trial in range(trials):
        job = hosts.start(2, *processes.make_resume_command(run, command), cwd=tmp_path)
        job.wait_for(lambda trial=trial: count_epochs(run) >= 40 * trial + 20)
        longest = max(longest, cut_until_ended(hosts, job, trial % 2))
    hosts.succeeds(2, "student", "--resume", "--out", run, cwd=tmp_path)
    assert_equal_runs(run, tmp_path / "one")
    print(f"\nstudent: {trials} cut links, all ended and went on; at most {longest:.1f} s after the cut")
