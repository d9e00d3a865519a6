"""Valid files in the wrong place: exchanged shards, shards of another cache, and manifests of an earlier time."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from softcache.pipeline.cache.writer import CacheWriter
from softcache.stages.main import main
from tests.helpers.commands import Stages, tiny_cache_command
from tests.helpers.damage import SHARD, find_shard, flip_bit, read_manifest, update_shard_record

STUDENT_OPTIONS = ("--arch", "mlp:8", "--epochs", 3, "--out", "r")
TWIN = "draw-002/shard-00001.h5"  # the same rows as SHARD in another draw


def damage_bit(path: Path) -> None:
    flip_bit(path, 8 * (path.stat().st_size // 2) + 2)


def pad_to_equal_size(cache: Path) -> None:
    """Pad SHARD and TWIN, whose sizes differ by a few bytes of a measured time."""
    for name in (SHARD, TWIN):
        with h5py.File(cache / name, "r+") as file:
            file.attrs["facts"] = np.bytes_(file.attrs["facts"].ljust(300))
        update_shard_record(cache, name)
    assert (cache / SHARD).stat().st_size == (cache / TWIN).stat().st_size


def swap(cache: Path) -> None:
    (cache / SHARD).rename(cache / "moved")
    (cache / TWIN).rename(cache / SHARD)
    (cache / "moved").rename(cache / TWIN)


def test_two_shards_of_one_size_that_were_exchanged_are_both_named(cache: Path, stages: Stages) -> None:
    """They are the same rows of the same images in two draws, which only the checksum distinguishes."""
    pad_to_equal_size(cache)
    stages("check-cache", cache)
    swap(cache)
    assert "damaged, its checksum is" in stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)
    _, out, err = stages.call("check-cache", cache)
    assert [line.partition(":")[0] for line in out.splitlines() if ": good" not in line] == [SHARD, TWIN]
    assert "2 of 15 files are bad" in err


def test_exchanged_shards_whose_checksums_were_mended_say_themselves_where_they_belong(
    cache: Path, stages: Stages
) -> None:
    record = read_manifest(cache)
    swap(cache)
    for name, other in ((SHARD, TWIN), (TWIN, SHARD)):
        its = find_shard(record, other)
        update_shard_record(cache, name, payload=its["payload"], correct=its["correct"])
    line = stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)
    assert "its draw is " in line
    assert "a shard of another place" in line
    out = stages.call("check-cache", cache)[1]
    assert f"{SHARD}: '" not in out
    assert out.count("a shard of another place") == 2


@pytest.fixture(scope="module")
def others(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two more caches of the same shape: `seed` with other views and another order, `teacher` of another teacher."""
    folder = tmp_path_factory.mktemp("others")
    command = tiny_cache_command(tiny)[:-1]
    main([*command, f"{folder}/seed", "--seed", "1"])
    main(["teacher", "--train-size", "300", "--arch", "cnn", "--epochs", "2", "--seed", "1", "--out", f"{folder}/t"])
    main([*command, f"{folder}/teacher", "--weights", f"{folder}/t"])
    return folder


@pytest.mark.parametrize("which", ["seed", "teacher"])
def test_a_shard_of_another_cache_is_named(cache: Path, others: Path, stages: Stages, which: str) -> None:
    """Unchanged, with an updated checksum, and with all digests and its fingerprint updated."""
    mine = read_manifest(cache)
    its = find_shard(read_manifest(others / which))
    shutil.copy(others / which / SHARD, cache / SHARD)
    for reason in ("instead of", "its fingerprint is", ""):
        if reason == "its fingerprint is":
            update_shard_record(cache, payload=its["payload"], correct=its["correct"])
        elif not reason:
            with h5py.File(cache / SHARD, "r+") as file:
                file.attrs["fingerprint"] = np.bytes_(mine["fingerprint"])
            update_shard_record(cache)
            reason = "not in the order of this cache"
            if which == "teacher":
                continue  # valid rows of the same views: only the teacher can reveal it
        line = stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)
        assert SHARD in line
        assert reason in line
        assert f"{SHARD}: {cache}" in stages.call("check-cache", cache)[1]
        shutil.rmtree("r", ignore_errors=True)


# A manifest of another time


def grow(tiny: Path, cache: Path, stages: Stages, *more: object) -> None:
    stages(*tiny_cache_command(tiny)[:-1], cache, *more)


@pytest.mark.parametrize("more", [("--draws", 4), ("--taps", "pool1,flatten,conv1")])
def test_the_manifest_from_before_a_growth_is_refused_beside_the_newer_shards(
    tiny: Path, cache: Path, stages: Stages, more: tuple[object, ...]
) -> None:
    """Otherwise a student would silently train on fewer draws than there are."""
    before = (cache / "manifest.json").read_bytes()
    files = set(cache.rglob("*.h5"))
    grow(tiny, cache, stages, *more)
    added = sorted(str(path.relative_to(cache)) for path in set(cache.rglob("*.h5")) - files)
    stages("check-cache", cache)
    now = (cache / "manifest.json").read_bytes()
    (cache / "manifest.json").write_bytes(before)
    for arguments in (("student", "--cache", cache, *STUDENT_OPTIONS), ("check-cache", cache)):
        line = stages.fails(1, *arguments)
        assert added[0] in line
        assert "an older manifest.json, or files of another cache" in line
    (cache / "manifest.json").write_bytes(now)
    stages("check-cache", cache)


def test_a_manifest_from_before_a_repair_is_refused(tiny: Path, cache: Path, stages: Stages) -> None:
    """The repaired shard holds the same rows, but its checksum is not the one in the manifest."""
    before = (cache / "manifest.json").read_bytes()
    damage_bit(cache / SHARD)
    stages("check-cache", cache, "--repair", "--weights", tiny / "runs/teacher")
    (cache / "manifest.json").write_bytes(before)
    line = stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)
    assert SHARD in line
    assert "instead of" in line
    assert f"{SHARD}: good" not in stages.call("check-cache", cache)[1]
    stages.fails(1, "check-cache", cache)


@pytest.mark.parametrize("which", ["seed", "teacher"])
def test_the_manifest_of_another_cache_is_refused(cache: Path, others: Path, stages: Stages, which: str) -> None:
    shutil.copy(others / which / "manifest.json", cache / "manifest.json")
    line = stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS)
    assert ".h5: " in line or "other data" in line
    assert "instead of" in line or "other data" in line
    assert ": good" not in stages.call("check-cache", cache)[1]
    stages.fails(1, "check-cache", cache)


def test_the_manifest_of_a_larger_cache_names_what_is_missing(tiny: Path, cache: Path, stages: Stages) -> None:
    grow(tiny, cache, stages, "--draws", 4)
    shutil.rmtree(cache / "draw-003")
    line = stages.fails(1, "student", "--cache", cache, *STUDENT_OPTIONS, "--epochs", 4)
    assert "draw-003/shard-0000" in line
    assert "No such file" in line
    assert "3 of 18 files are bad" in stages.fails(1, "check-cache", cache)


@pytest.fixture
def growing(tiny: Path, cache: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete cache of three draws, to which adding a fourth was stopped after two shards."""
    write_shard = CacheWriter.write_shard
    added: list[object] = []

    def write_twice(self: CacheWriter, *arguments: object) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(arguments)
        write_shard(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", write_twice)
        stages.fails(130, *tiny_cache_command(tiny)[:-1], cache, "--draws", 4)
    return cache


def test_an_addition_that_is_not_finished_stops_no_student_and_check_cache_tells_it(
    tiny: Path, growing: Path, stages: Stages
) -> None:
    assert (growing / "unfinished.json").exists()
    stages("student", "--cache", growing, *STUDENT_OPTIONS)
    code, out, _ = stages.call("check-cache", growing)
    assert code == 0
    assert "draw-003/shard-00000.h5: of an addition that is not finished" in out
    assert "draw-003/shard-00001.h5: of an addition that is not finished" in out
    grow(tiny, growing, stages, "--draws", 4)
    assert not (growing / "unfinished.json").exists()
    assert json.loads((growing / "manifest.json").read_text())["draws"] == 4
    assert "not finished" not in stages.call("check-cache", growing)[1]


def test_an_unfinished_addition_does_not_hide_damage(growing: Path, stages: Stages) -> None:
    damage_bit(growing / SHARD)
    assert SHARD in stages.fails(1, "student", "--cache", growing, *STUDENT_OPTIONS)
    code, out, _ = stages.call("check-cache", growing)
    assert code == 1
    assert f"{SHARD}: {growing}" in out
