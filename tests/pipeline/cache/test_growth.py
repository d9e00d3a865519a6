"""A cache grows by draws and taps: no file is rewritten, and it equals the cache that was made in one command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.pipeline.cache.reader import CacheReader
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

FIRST = ("--draws", "2", "--taps", "pool1")
ADDITIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "draws": (("--draws", "4"),),
    "taps": (("--taps", "flatten"),),
    "both": (("--draws", "4", "--taps", "pool1,flatten"),),
    "step by step": (("--draws", "3"), ("--taps", "flatten"), ("--draws", "4", "--taps", "pool2")),
}
TOTALS = {
    "draws": ("--draws", "4", "--taps", "pool1"),
    "taps": ("--draws", "2", "--taps", "pool1,flatten"),
    "both": ("--draws", "4", "--taps", "pool1,flatten"),
    "step by step": ("--draws", "4", "--taps", "pool1,flatten,pool2"),
}


@pytest.fixture(scope="module")
def home(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and the tap pool1."""
    return make_folder_with_cache(tiny, tmp_path_factory.mktemp("home"), *FIRST)


@pytest.fixture
def small(home: Path, tmp_path: Path) -> Path:
    """A copy of the cache `c` in the folder of the test, where CACHE_COMMAND extends it."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def list_unchanged_files(before: Files, cache: Path) -> list[str]:
    """The files of `before` that nobody has written since."""
    now = stat_files(cache)
    return sorted(name for name, facts in before.items() if now.get(name) == facts)


def load_manifest(cache: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((cache / "manifest.json").read_text())
    return record


def assert_equal_rows(first: Path, second: Path) -> None:
    """Compare every dataset of every split and draw by value, and shards of the same datasets by their digests."""
    grown, reference = CacheReader(first), CacheReader(second)
    assert grown.manifest.taps == reference.manifest.taps
    assert list(grown.manifest.iter_views()) == list(reference.manifest.iter_views())
    for split, draw in reference.manifest.iter_views():
        for name in reference.manifest.datasets:
            expected = reference.read_column(split, draw, name)
            np.testing.assert_array_equal(grown.read_column(split, draw, name), expected)
    records = {record.path: record for record in reference.manifest.shards}
    for record in grown.manifest.shards:
        expected_record = records.get(record.path)
        if expected_record is not None and set(expected_record.datasets) == set(record.datasets):
            assert record.payload == expected_record.payload


@pytest.mark.parametrize("addition", ADDITIONS)
def test_a_grown_cache_equals_one_made_in_one_command_and_no_shard_is_rewritten(
    small: Path, stages: Stages, addition: str
) -> None:
    before = stat_files(small)
    for options in ADDITIONS[addition]:
        stages(*CACHE_COMMAND, *options, "--out", "c")
    assert set(list_unchanged_files(before, small)) == before.keys() - {"manifest.json", "README.md"}
    stages(*CACHE_COMMAND, *TOTALS[addition], "--out", "reference")
    assert_equal_rows(small, Path("reference"))
    stages("check-cache", small, "--deep")

    grown, reference = load_manifest(small), load_manifest(Path("reference"))
    assert grown["teacher"] == reference["teacher"]
    assert grown["fidelity"] == pytest.approx(reference["fidelity"], rel=1e-9)
    assert grown["fidelity"]["rows"] == 200 * grown["draws"] + 180 + 360
    assert grown["fingerprint"] == reference["fingerprint"]
    assert not (small / "unfinished.json").exists()


def test_growing_runs_the_teacher_only_for_what_is_missing(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = record_computed_shards(monkeypatch)
    stages(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert computed == [f"draw-00{draw}/shard-0000{part}.h5" for draw in (2, 3) for part in (0, 1)]
    computed.clear()
    stages(*CACHE_COMMAND, "--taps", "flatten", "--out", "c")
    assert len(computed) == 4 * 2 + 1 + 2
    assert all(name.endswith("-1.h5") for name in computed)


@pytest.mark.parametrize("options", [("--draws", "1", "--taps", "pool1"), ("--draws", "2"), ("--draws", "1")])
def test_a_command_for_less_than_the_cache_holds_writes_nothing(
    small: Path, stages: Stages, options: tuple[str, ...]
) -> None:
    before = stat_files(small)
    code, out, err = stages.call(*CACHE_COMMAND, *options, "--out", "c")
    assert code == 0, err
    assert "is complete: it holds all that is requested" in out
    assert stat_files(small) == before


def test_growing_a_cache_of_another_identity_is_refused(small: Path, stages: Stages) -> None:
    before = stat_files(small)
    error = stages.fails(1, *CACHE_COMMAND, "--draws", "4", "--views", "crop:pad=2", "--out", "c")
    assert ["views.pad", "2", "1"] in [line.split() for line in error.splitlines()]
    assert stat_files(small) == before


def test_a_tap_whose_shape_has_changed_is_refused(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is the user's own code, which changed while its weights did not."""
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
    command = ("teacher-cache", "--train-size", "50", "--teacher", "resized:make", "--weights", "w.pt", "--out", "c")
    stages(*command, "--taps", "pool")
    before = stat_files(tmp_path / "c")
    import resized

    monkeypatch.setattr(resized, "SIDE", 4)
    error = stages.fails(1, *command, "--taps", "pool", "--draws", "2")
    assert ["taps.pool", "[1,", "4,", "4]", "[1,", "2,", "2]"] in [line.split() for line in error.splitlines()]
    assert stat_files(tmp_path / "c") == before


def test_a_renderer_that_has_drifted_is_detected_before_a_cache_grows(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New draws must come from the renderer of the old ones. Not even unfinished.json is written."""
    before = stat_files(small)
    with monkeypatch.context() as patch:
        shift_one_pixel(patch)
        assert "come out differently here" in stages.fails(1, *CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert stat_files(small) == before
    stages(*CACHE_COMMAND, "--draws", "3", "--out", "c")


def test_a_teacher_whose_code_has_changed_is_detected_before_a_cache_grows(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights in another forward pass, the new draws would hold the outputs of another teacher."""
    save_scaled_teacher(tmp_path, "louder")
    command = ("teacher-cache", "--train-size", "50", "--teacher", "louder:make", "--weights", "w.pt", "--out", "c")
    stages(*command)
    before = stat_files(tmp_path / "c")
    import louder

    monkeypatch.setattr(louder, "VOLUME", 1.5)
    assert "the teacher's outputs have changed" in stages.fails(1, *command, "--draws", "2")
    assert stat_files(tmp_path / "c") == before


def test_an_interrupted_addition_does_not_hide_the_complete_cache(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command for the old cache alone finds it complete; the addition still goes on by its own command."""
    with monkeypatch.context() as patch:
        interrupt_after_shards(1, patch)
        stages.fails(130, *CACHE_COMMAND, "--draws", "4", "--out", "c")
    before = stat_files(small)
    code, out, err = stages.call(*CACHE_COMMAND, *FIRST, "--out", "c")
    assert code == 0, err
    assert "is complete" in out
    assert stat_files(small) == before
    assert "draws  3          4" in stages.fails(1, *CACHE_COMMAND, "--draws", "3", "--out", "c")
    code, out, err = stages.call(*CACHE_COMMAND, "--draws", "4", "--out", "c")
    assert code == 0, err
    assert "continued: 1 of 4 shards" in out


@pytest.mark.parametrize("options", [("--draws", "4"), ("--taps", "flatten")])
def test_an_interrupted_addition_leaves_the_old_cache_usable_and_goes_on(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    before, manifest = stat_files(small), (small / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after_shards(2, patch)
        assert "continue with" in stages.fails(130, *CACHE_COMMAND, *options, "--out", "c")
    assert (small / "manifest.json").read_bytes() == manifest
    code, out, err = stages.call("check-cache", small, "--deep")
    assert code == 0, err
    assert out.count("of an addition that is not finished") == 2
    stages("student", "--cache", small, "--arch", "mlp:8", "--epochs", 2)

    computed = record_computed_shards(monkeypatch)
    code, out, err = stages.call(*CACHE_COMMAND, *options, "--out", "c")
    assert code == 0, err
    assert "continued: 2 of " in out
    assert len(computed) == len(read_payloads(small)) - 7 - 2
    assert set(list_unchanged_files(before, small)) == before.keys() - {"manifest.json", "README.md"}
    all_taps = ("--taps", "pool1,flatten") if "--taps" in options else ()
    stages(*CACHE_COMMAND, *FIRST, *options, *all_taps, "--out", "reference")
    assert_equal_rows(small, Path("reference"))


@pytest.mark.parametrize(
    "additions", [(), (("--draws", "4"),), (("--taps", "flatten"),), (("--draws", "3", "--taps", "flatten"),)]
)
def test_a_lost_manifest_is_rebuilt_from_the_shards_without_running_the_teacher(
    small: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch, additions: tuple[tuple[str, ...], ...]
) -> None:
    """By the command for all that the cache held."""
    for options in additions:
        stages(*CACHE_COMMAND, *options, "--out", "c")
    before, record = read_payloads(small), load_manifest(small)
    (small / "manifest.json").unlink()
    old_files = stat_files(small)
    computed = record_computed_shards(monkeypatch)
    stages(*CACHE_COMMAND, "--draws", record["draws"], "--taps", ",".join(record["taps"]), "--out", "c")
    assert computed == []
    assert read_payloads(small) == before
    assert set(list_unchanged_files(old_files, small)) >= before.keys()
    assert load_manifest(small)["teacher"] == record["teacher"]
    assert load_manifest(small)["fidelity"] == pytest.approx(record["fidelity"], rel=1e-9)
    stages("check-cache", small, "--deep")


@pytest.mark.parametrize(
    "options",
    [
        ("--draws", "2", "--taps", "pool1"),
        ("--draws", "3"),
        ("--draws", "3", *FIRST[2:]),
        ("--draws", "2", "--taps", "pool1,flatten"),
    ],
)
def test_a_command_for_less_than_a_cache_without_a_manifest_held_loses_no_shard(
    small: Path, stages: Stages, options: tuple[str, ...]
) -> None:
    """It is refused, or makes a cache that can be read; in both cases all shards stay."""
    stages(*CACHE_COMMAND, "--draws", "3", "--taps", "flatten", "--out", "c")
    (small / "manifest.json").unlink()
    before = {name: facts for name, facts in stat_files(small).items() if name.endswith(".h5") and "/" in name}
    code, _, err = stages.call(*CACHE_COMMAND, *options, "--out", "c")
    assert list_unchanged_files(before, small) == sorted(before)
    if code == 0:
        stages("check-cache", small)
    else:
        assert code == 1
        assert err.startswith("Error: ")


@pytest.mark.parametrize(
    "options", [("--views", "crop:pad=2"), ("--codec", "float32"), ("--taps", "pool2"), ("--shard-rows", "90")]
)
def test_shards_of_another_cache_are_refused_and_not_overwritten(
    small: Path, stages: Stages, options: tuple[str, str]
) -> None:
    """A folder whose manifest is lost does not take another cache, whatever datasets and rows its shards hold."""
    command = (*CACHE_COMMAND, *FIRST, "--views", "crop:pad=2", *options, "--out", "c")
    (small / "manifest.json").unlink()
    before = stat_files(small)
    assert "of another cache" in stages.fails(1, *command)
    assert set(list_unchanged_files(before, small)) >= {name for name in before if name.endswith(".h5")}
