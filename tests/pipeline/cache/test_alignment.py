"""A cache whose targets would go to other images, or that is damaged, is refused and never trained on.

The tests of rows change the files and then correct every checksum that can be corrected, so that the check under test
is the one that has to detect the change.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.data.sources import SOURCES, Source
from softcache.data.sources.source_data import SourceData
from softcache.data.views import render as views
from tests.helpers.commands import Stages
from tests.helpers.damage import SHARD, edit_shard

OPTIONS = ("--arch", "mlp:8", "--epochs", 1, "--out", "r")


def test_a_rewritten_cache_with_the_same_rows_is_accepted(cache: Path, stages: Stages) -> None:
    """The helper of the tests below does no harm itself."""
    edit_shard(cache, lambda arrays: None)
    stages("check-cache", cache, "--deep")
    stages("student", "--cache", cache, *OPTIONS)


def test_permuted_rows_are_refused(cache: Path, stages: Stages) -> None:
    """Every dataset is permuted in the same way, as if rows had been written in another order."""

    def permute(arrays: dict[str, np.ndarray]) -> None:
        for key in arrays:
            arrays[key] = arrays[key][::-1]

    edit_shard(cache, permute)
    assert "not in the order of this cache" in stages.fails(1, "student", "--cache", cache, *OPTIONS)
    assert not Path("r/student.pt").exists()


def test_permuted_logits_are_refused(cache: Path, stages: Stages) -> None:
    """Only the logits are permuted: those of row i are now of another image."""

    def permute(arrays: dict[str, np.ndarray]) -> None:
        arrays["logits"] = np.roll(arrays["logits"], 1, axis=0)

    edit_shard(cache, permute)
    line = stages.fails(1, "student", "--cache", cache, *OPTIONS, "--epochs", 3)
    assert "rows and logits do not belong together" in line


def test_labels_that_differ_are_refused(cache: Path, stages: Stages) -> None:
    def change_label(arrays: dict[str, np.ndarray]) -> None:
        arrays["label"][5] = (arrays["label"][5] + 1) % 10

    edit_shard(cache, change_label)
    line = stages.fails(1, "student", "--cache", cache, *OPTIONS, "--epochs", 3)
    assert "1 labels are not those of the data" in line


def test_logits_that_are_not_finite_are_refused(cache: Path, stages: Stages) -> None:
    def set_nan(arrays: dict[str, np.ndarray]) -> None:
        arrays["logits"][3, 3] = np.nan

    edit_shard(cache, set_nan)
    assert f"{SHARD}: logits that are not finite" in stages.call("check-cache", cache)[1]


def test_a_renderer_that_changes_one_pixel_is_detected_without_the_teacher(
    cache: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pixel of every view is one level off, as by a new decoder or library."""
    render_one = views._render_unmixed

    def render_with_drift(*arguments):  # type: ignore[no-untyped-def]
        pixels = render_one(*arguments).clone()
        pixels[:, 0, 3, 4] ^= 1
        return pixels

    monkeypatch.setattr(views, "_render_unmixed", render_with_drift)
    line = stages.fails(1, "student", "--cache", cache, *OPTIONS)
    assert "come out differently here" in line
    assert "pillow" in line
    assert not Path("r").exists()
    assert "files are bad" in stages.fails(1, "check-cache", cache, "--deep")


def test_other_data_are_refused_and_the_field_is_named(
    cache: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One level of one pixel of one image."""
    load_digits = SOURCES["digits"]

    def load_with_one_pixel_changed(*arguments: Any) -> SourceData:
        loaded = load_digits.load(*arguments)
        loaded.splits["test"].images.pixels[7, 0, 4, 4] ^= 1  # type: ignore[union-attr]
        return loaded

    monkeypatch.setitem(SOURCES, "digits", Source(load_with_one_pixel_changed))
    error = stages.fails(1, "student", "--cache", cache, *OPTIONS)
    assert "was made from other data" in error
    assert [line.split()[0] for line in error.splitlines()[2:-1]] == ["content.test"]
    assert "Make a cache of these data with  " in error.splitlines()[-1]


def flip_one_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append_junk(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"junk")


def remove(path: Path) -> None:
    path.unlink()


def replace_by_another_shard(path: Path) -> None:
    path.write_bytes((path.parent.parent / "draw-002/shard-00001.h5").read_bytes())


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_one_bit, "damaged, its checksum is"),
        (cut_last_byte, "the file was cut or appended to"),
        (append_junk, "the file was cut or appended to"),
        (remove, "cannot be opened as a plain file"),
        (replace_by_another_shard, "instead of"),
        (replace_by_link, "cannot be opened as a plain file"),
        (replace_by_pipe, "not a plain file"),
    ],
)
def test_damage_is_detected_before_a_row_is_used(
    cache: Path, stages: Stages, damage: Callable[[Path], None], reason: str
) -> None:
    damage(cache / SHARD)
    line = stages.fails(1, "student", "--cache", cache, *OPTIONS, "--epochs", 3)
    assert reason in line
    assert SHARD in line
    code, out, err = stages.call("check-cache", cache)
    assert code == 1
    assert f"{SHARD}: " in out
    assert out.count(": good") == 14
    assert "1 of 15 files are bad" in err


def test_a_deep_check_reports_the_damaged_shard_and_not_its_neighbours(cache: Path, stages: Stages) -> None:
    flip_one_bit(cache / SHARD)
    _, out, err = stages.call("check-cache", cache, "--deep")
    assert out.count(": good") == 14
    assert "1 of 15 files are bad" in err
