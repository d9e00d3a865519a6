"""Other commands that write, killed at any call that changes the disk, continue and end with the same files."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.helpers import processes
from tests.helpers.processes import (
    KILLED,
    ONE_DRAW,
    Forks,
    assert_equal_caches,
    assert_equal_runs,
    list_files,
    make_cache_command,
    make_resume_command,
    make_student_command,
    read_events,
    read_payloads,
    select_points,
)

forks = processes.forks
Dose = Callable[[int, int], int]
Command = list[object]


def kill_and_rerun(
    forks: Forks, folder: Path, prepare: Callable[[], object], command: Command, check: Callable[[], object], most: int
) -> str:
    """Kill a command at each of its points, run it again or resume it, and check. Returns a summary.

    Args:
        forks: starts the command.
        folder: the command writes below it; it is removed before each trial.
        prepare: called before each trial.
        command: to kill.
        check: called after the second run.
        most: number of points, about.
    """
    log = folder.with_name("log")
    prepare()
    forks.succeeds(*command, trap={"log": str(log)})
    check()
    for point in (points := select_points(log, most)):
        shutil.rmtree(folder)
        prepare()
        assert forks.run(*command, trap={"at": point}).code == KILLED
        again = forks.run(*(make_resume_command(folder, command) if command[0] == "student" else command))
        assert again.code == 0, (read_events(log)[point - 1], again.output)
        check()
    return f"killed at {len(points)} of {len(read_events(log))} points"


def test_a_killed_repair_is_repaired_again(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    """The repaired cache has the same rows, and no other file."""
    reference, cache = tmp_path / "whole/cache", tmp_path / "killed/cache"
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW))

    def damage() -> None:
        shutil.copytree(reference, cache)
        for name in ("val/shard-00000.h5", "draw-000/shard-00001.h5"):
            (cache / name).write_bytes((reference / name).read_bytes()[:-100])

    def check() -> None:
        assert_equal_caches(forks, cache, reference)

    command: Command = ["check-cache", cache, "--repair", "--weights", tiny / "runs/teacher"]
    print(f"\nrepair {kill_and_rerun(forks, cache, damage, command, check, dose(1, 10**6))}: digests equal")


def test_a_killed_unpack_goes_on(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    reference, cache, tar = tmp_path / "whole/cache", tmp_path / "killed/cache", tmp_path / "cache.tar"
    forks.succeeds(*make_cache_command(tiny, reference, *ONE_DRAW))
    forks.succeeds("cache-pack", reference, tar)
    cache.parent.mkdir()
    summary = kill_and_rerun(
        forks,
        cache.parent,
        lambda: None,
        ["cache-unpack", tar, cache],
        lambda: assert_equal_caches(forks, cache, reference),
        dose(1, 65),
    )
    print(f"\nunpack {summary}: digests equal")


def test_a_killed_cache_that_trains_its_own_teacher_goes_on_with_that_teacher(
    forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """The same command ends with the same teacher and the same digests, whichever stage was killed."""
    reference, cache = tmp_path / "whole/cache", tmp_path / "killed/cache"
    command: Command = ["teacher-cache", "--train-size", 150, "--teacher", "mlp:8", *ONE_DRAW, "--out"]
    forks.succeeds(*command, reference)

    def check() -> None:
        assert list_files(cache.parent) == list_files(reference.parent)
        assert read_payloads(cache) == read_payloads(reference)
        teacher, expected_teacher = (folder.with_name("cache-teacher") / "teacher.pt" for folder in (cache, reference))
        assert teacher.read_bytes() == expected_teacher.read_bytes()

    summary = kill_and_rerun(forks, cache.parent, lambda: None, [*command, cache], check, dose(1, 20))
    print(f"\na cache with a teacher of its own {summary}: weights and digests equal")


def test_a_killed_run_of_several_seeds_goes_on(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    reference, run = tmp_path / "whole", tmp_path / "run"
    more = ("--seeds", 2, "--baseline")
    forks.succeeds(*make_student_command(tiny / "cache", reference, 1, *more))
    summary = kill_and_rerun(
        forks,
        run,
        lambda: None,
        make_student_command(tiny / "cache", run, 1, *more),
        lambda: assert_equal_runs(run, reference),
        dose(1, 40),
    )
    print(f"\na run of two seeds {summary}: weights equal to the bit")
