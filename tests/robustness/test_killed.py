"""Whenever a process is killed, the files it published are complete, and the same command ends with the same files."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.helpers import processes
from tests.helpers.processes import (
    KILLED,
    ONE_DRAW,
    TWO_DRAWS,
    Forks,
    assert_equal_caches,
    assert_equal_runs,
    find_bad_shards,
    find_point,
    list_files,
    list_temporary_files,
    make_cache_command,
    make_resume_command,
    make_student_command,
    read_events,
    read_payloads,
    select_points,
    stat_shards,
    wait_until,
)

forks = processes.forks
Dose = Callable[[int, int], int]


# Stage one, at random moments


class Killer:
    """Kills a command that makes a cache, and counts results.

    Args:
        forks: starts the command.
        reference: the cache of an uninterrupted command.
        cache: the cache that the command makes.
        command: to kill.
        seconds: that the uninterrupted command took.
    """

    def __init__(self, forks: Forks, reference: Path, cache: Path, command: list[object], seconds: float):
        self.forks, self.reference, self.cache, self.command, self.seconds = forks, reference, cache, command, seconds
        self.expected = read_payloads(reference)
        self.random, self.count = Random(7), Counter[str]()

    def kill(self) -> bool:
        """Kill the command at a random time, or soon after some more shards exist. Returns False if it had ended."""
        cache, random, count, before = self.cache, self.random, self.count, stat_shards(self.cache)
        child, more = self.forks.start(*self.command), len(before) + random.randrange(len(self.expected) // 2)
        if random.random() < 0.3:
            time.sleep(random.uniform(0, self.seconds))
        else:
            wait_until(lambda: len(stat_shards(cache)) > more or (cache / "manifest.json").exists())
            time.sleep(random.uniform(0, 0.01))
        if child.kill() != KILLED:
            return False
        after = stat_shards(cache)
        count["kills"] += 1
        count["while shards were written"] += bool(after) and not (cache / "manifest.json").exists()
        count["bad"] += len(find_bad_shards(cache, self.expected))
        count["written again"] += sum(after.get(name) != stat for name, stat in before.items())
        cut = [name for name in list_temporary_files(cache) if "/.shard-" in name] if cache.exists() else []
        count["most cut"] = max(count["most cut"], len(cut))
        return True

    def tear_shard(self) -> set[str]:
        """Damage a shard in half of the trials, as a power cut could. Returns the set of damaged names."""
        shards = sorted(stat_shards(self.cache))
        if not shards or (self.cache / "manifest.json").exists() or self.random.random() < 0.5:
            return set()
        path = self.cache / (name := self.random.choice(shards))
        path.write_bytes(tear(path.read_bytes(), self.random))
        self.count["torn"] += 1
        return {name}

    def finish(self, torn: set[str]) -> None:
        """Run the same command to its end: of the existing shards it must replace the torn ones alone."""
        before, bad = stat_shards(self.cache), set(find_bad_shards(self.cache, self.expected))
        self.forks.succeeds(*self.command)
        replaced = {name for name, stat in before.items() if stat_shards(self.cache)[name] != stat}
        assert bad <= replaced <= torn
        assert_equal_caches(self.forks, self.cache, self.reference)
        self.count["caches"] += 1


def tear(text: bytes, random: Random) -> bytes:
    """Return a torn file: its beginning, its beginning and zeros, or all but one page."""
    point = random.randrange(len(text))
    page = slice(point // 4096 * 4096, point // 4096 * 4096 + 4096)
    lost = text[: page.start] + bytes(len(text[page])) + text[page.stop :]
    return random.choice((text[:point], text[:point].ljust(len(text), b"\0"), lost, lost))


def test_stage_one_killed_at_random_moments_goes_on_to_the_same_digests(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """Nothing but whole shards has a shard's name, none of them is written again, and one at most is cut. In half of
    the trials a shard is torn besides, as by a power cut: it is not accepted.
    """
    reference, cache, start = tmp_path / "whole/cache", tmp_path / "killed/cache", time.monotonic()
    small = ("--shard-rows", dose(30, 15))  # 48 shards, or 96
    forks.succeeds(*make_cache_command(tiny, reference, *small))
    killer = Killer(forks, reference, cache, make_cache_command(tiny, cache, *small), time.monotonic() - start)
    kills, count = dose(5, 100), killer.count
    while count["kills"] < kills:
        shutil.rmtree(cache, ignore_errors=True)
        for _ in range(killer.random.choice((1, 1, 2, 4))):
            if not killer.kill():
                break
        killer.finish(killer.tear_shard())
    print(
        f"\n{count['kills']} kills of stage one in {count['caches']} caches,"
        f" {count['while shards were written']} while shards were written: {count['bad']} bad shards,"
        f" {count['written again']} whole ones written again, at most {count['most cut']} cut and redone;"
        f" {count['torn']} torn besides, 0 accepted; digests equal"
    )
    assert (count["bad"], count["written again"]) == (0, 0)
    assert count["most cut"] <= 1
    assert count["while shards were written"] * 2 >= count["kills"] or kills < 20


# Stage one, at every call that changes the disk


def test_a_new_cache_killed_before_in_and_after_every_call_that_changes_the_disk(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """Before the manifest exists there is no cache; afterwards it is complete. The same command finishes it."""
    reference, cache, log = tmp_path / "whole/cache", tmp_path / "killed/cache", tmp_path / "log"
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW), trap={"log": str(log)})
    command = make_cache_command(tiny, cache, *ONE_DRAW)
    for point in (points := select_points(log, dose(3, 10**6))):
        shutil.rmtree(cache.parent, ignore_errors=True)
        where = read_events(log)[point - 1]
        assert forks.run(*command, trap={"at": point}).code == KILLED
        assert find_bad_shards(cache, read_payloads(reference)) == [], where
        if (cache / "manifest.json").exists():
            forks.succeeds("check-cache", cache)
        else:
            assert "no finished cache" in (error := forks.fails("check-cache", cache)) or "no cache" in error
        before = stat_shards(cache)
        again = forks.run(*command)
        assert again.code == 0, (where, again.output)
        assert before.items() <= stat_shards(cache).items(), where
        assert_equal_caches(forks, cache, reference)
    print(f"\na new cache killed at {len(points)} of {len(read_events(log))} points: whole or no cache, digests equal")


def test_a_growing_cache_killed_before_in_and_after_every_call_that_changes_the_disk(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """The old cache can be checked and trained from at any time; the result equals a cache made in one go."""
    one, two, cache, log = (tmp_path / name for name in ("one/cache", "two/cache", "killed/cache", "log"))
    forks.succeeds(*make_cache_command(tiny, two, *TWO_DRAWS))
    forks.succeeds(*make_cache_command(tiny, one, *ONE_DRAW))
    shutil.copytree(one, cache)
    forks.succeeds(*(command := make_cache_command(tiny, cache, *TWO_DRAWS)), trap={"log": str(log)})
    for point in (points := select_points(log, dose(3, 10**6))):
        shutil.rmtree(cache)
        shutil.copytree(one, cache)
        before, where = stat_shards(cache), read_events(log)[point - 1]
        assert forks.run(*command, trap={"at": point}).code == KILLED
        checked = forks.run("check-cache", cache)
        assert checked.code == 0, (where, checked.output)
        if point % 4 == 1:
            forks.succeeds(*make_student_command(cache, tmp_path / f"run-{point}", 1, "--draws", 1))
        again = forks.run(*command)
        assert again.code == 0, (where, again.output)
        assert before.items() <= stat_shards(cache).items(), where
        assert_equal_caches(forks, cache, two)
    print(
        f"\na growing cache killed at {len(points)} of {len(read_events(log))} points: always readable, digests equal"
    )


# A student


def kill_student(forks: Forks, run: Path, command: list[object], random: Random) -> bool:
    """Kill a run soon after some epoch of the student or the baseline. Returns False when it had ended before."""
    part = run / "baseline" if "--baseline" in command and random.random() < 0.5 else run
    child, epochs = forks.start(*make_resume_command(run, command)), random.randrange(1, 30)
    lines = part / "metrics.jsonl"
    wait_until(lambda: (run / "result.json").exists() or (lines.exists() and lines.read_text().count("\n") >= epochs))
    time.sleep(random.uniform(0, 0.02))
    return child.kill() == KILLED


def test_a_student_killed_at_random_moments_and_resumed_ends_with_the_same_weights(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    random, count, kills = Random(5), Counter[str](), dose(2, 20)
    while count["kills"] < kills:
        more = random.choice(((), ("--baseline",), ("--baseline", "--ema", 0.9)))
        reference, run = tmp_path / f"whole{''.join(map(str, more))}", tmp_path / f"run-{count['runs']}"
        if not reference.exists():
            forks.succeeds(*make_student_command(tiny / "cache", reference, 30, *more))
        command = make_student_command(tiny / "cache", run, 30, *more)
        for _ in range(random.choice((1, 2, 3))):
            if not kill_student(forks, run, command, random):
                break
            count["kills"] += 1
            count["while it was trained"] += (run / "metrics.jsonl").exists() and not (run / "result.json").exists()
        forks.succeeds(*make_resume_command(run, command))
        assert_equal_runs(run, reference)
        count["runs"] += 1
    print(
        f"\n{count['kills']} kills of {count['runs']} students, {count['while it was trained']} in the middle of"
        " training: weights equal to the bit"
    )
    assert count["while it was trained"] * 2 >= count["kills"] or kills < 20


def test_a_student_killed_before_in_and_after_every_call_that_changes_the_disk(
    tiny: Path, forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """A run that was killed before its settings exist is started by the same command, later by --resume."""
    reference, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    command = make_student_command(tiny / "cache", run, 2)
    forks.succeeds(*make_student_command(tiny / "cache", reference, 2), trap={"log": str(log)})
    for point in (points := select_points(log, dose(3, 10**6))):
        shutil.rmtree(run, ignore_errors=True)
        assert forks.run(*command, trap={"at": point}).code == KILLED
        again = forks.run(*make_resume_command(run, command))
        assert again.code == 0, (read_events(log)[point - 1], again.output)
        assert_equal_runs(run, reference)
    print(f"\na student killed at {len(points)} of {len(read_events(log))} points: weights equal to the bit")


# What a killed process leaves behind


def test_only_the_programs_own_temporary_files_are_removed(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    """Temporary names of files that are still to be written are removed; other names, folders and links are not."""
    reference, cache, log = tmp_path / "whole/cache", tmp_path / "killed/cache", tmp_path / "log"
    command = make_cache_command(tiny, cache, *ONE_DRAW)
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW), trap={"log": str(log)})
    point = find_point(log, "after", "replace", "val/shard-00000.h5")
    assert forks.run(*command, trap={"at": point}).code == KILLED
    ours = [f"draw-000/.shard-0000{i}.h5.12345.tmp" for i in (0, 1)] + ["val/.shard-00001.h5.7.tmp"]
    ours += [f".{name}.99.tmp" for name in ("manifest.json", "unfinished.json", "README.md", "head.h5")]
    theirs = ["draw-000/.shard-00000.h5.tmp", "notes.tmp", ".x.12.tmp", ".manifest.json.1a.tmp", "draw-000/notes.txt"]
    theirs += ["draw-000/.shard-00009.h5.5.tmp", "val/shard-00000.h5.3.tmp", "other/.shard-00000.h5.5.tmp"]
    (cache / "other").mkdir()
    for name in (*ours, *theirs):
        (cache / name).write_text(name)
    (cache / "draw-000/.shard-00001.h5.8.tmp").mkdir()
    (link := cache / "draw-000/.shard-00001.h5.9.tmp").symlink_to(cache / "notes.tmp")
    forks.succeeds(*command)
    assert not [name for name in ours if (cache / name).exists()]
    assert all((cache / name).read_text() == name for name in theirs)
    assert (cache / "draw-000/.shard-00001.h5.8.tmp").is_dir()
    assert link.is_symlink()
    forks.succeeds("check-cache", cache)
    assert read_payloads(cache) == read_payloads(reference)


@pytest.mark.parametrize("name", ["notes.tmp", ".x.12.tmp", "thesis.txt", "draw-000/notes.txt", "a/b/.c.h5.1.tmp"])
def test_a_folder_with_other_peoples_files_is_refused_and_left_as_it_is(
    tiny: Path, forks: Forks, tmp_path: Path, name: str
) -> None:
    (mine := tmp_path / "place" / name).parent.mkdir(parents=True)
    mine.write_text("mine")
    error = forks.fails(*make_cache_command(tiny, tmp_path / "place", *ONE_DRAW))
    assert f"holds {name} and no cache: choose another --out" in error
    assert list_files(tmp_path / "place") == {name}
    assert mine.read_text() == "mine"


def test_a_run_that_goes_on_removes_its_own_temporary_files_alone(tiny: Path, forks: Forks, tmp_path: Path) -> None:
    reference, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    forks.succeeds(*make_student_command(tiny / "cache", reference, 2), trap={"log": str(log)})
    point = find_point(log, "after", "replace", "metrics.jsonl")
    assert forks.run(*make_student_command(tiny / "cache", run, 2), trap={"at": point}).code == KILLED
    names = ("settings.json", "cache.json", "checkpoint.pt", "metrics.jsonl", "student.pt", "result.json")
    theirs = ["notes.tmp", ".x.12.tmp", ".checkpoint.pt.tmp", ".student.pt.1a.tmp"]
    for name in (*(f".{name}.12.tmp" for name in names), *theirs):
        (run / name).write_text(name)
    forks.succeeds("student", "--resume", "--out", run)
    assert list_files(run) == list_files(reference) | set(theirs)
    assert (run / "student.pt").read_bytes() == (reference / "student.pt").read_bytes()


def test_sigterm_ends_both_stages_at_once_with_one_line_and_nothing_left_over(
    tiny: Path, forks: Forks, tmp_path: Path
) -> None:
    """A scheduler ends a job by SIGTERM: exit code 130, and the same command or --resume continues."""
    reference, cache, run = tmp_path / "whole/cache", tmp_path / "killed/cache", tmp_path / "run"
    small = ("--shard-rows", 30)
    forks.succeeds(*make_cache_command(tiny, reference, *small))
    child = forks.start(*make_cache_command(tiny, cache, *small))
    wait_until(lambda: len(stat_shards(cache)) > 9)
    assert child.terminate() == 130, child.output
    assert "of 48 shards; continue with" in child.error
    assert [*list_temporary_files(cache), *cache.glob(".lock")] == []
    forks.succeeds(*make_cache_command(tiny, cache, *small))
    assert_equal_caches(forks, cache, reference)

    child = forks.start(*make_student_command(cache, run, 10_000))
    wait_until(lambda: (run / "metrics.jsonl").exists())
    assert child.terminate() == 130, child.output
    assert f"student --resume --out {run}" in child.error
    assert [*list_temporary_files(run), *run.glob(".lock")] == []
    assert json.loads((run / "settings.json").read_text())["epochs"] == 10_000
