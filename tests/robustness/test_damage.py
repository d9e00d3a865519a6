"""A damaged cache is an error before a row is used: flipped bits, changed lengths, and entries that are not files."""

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from softcache.base.errors import CacheError
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages
from tests.helpers.damage import SHARD, flip_bit
from tests.helpers.trial import attempt, get_both_error_lines

STUDENT_OPTIONS = ("--arch", "mlp:8", "--epochs", 3, "--out", "r")
TWIN = "draw-002/shard-00001.h5"  # the same rows as SHARD in another draw
Dose = Callable[[int, int], int]
Damage = Callable[[Path], None]


def choose_bit(draw: random.Random, folder: Path) -> tuple[str, int]:
    """Choose a file, the manifest in half of the trials, and one of its bits, more often near the start or the end."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.h5"))
    name = "manifest.json" if draw.random() < 0.5 else draw.choice(files)
    size = (folder / name).stat().st_size
    low, high = draw.choice([(0, size), (0, min(size, 2048)), (max(0, size - 4096), size)])
    return name, 8 * draw.randrange(low, high) + draw.randrange(8)


def test_any_flipped_bit_is_reported_before_a_row_is_used(cache: Path, stages: Stages, dose: Dose) -> None:
    """Each trial runs in its own process with a time limit; every tenth trial also runs the commands."""
    draw, trials, errors = random.Random(20), dose(60, 1000), get_both_error_lines(cache)
    assert errors == ["", ""]
    counts, slowest, commands = dict.fromkeys(("manifest", "head", "shards"), 0), 0.0, 0
    for trial in range(trials):
        name, bit = choose_bit(draw, cache)
        flip_bit(cache / name, bit)
        outcome = attempt(lambda name=name: get_both_error_lines(cache, name))  # type: ignore[misc]
        assert not outcome.failure, (name, bit, outcome.failure)
        student_error, check_error = outcome.value
        assert name in check_error, (name, bit, check_error)
        assert name in student_error or name == "head.h5", (
            name,
            bit,
            student_error,
        )  # a student does not read the head
        if trial % 10 == 0:
            commands += 1
            assert name in "".join(stages.call("check-cache", cache)[1:])
            stages.fails(1, "check-cache", cache)
            if name != "head.h5":
                assert name in stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)
                assert not Path("r/student.pt").exists()
                shutil.rmtree("r", ignore_errors=True)
        flip_bit(cache / name, bit)
        counts["manifest" if name == "manifest.json" else "head" if name == "head.h5" else "shards"] += 1
        slowest = max(slowest, outcome.seconds)
    assert get_both_error_lines(cache) == ["", ""]
    places = ", ".join(f"{count} in {place}" for place, count in counts.items())
    print(
        f"flipped bits: {trials} of {trials} reported ({places}), {commands} by the commands; slowest {slowest:.2f} s"
    )


def damage_bit(path: Path) -> None:
    flip_bit(path, 8 * (path.stat().st_size // 2) + 2)


def cut_by_one(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def append_junk(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"junk")


def remove(path: Path) -> None:
    path.unlink()


def replace_by_twin(path: Path) -> None:
    shutil.copy(path.parent.parent / TWIN, path)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_bit, "damaged, its checksum is"),
        (cut_by_one, "the file was cut or appended to"),
        (cut_in_half, "the file was cut or appended to"),
        (cut_to_nothing, "0 bytes instead of"),
        (append_junk, "the file was cut or appended to"),
        (remove, "cannot be opened as a plain file (No such file"),
        (replace_by_twin, "instead of"),
        (replace_by_link, "cannot be opened as a plain file"),
        (replace_by_pipe, "not a plain file"),
        (replace_by_folder, "not a plain file"),
    ],
)
def test_a_damaged_shard_is_named_by_the_student_and_by_check_cache(
    cache: Path, stages: Stages, damage: Damage, reason: str
) -> None:
    """Each reports one line, and no other file."""
    damage(cache / SHARD)
    line = stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)
    assert reason in line
    assert SHARD in line
    assert not Path("r/student.pt").exists()
    code, out, err = stages.call("check-cache", cache)
    assert code == 1
    assert reason in next(found for found in out.splitlines() if found.startswith(f"{SHARD}: "))
    assert out.count(": good") == 14
    assert "1 of 15 files are bad" in err


@pytest.mark.parametrize("damage", [damage_bit, cut_by_one, cut_in_half, cut_to_nothing, append_junk])
def test_a_damaged_manifest_is_named_by_both(cache: Path, stages: Stages, damage: Damage) -> None:
    damage(cache / "manifest.json")
    for arguments in (("student", "--cache", cache, *STUDENT_OPTIONS), ("check-cache", cache)):
        assert "manifest.json: " in stages.fails(1, *arguments)


@pytest.mark.parametrize("damage", [damage_bit, remove, replace_by_pipe])
def test_a_damaged_head_is_named_by_check_cache_and_does_not_stop_a_student(
    cache: Path, stages: Stages, damage: Damage
) -> None:
    damage(cache / "head.h5")
    stages("student", "--cache", cache, *STUDENT_OPTIONS)
    code, out, _ = stages.call("check-cache", cache)
    assert code == 1
    assert "head.h5: good" not in out
    assert out.count(": good") == 14


def test_a_student_that_uses_fewer_draws_is_not_stopped_by_the_others(cache: Path, stages: Stages) -> None:
    (cache / TWIN).unlink()
    stages("student", "--cache", cache, *STUDENT_OPTIONS, "--draws", 2)
    stages.fails(1, "check-cache", cache)


def test_a_deep_check_blames_the_damaged_shard_and_not_its_neighbours(cache: Path, stages: Stages) -> None:
    damage_bit(cache / SHARD)
    _, out, err = stages.call("check-cache", cache, "--deep")
    assert out.count(": good") == 14
    assert "1 of 15 files are bad" in err


# Under a running reader


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(cache: Path) -> None:
    opened = CacheReader(cache)
    shard = opened._rows.get_shard(next(r for r in opened.manifest.shards if r.path == SHARD))
    os.truncate(cache / SHARD, 500)
    with pytest.raises(CacheError, match="it was cut after it was opened"):
        shard.read_all()


def test_shards_that_are_cut_under_a_student_end_its_training_with_one_line(cache: Path, tmp_path: Path) -> None:
    """Of the three draws two are kept in memory; the third is read from the cut files."""

    def cut() -> None:
        while not (tmp_path / "r/checkpoint.pt").exists():
            time.sleep(0.01)
        for path in cache.glob("draw-*/*.h5"):
            os.truncate(path, 500)

    def train() -> None:
        os.chdir(tmp_path)
        threading.Thread(target=cut, daemon=True).start()
        arguments = ["student", "--cache", str(cache), "--arch", "mlp:8", "--epochs", "100000", "--out", "r"]
        from softcache.stages.main import commands

        commands.main(arguments, prog_name="softcache", standalone_mode=False)

    outcome = attempt(train, limit=60)
    assert not outcome.failure
    assert "it was cut after it was opened" in outcome.error_line or "0 bytes instead of" in outcome.error_line, (
        outcome.error_line
    )
    assert "shard-0000" in outcome.error_line
