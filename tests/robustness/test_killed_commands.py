"""The other commands that write: killed at any call that changes the disk, each goes on and ends as it would have."""

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
    cache_command,
    events,
    files,
    going_on,
    payloads,
    student_command,
    sweep,
)

forks = processes.forks
Dose = Callable[[int, int], int]
Command = list[object]


def killed_and_run_again(
    forks: Forks, folder: Path, prepare: Callable[[], object], command: Command, check: Callable[[], object], most: int
) -> str:
    """Kill a command that writes below folder at its points, run it again, or --resume it, and check. In words."""
    log = folder.with_name("log")
    prepare()
    forks.succeeds(*command, trap={"log": str(log)})
    check()
    for at in (points := sweep(log, most)):
        shutil.rmtree(folder)
        prepare()
        assert forks.run(*command, trap={"at": at}).code == KILLED
        again = forks.run(*(going_on(folder, command) if command[0] == "student" else command))
        assert again.code == 0, (events(log)[at - 1], again.output)
        check()
    return f"killed at {len(points)} of {len(events(log))} points"


def test_a_killed_repair_is_repaired_again(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    """The same rows as before; nothing left over."""
    whole, cache = tmp_path / "whole/cache", tmp_path / "killed/cache"
    forks.succeeds(*cache_command(tiny, whole, *ONE_DRAW))

    def damage() -> None:
        shutil.copytree(whole, cache)
        for name in ("val/shard-00000.h5", "draw-000/shard-00001.h5"):
            (cache / name).write_bytes((whole / name).read_bytes()[:-100])

    def check() -> None:
        assert_equal_caches(forks, cache, whole)

    command: Command = ["check-cache", cache, "--repair", "--weights", tiny / "runs/teacher"]
    print(f"\nrepair {killed_and_run_again(forks, cache, damage, command, check, dose(1, 10**6))}: digests equal")


def test_a_killed_unpack_goes_on(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    whole, cache, tar = tmp_path / "whole/cache", tmp_path / "killed/cache", tmp_path / "cache.tar"
    forks.succeeds(*cache_command(tiny, whole, *ONE_DRAW))
    forks.succeeds("cache-pack", whole, tar)
    cache.parent.mkdir()
    said = killed_and_run_again(
        forks,
        cache.parent,
        lambda: None,
        ["cache-unpack", tar, cache],
        lambda: assert_equal_caches(forks, cache, whole),
        dose(1, 65),
    )
    print(f"\nunpack {said}: digests equal")


def test_a_killed_cache_that_trains_its_own_teacher_goes_on_with_that_teacher(
    forks: Forks, tmp_path: Path, dose: Dose
) -> None:
    """The same command ends with the teacher's same weights and the same digests, whichever of both was under way."""
    whole, cache = tmp_path / "whole/cache", tmp_path / "killed/cache"
    command: Command = ["teacher-cache", "--train-size", 150, "--teacher", "mlp:8", *ONE_DRAW, "--out"]
    forks.succeeds(*command, whole)

    def check() -> None:
        assert files(cache.parent) == files(whole.parent)
        assert payloads(cache) == payloads(whole)
        mine, theirs = (folder.with_name("cache-teacher") / "teacher.pt" for folder in (cache, whole))
        assert mine.read_bytes() == theirs.read_bytes()

    said = killed_and_run_again(forks, cache.parent, lambda: None, [*command, cache], check, dose(1, 20))
    print(f"\na cache with a teacher of its own {said}: weights and digests equal")


def test_a_killed_run_of_several_seeds_goes_on(tiny: Path, forks: Forks, tmp_path: Path, dose: Dose) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ("--seeds", 2, "--baseline")
    forks.succeeds(*student_command(tiny / "cache", whole, 1, *more))
    said = killed_and_run_again(
        forks,
        run,
        lambda: None,
        student_command(tiny / "cache", run, 1, *more),
        lambda: assert_equal_runs(run, whole),
        dose(1, 40),
    )
    print(f"\na run of two seeds {said}: weights equal to the bit")
