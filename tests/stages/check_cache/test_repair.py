"""A bad shard is named, alone, and `--repair` asks its own teacher for that one again, and for no other."""

import json
import os
import re
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
    """The cache `c` in the folder where a test is."""
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
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_a_link(path: Path) -> None:
    shutil.copy(path, "elsewhere.h5")
    path.unlink()
    path.symlink_to(Path("elsewhere.h5").resolve())


def bad_files(stages: Stages, *more: object) -> set[str]:
    """Those that check-cache calls bad; its exit code must say the same."""
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
        (make_a_pipe, "test/shard-00000.h5"),
        (make_a_link, "draw-000/shard-00000.h5"),
        (flip, "draw-000/shard-00000-1.h5"),
        (swap, "test/shard-00000-1.h5"),
    ],
)
def test_a_bad_shard_is_named_alone_and_repaired_alone(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, damage: Damage, name: str
) -> None:
    before, said = stat_files(small), read_payloads(small)
    damage(small / name)
    bad = {name, name.replace("00000", "00001")} if damage is swap else {name}
    assert bad_files(stages) == bad
    asked = record_computed_shards(monkeypatch)
    stages(*REPAIR)
    assert set(asked) == bad
    assert len(asked) == len(bad)
    now = stat_files(small)
    assert {n for n in before if now[n] != before[n]} == bad | {"manifest.json"}
    assert read_payloads(small) == said
    assert bad_files(stages) == set()


def some(small: Path, *endings: str) -> list[str]:
    return [name for name in read_payloads(small) if name.endswith(endings) or name.startswith(endings)]


@pytest.mark.parametrize(
    "which",
    [
        ("draw-001/",),
        ("-1.h5",),
        ("0.h5", "1-1.h5"),
        (".h5",),
    ],
    ids=["a whole draw", "all that was added later", "half of them", "everything"],
)
def test_many_bad_shards_are_repaired(small: Path, stages: Stages, which: tuple[str, ...]) -> None:
    said, bad = read_payloads(small), some(small, *which)
    for i, name in enumerate(bad):
        (flip, cut, remove)[i % 3](small / name)
    assert bad_files(stages) == set(bad)
    stages(*REPAIR)
    assert read_payloads(small) == said
    assert bad_files(stages, "--deep") == set()
    stages("student", "--cache", "c", "--arch", "mlp:8", "--epochs", "2")


@pytest.mark.parametrize("damage", [flip, remove])
def test_the_teachers_head_is_repaired(small: Path, stages: Stages, damage: Damage) -> None:
    before, head = stat_files(small), (small / "head.h5").read_bytes()
    damage(small / "head.h5")
    assert bad_files(stages) == {"head.h5"}
    stages(*REPAIR)
    assert bad_files(stages) == set()
    assert (small / "head.h5").read_bytes() == head
    now = stat_files(small)
    assert {n for n in before if now[n] != before[n]} == {"head.h5", "manifest.json"}


def test_repairing_what_is_whole_asks_nobody_and_writes_nothing(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, asked = stat_tree(small), record_computed_shards(monkeypatch)
    stages(*REPAIR)
    assert asked == []
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


def test_without_weights_it_says_that_it_cannot_and_names_the_option(small: Path, stages: Stages) -> None:
    (small / "val/shard-00000.h5").unlink()
    before = stat_files(small)
    line = stages.fails(1, "check-cache", "c", "--repair")
    assert "cannot be repaired without the teacher" in line
    assert "--weights" in line
    assert "--repair --weights" in stages.fails(1, "check-cache", "c")
    assert stat_files(small) == before


def test_the_teacher_that_was_kept_beside_the_cache_is_used(small: Path, stages: Stages) -> None:
    Path("teacher").rename("c-teacher")
    cut(small / "val/shard-00000.h5")
    stages("check-cache", "c", "--repair")
    assert bad_files(stages, "--deep") == set()


def test_a_damaged_manifest_is_not_repaired_and_the_line_says_what_to_do(small: Path, stages: Stages) -> None:
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
    asked = ("teacher-cache", "--train-size", "50", "--teacher", "my_teacher:make", "--weights", "w.pt")
    stages(*asked, "--out", "c")
    shard = tmp_path / "c/val/shard-00000.h5"
    shard.unlink()
    Path("was_run").unlink()
    monkeypatch.delitem(sys.modules, "my_teacher")
    for more in (("--repair",), ("--deep", "--repair"), ("--repair", "--teacher", "mlp:8")):
        line = stages.fails(2, "check-cache", "c", *more, "--weights", "w.pt")
        assert "name it with --teacher" in line
        assert "my_teacher:make" in line
    assert not Path("was_run").exists()
    assert not shard.exists()
    stages("check-cache", "c", "--repair", "--weights", "w.pt", "--teacher", "my_teacher:make")
    assert shard.exists()
    assert Path("was_run").exists()


@pytest.mark.parametrize(
    ("bad", "deep"),
    [(("draw-001/shard-00000.h5", "head.h5"), ()), (("val/shard-00000.h5",), ("--deep",)), ((), ("--deep",))],
)
def test_views_that_drifted_are_refused_before_anything_is_written(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...], deep: tuple[str, ...]
) -> None:
    """Also when a deep check finds every shard's views different: what is on disk is right, and stays."""
    for name in bad:
        flip(small / name)
    before = stat_files(small)
    with monkeypatch.context() as patch:
        shift_one_pixel(patch)
        assert "come out differently here" in stages.fails(1, *REPAIR, *deep)
    assert stat_files(small) == before
    stages(*REPAIR)
    assert bad_files(stages, "--deep") == set()


def test_stopped_between_shard_and_manifest_it_is_as_bad_as_before_and_repaired_again(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = read_payloads(small)
    bad = {"draw-000/shard-00001.h5", "test/shard-00001-1.h5"}
    for name in bad:
        cut(small / name)

    def stopped(self: Manifest, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", stopped)
        assert stages.call(*REPAIR)[0] == 130
    assert bad_files(stages) == bad
    stages(*REPAIR)
    assert read_payloads(small) == said
    assert bad_files(stages, "--deep") == set()


def test_a_cache_is_repaired_while_an_addition_to_it_is_unfinished(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addition then goes on from the repaired cache."""
    with monkeypatch.context() as patch:
        interrupt_after_shards(1, patch)
        stages.fails(130, *CACHE_COMMAND, "--draws", "4", "--out", "c")
    (small / "draw-000/shard-00000.h5").unlink()
    stages(*REPAIR)
    assert bad_files(stages, "--deep") == set()
    asked = record_computed_shards(monkeypatch)
    stages(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert len(asked) == 3
    stages("check-cache", "c", "--deep")
