"""A bad shard is reported, and `--repair` computes that one again and no other."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softcache.pipeline.cache.manifest import Manifest
from tests.helpers.caches import (
    CACHE_COMMAND,
    interrupt_after_shards,
    make_folder_with_cache,
    read_payloads,
    record_computed_shards,
    shift_one_pixel,
    stat_files,
    stat_tree,
)
from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit

REPAIR = ("check-cache", "c", "--repair", "--weights", "teacher")
SHARDS = 2 * 2 + 1 + 2
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and 2 taps, one of them added later: 15 files."""
    folder = make_folder_with_cache(tiny, tmp_path_factory.mktemp("made"), "--draws", "2", "--taps", "pool2")
    return make_folder_with_cache(tiny, folder, "--taps", "flatten")


@pytest.fixture
def small(made: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of the cache `c` in the folder of the test."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def flip(path: Path) -> None:
    flip_bit(path, 8 * (path.stat().st_size // 2))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """With the next shard of the same folder."""
    other = path.with_name(path.name.replace("00000", "00001"))
    content, other_content = path.read_bytes(), other.read_bytes()
    path.write_bytes(other_content)
    other.write_bytes(content)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    shutil.copy(path, "elsewhere.h5")
    path.unlink()
    path.symlink_to(Path("elsewhere.h5").resolve())


def find_bad_files(stages: Stages, *more: object) -> set[str]:
    """The files that check-cache reports as bad; its exit code must agree."""
    code, out, err = stages.call("check-cache", "c", "--json", *more)
    verdicts = json.loads(out)["shards"]
    bad = {name for name, verdict in verdicts.items() if verdict != "good"}
    assert all(name in verdicts[name] for name in bad)
    assert code == (1 if bad else 0), err
    assert len(verdicts) == 2 * SHARDS + 1
    return bad


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "draw-001/shard-00000.h5"),
        (cut, "draw-000/shard-00000.h5"),
        (remove, "val/shard-00000.h5"),
        (swap, "draw-001/shard-00000.h5"),
        (replace_by_pipe, "test/shard-00000.h5"),
        (replace_by_link, "draw-000/shard-00000.h5"),
        (flip, "draw-000/shard-00000-1.h5"),
        (swap, "test/shard-00000-1.h5"),
    ],
)
def test_only_the_bad_shard_is_reported_and_repaired(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, damage: Damage, name: str
) -> None:
    before, expected = stat_files(small), read_payloads(small)
    damage(small / name)
    bad = {name, name.replace("00000", "00001")} if damage is swap else {name}
    assert find_bad_files(stages) == bad
    computed = record_computed_shards(monkeypatch)
    stages(*REPAIR)
    assert set(computed) == bad
    assert len(computed) == len(bad)
    after = stat_files(small)
    assert {n for n in before if after[n] != before[n]} == bad | {"manifest.json"}
    assert read_payloads(small) == expected
    assert find_bad_files(stages) == set()


def select_shards(small: Path, *endings: str) -> list[str]:
    return [name for name in read_payloads(small) if name.endswith(endings) or name.startswith(endings)]


@pytest.mark.parametrize(
    "which",
    [
        ("draw-001/",),
        ("-1.h5",),
        ("0.h5", "1-1.h5"),
        (".h5",),
    ],
    ids=["a draw", "all that was added later", "half of them", "everything"],
)
def test_many_bad_shards_are_repaired(small: Path, stages: Stages, which: tuple[str, ...]) -> None:
    expected, bad = read_payloads(small), select_shards(small, *which)
    for i, name in enumerate(bad):
        (flip, cut, remove)[i % 3](small / name)
    assert find_bad_files(stages) == set(bad)
    stages(*REPAIR)
    assert read_payloads(small) == expected
    assert find_bad_files(stages, "--deep") == set()
    stages("student", "--cache", "c", "--arch", "mlp:8", "--epochs", "2")


@pytest.mark.parametrize("damage", [flip, remove])
def test_the_teachers_head_is_repaired(small: Path, stages: Stages, damage: Damage) -> None:
    before, head = stat_files(small), (small / "head.h5").read_bytes()
    damage(small / "head.h5")
    assert find_bad_files(stages) == {"head.h5"}
    stages(*REPAIR)
    assert find_bad_files(stages) == set()
    assert (small / "head.h5").read_bytes() == head
    after = stat_files(small)
    assert {n for n in before if after[n] != before[n]} == {"head.h5", "manifest.json"}


def test_repairing_an_intact_cache_computes_and_writes_nothing(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, computed = stat_tree(small), record_computed_shards(monkeypatch)
    stages(*REPAIR)
    assert computed == []
    assert stat_tree(small) == before


def test_other_weights_are_refused_with_both_digests_and_nothing_is_changed(small: Path, stages: Stages) -> None:
    state = torch.load("teacher/teacher.pt", weights_only=True)
    state["linear.bias"][0] += 1e-3
    torch.save(state, "other.pt")
    (small / "val/shard-00000.h5").unlink()
    before = stat_files(small)
    line = stages.fails(1, *REPAIR[:-1], "other.pt")
    record = json.loads((small / "manifest.json").read_text())
    assert "teacher.weights" in line
    assert record["identity"]["teacher"]["weights"][:16] in line
    assert len(set(re.findall(r"([0-9a-f]{16})…", line))) == 2
    assert stat_files(small) == before


def test_without_weights_nothing_is_repaired_and_the_message_names_the_option(small: Path, stages: Stages) -> None:
    (small / "val/shard-00000.h5").unlink()
    before = stat_files(small)
    line = stages.fails(1, "check-cache", "c", "--repair")
    assert "cannot be repaired without the teacher" in line
    assert "--weights" in line
    assert "--repair --weights" in stages.fails(1, "check-cache", "c")
    assert stat_files(small) == before


def test_the_teacher_in_the_folder_beside_the_cache_is_used(small: Path, stages: Stages) -> None:
    Path("teacher").rename("c-teacher")
    cut(small / "val/shard-00000.h5")
    stages("check-cache", "c", "--repair")
    assert find_bad_files(stages, "--deep") == set()


def test_a_damaged_manifest_is_not_repaired_and_the_message_says_what_to_do(small: Path, stages: Stages) -> None:
    flip(small / "manifest.json")
    line = stages.fails(1, *REPAIR)
    assert "manifest.json: " in line
    assert "Put it back from a copy" in line
    assert "run the same teacher-cache command" in line


def test_code_that_a_cache_names_is_not_run_until_the_user_names_it_too(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_teacher.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path('was_run').touch()\n"
        "def make(classes, channels, size):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    torch.save({"1.weight": torch.eye(10, 64), "1.bias": torch.zeros(10)}, "w.pt")
    command = ("teacher-cache", "--train-size", "50", "--teacher", "my_teacher:make", "--weights", "w.pt")
    stages(*command, "--out", "c")
    shard = tmp_path / "c/val/shard-00000.h5"
    shard.unlink()
    Path("was_run").unlink()
    monkeypatch.delitem(sys.modules, "my_teacher")
    for more in (("--repair",), ("--deep", "--repair")):
        line = stages.fails(2, "check-cache", "c", *more, "--weights", "w.pt")
        assert "name it with  " in line
        assert line.endswith("--teacher my_teacher:make")
    printed = shlex.split(line.partition("name it with  ")[2])
    line = stages.fails(2, "check-cache", "c", "--repair", "--teacher", "mlp:8", "--weights", "w.pt")
    assert "--teacher mlp:8, but the cache 'c' is of my_teacher:make" in line
    assert not Path("was_run").exists()
    assert not shard.exists()
    stages(*printed[printed.index("softcache") + 1 :])
    assert shard.exists()
    assert Path("was_run").exists()


@pytest.mark.parametrize(
    ("bad", "deep"),
    [(("draw-001/shard-00000.h5", "head.h5"), ()), (("val/shard-00000.h5",), ("--deep",)), ((), ("--deep",))],
)
def test_views_that_come_out_differently_are_refused_before_anything_is_written(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...], deep: tuple[str, ...]
) -> None:
    """Also with --deep, for which every shard's views are different: the files are right, and stay."""
    for name in bad:
        flip(small / name)
    before = stat_files(small)
    with monkeypatch.context() as patch:
        shift_one_pixel(patch)
        assert "come out differently here" in stages.fails(1, *REPAIR, *deep)
    assert stat_files(small) == before
    stages(*REPAIR)
    assert find_bad_files(stages, "--deep") == set()


def test_a_repair_that_is_interrupted_between_shard_and_manifest_can_be_repeated(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_payloads(small)
    bad = {"draw-000/shard-00001.h5", "test/shard-00001-1.h5"}
    for name in bad:
        cut(small / name)

    def interrupt(self: Manifest, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", interrupt)
        assert stages.call(*REPAIR)[0] == 130
    assert find_bad_files(stages) == bad
    stages(*REPAIR)
    assert read_payloads(small) == expected
    assert find_bad_files(stages, "--deep") == set()


def test_a_cache_is_repaired_while_an_addition_to_it_is_unfinished(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addition is then continued from the repaired cache."""
    with monkeypatch.context() as patch:
        interrupt_after_shards(1, patch)
        stages.fails(130, *CACHE_COMMAND, "--draws", "4", "--out", "c")
    (small / "draw-000/shard-00000.h5").unlink()
    stages(*REPAIR)
    assert find_bad_files(stages, "--deep") == set()
    computed = record_computed_shards(monkeypatch)
    stages(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert len(computed) == 3
    stages("check-cache", "c", "--deep")
