"""A cache grows by draws and taps: nothing is rewritten, and it becomes the cache that was made with all at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.pipeline.cache.reader import Cache
from tests.helpers.caches import (
    CACHE_COMMAND,
    Files,
    interrupt_after_shards,
    make_folder_with_cache,
    read_payloads,
    record_computed_shards,
    save_scaled_teacher,
    shift_one_pixel,
    stat_files,
)
from tests.helpers.commands import Stages

LITTLE = ("--draws", "2", "--taps", "pool1")
WAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "draws": (("--draws", "4"),),
    "taps": (("--taps", "flatten"),),
    "both": (("--draws", "4", "--taps", "pool1,flatten"),),
    "step by step": (("--draws", "3"), ("--taps", "flatten"), ("--draws", "4", "--taps", "pool2")),
}
IN_THE_END = {
    "draws": ("--draws", "4", "--taps", "pool1"),
    "taps": ("--draws", "2", "--taps", "pool1,flatten"),
    "both": ("--draws", "4", "--taps", "pool1,flatten"),
    "step by step": ("--draws", "4", "--taps", "pool1,flatten,pool2"),
}


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and the tap pool1."""
    return make_folder_with_cache(tiny, tmp_path_factory.mktemp("made"), *LITTLE)


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    """The cache `c` in the folder where a test is, which ASKED adds to."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def unchanged(before: Files, cache: Path) -> list[str]:
    """The files of before that are still the same ones."""
    now = stat_files(cache)
    return sorted(name for name, facts in before.items() if now.get(name) == facts)


def record_of(cache: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cache / "manifest.json").read_text())
    return found


def assert_equal_rows(one: Path, other: Path) -> None:
    """Every dataset of every split and draw, by value; shards that hold the same datasets also by their payload."""
    grown, whole = Cache(one), Cache(other)
    assert grown.manifest.taps == whole.manifest.taps
    assert list(grown.manifest.views()) == list(whole.manifest.views())
    for split, draw in whole.manifest.views():
        for name in whole.manifest.datasets:
            np.testing.assert_array_equal(grown.read_column(split, draw, name), whole.read_column(split, draw, name))
    theirs = {record.path: record for record in whole.manifest.shards}
    for record in grown.manifest.shards:
        like = theirs.get(record.path)
        if like is not None and set(like.datasets) == set(record.datasets):
            assert record.payload == like.payload


@pytest.mark.parametrize("way", WAYS)
def test_a_grown_cache_is_the_one_made_with_all_at_once_and_no_file_was_written_again(
    small: Path, stages: Stages, way: str
) -> None:
    before = stat_files(small)
    for more in WAYS[way]:
        stages(*CACHE_COMMAND, *more, "--out", "c")
    assert set(unchanged(before, small)) == before.keys() - {"manifest.json", "README.md"}
    stages(*CACHE_COMMAND, *IN_THE_END[way], "--out", "whole")
    assert_equal_rows(small, Path("whole"))
    stages("check-cache", small, "--deep")

    grown, whole = record_of(small), record_of(Path("whole"))
    assert grown["teacher"] == whole["teacher"]
    assert grown["fidelity"] == pytest.approx(whole["fidelity"], rel=1e-9)
    assert grown["fidelity"]["rows"] == 200 * grown["draws"] + 180 + 360
    assert grown["fingerprint"] == whole["fingerprint"]
    assert not (small / "unfinished.json").exists()


def test_growing_asks_the_teacher_for_what_is_missing_alone(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = record_computed_shards(monkeypatch)
    stages(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert asked == [f"draw-00{draw}/shard-0000{part}.h5" for draw in (2, 3) for part in (0, 1)]
    asked.clear()
    stages(*CACHE_COMMAND, "--taps", "flatten", "--out", "c")
    assert len(asked) == 4 * 2 + 1 + 2
    assert all(name.endswith("-1.h5") for name in asked)


@pytest.mark.parametrize("less", [("--draws", "1", "--taps", "pool1"), ("--draws", "2"), ("--draws", "1")])
def test_asking_for_less_than_there_is_writes_nothing(small: Path, stages: Stages, less: tuple[str, ...]) -> None:
    before = stat_files(small)
    code, out, err = stages.call(*CACHE_COMMAND, *less, "--out", "c")
    assert code == 0, err
    assert "whole already, with all that is asked for" in out
    assert stat_files(small) == before


def test_a_cache_of_another_identity_is_refused_when_it_is_asked_to_grow(small: Path, stages: Stages) -> None:
    before = stat_files(small)
    error = stages.fails(1, *CACHE_COMMAND, "--draws", "4", "--views", "crop:pad=2", "--out", "c")
    assert ["views.pad", "2", "1"] in [line.split() for line in error.splitlines()]
    assert stat_files(small) == before


def test_a_tap_that_now_has_another_shape_is_refused(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of the user's whose code changed while its weights did not."""
    (tmp_path / "resized.py").write_text(
        "import torch\n"
        "SIDE = 2\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, side):\n"
        "        super().__init__()\n"
        "        self.pool, self.linear = torch.nn.AdaptiveAvgPool2d(side), torch.nn.Linear(64, 10)\n"
        "    def forward(self, x): self.pool(x); return self.linear(x.flatten(1))\n"
        "def make(classes, channels, size): return Net(SIDE)\n"
    )
    torch.save({"linear.weight": torch.eye(10, 64), "linear.bias": torch.zeros(10)}, tmp_path / "w.pt")
    asked = ("teacher-cache", "--train-size", "50", "--teacher", "resized:make", "--weights", "w.pt", "--out", "c")
    stages(*asked, "--taps", "pool")
    before = stat_files(tmp_path / "c")
    import resized

    monkeypatch.setattr(resized, "SIDE", 4)
    error = stages.fails(1, *asked, "--taps", "pool", "--draws", "2")
    assert ["taps.pool", "[1,", "4,", "4]", "[1,", "2,", "2]"] in [line.split() for line in error.splitlines()]
    assert stat_files(tmp_path / "c") == before


def test_drift_of_the_renderer_is_found_before_a_cache_grows(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New draws must come from the renderer of the old ones: not even the claim of an addition is written."""
    before = stat_files(small)
    with monkeypatch.context() as patch:
        shift_one_pixel(patch)
        assert "come out differently here" in stages.fails(1, *CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert stat_files(small) == before
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "c")


def test_a_teacher_whose_code_changed_is_found_before_a_cache_grows(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights in another forward pass: the new draws would be what another teacher says."""
    save_scaled_teacher(tmp_path, "louder")
    asked = ("teacher-cache", "--train-size", "50", "--teacher", "louder:make", "--weights", "w.pt", "--out", "c")
    stages(*asked)
    before = stat_files(tmp_path / "c")
    import louder

    monkeypatch.setattr(louder, "VOLUME", 1.5)
    assert "the teacher now says something else" in stages.fails(1, *asked, "--draws", "2")
    assert stat_files(tmp_path / "c") == before


def test_an_addition_that_was_stopped_does_not_hide_what_is_there(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for the old cache alone is told that it is whole; the addition still goes on by its own command."""
    with monkeypatch.context() as patch:
        interrupt_after_shards(1, patch)
        stages.fails(130, *CACHE_COMMAND, "--draws", "4", "--out", "c")
    before = stat_files(small)
    code, out, err = stages.call(*CACHE_COMMAND, *LITTLE, "--out", "c")
    assert code == 0, err
    assert "whole already" in out
    assert stat_files(small) == before
    assert "draws  3      4" in stages.fails(1, *CACHE_COMMAND, "--draws", "3", "--out", "c")
    code, out, err = stages.call(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert code == 0, err
    assert "went on from 1 of 4 shards" in out


@pytest.mark.parametrize("more", [("--draws", "4"), ("--taps", "flatten")])
def test_growth_that_is_stopped_leaves_the_old_cache_usable_and_goes_on(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    before, old = stat_files(small), (small / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after_shards(2, patch)
        assert "the same command goes on" in stages.fails(130, *CACHE_COMMAND, *more, "--out", "c")
    assert (small / "manifest.json").read_bytes() == old
    code, out, err = stages.call("check-cache", small, "--deep")
    assert code == 0, err
    assert out.count("of an addition that is not finished") == 2
    stages("student", "--cache", small, "--arch", "mlp:8", "--epochs", 2)

    asked = record_computed_shards(monkeypatch)
    code, out, err = stages.call(*CACHE_COMMAND, *more, "--out", "c")
    assert code == 0, err
    assert "went on from 2 of " in out
    assert len(asked) == len(read_payloads(small)) - 7 - 2
    assert set(unchanged(before, small)) == before.keys() - {"manifest.json", "README.md"}
    stages(
        *CACHE_COMMAND, *LITTLE, *more, *(("--taps", "pool1,flatten") if "--taps" in more else ()), "--out", "whole"
    )
    assert_equal_rows(small, Path("whole"))


@pytest.mark.parametrize(
    "grown", [(), (("--draws", "4"),), (("--taps", "flatten"),), (("--draws", "3", "--taps", "flatten"),)]
)
def test_a_lost_manifest_is_made_again_from_the_shards_without_asking_the_teacher(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, grown: tuple[tuple[str, ...], ...]
) -> None:
    """By the command that asks for all that the cache held."""
    for more in grown:
        stages(*CACHE_COMMAND, *more, "--out", "c")
    before, record = read_payloads(small), record_of(small)
    (small / "manifest.json").unlink()
    old = stat_files(small)
    asked = record_computed_shards(monkeypatch)
    stages(*CACHE_COMMAND, "--draws", record["draws"], "--taps", ",".join(record["taps"]), "--out", "c")
    assert asked == []
    assert read_payloads(small) == before
    assert set(unchanged(old, small)) >= before.keys()
    assert record_of(small)["teacher"] == record["teacher"]
    assert record_of(small)["fidelity"] == pytest.approx(record["fidelity"], rel=1e-9)
    stages("check-cache", small, "--deep")


@pytest.mark.parametrize(
    "less",
    [
        ("--draws", "2", "--taps", "pool1"),
        ("--draws", "3"),
        ("--draws", "3", *LITTLE[2:]),
        ("--draws", "2", "--taps", "pool1,flatten"),
    ],
)
def test_a_lost_manifest_and_a_command_that_asks_for_less_lose_no_shard(
    small: Path, stages: Stages, less: tuple[str, ...]
) -> None:
    """It is refused, or makes a cache that can be read; the shards that it does not ask for stay in any case."""
    stages(*CACHE_COMMAND, "--draws", "3", "--taps", "flatten", "--out", "c")
    (small / "manifest.json").unlink()
    before = {name: facts for name, facts in stat_files(small).items() if name.endswith(".h5") and "/" in name}
    code, _, err = stages.call(*CACHE_COMMAND, *less, "--out", "c")
    assert unchanged(before, small) == sorted(before)
    if code == 0:
        stages("check-cache", small)
    else:
        assert code == 1
        assert err.startswith("Error: ")


@pytest.mark.parametrize(
    "other", [("--views", "crop:pad=2"), ("--codec", "float32"), ("--taps", "pool2"), ("--shard-rows", "90")]
)
def test_shards_of_another_cache_are_refused_and_not_overwritten(
    small: Path, stages: Stages, other: tuple[str, str]
) -> None:
    """A cache that lost its manifest is not the place for another one, whatever form the other one's shards have."""
    asked = (*CACHE_COMMAND, *LITTLE, "--views", "crop:pad=2", *other, "--out", "c")
    (small / "manifest.json").unlink()
    before = stat_files(small)
    assert "of another cache" in stages.fails(1, *asked)
    assert set(unchanged(before, small)) >= {name for name in before if name.endswith(".h5")}
