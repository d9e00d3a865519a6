"""`check-cache --deep --weights` runs the teacher again: differences larger than rounding are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.caches import CACHE_COMMAND, make_folder_with_cache, save_scaled_teacher, stat_files
from tests.helpers.commands import Stages
from tests.helpers.damage import edit_shard

CHECK = ("check-cache", "c", "--deep", "--weights", "teacher")
SHARD = "draw-001/shard-00001.h5"
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher and, as `c`, a cache of 2 draws and the tap flatten."""
    return make_folder_with_cache(tiny, tmp_path_factory.mktemp("made"), "--draws", "2", "--taps", "flatten")


@pytest.fixture
def small(made: Path, tmp_path: Path, stages: Stages) -> Path:
    """A copy of the cache `c` in the folder of the test."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "c"


def scale_logits(arrays: Arrays) -> None:
    """As a head with other weights would: no top-1 class changes."""
    arrays["logits"] *= np.float16(1.5)


def exchange_two_rows(arrays: Arrays) -> None:
    """Those of the first row and of another image of its class: the accuracy does not change."""
    logits, label = arrays["logits"], arrays["label"]
    correct = logits.argmax(1) == label
    similar = np.flatnonzero((label == label[0]) & (correct == correct[0]))
    other = similar[np.abs(logits[similar] - logits[0]).max(1).argmax()]
    assert other != 0
    logits[[0, other]] = logits[[other, 0]]


def scale_features(arrays: Arrays) -> None:
    arrays["features/flatten"] *= np.float16(1.5)


@pytest.mark.parametrize(
    ("change", "what"), [(scale_logits, "logits"), (exchange_two_rows, "logits"), (scale_features, "flatten")]
)
def test_rows_that_are_not_the_teachers_outputs_are_found_where_every_checksum_is_right(
    small: Path, stages: Stages, change: Any, what: str
) -> None:
    edit_shard(small, change, SHARD)
    stages("check-cache", "c", "--deep")  # every checksum, label, accuracy and view is right
    line = stages.fails(1, *CHECK)
    assert f"the teacher's outputs have changed: {what} differ by " in line
    code, out, _ = stages.call(*CHECK, "--json")
    report = json.loads(out)["teacher"]
    assert code == 1
    assert (report["share"] if what == "logits" else report["features"][what]) > report["most"] == 0.02


@pytest.mark.parametrize(
    ("more", "logits", "share"),
    [
        (("--codec", "float32"), 1e-4, 1e-5),
        (("--codec", "float16"), 0.02, 1e-3),
        (("--codec", "sqrt8"), 0.2, 5e-3),
        (("--precision", "bfloat16"), 0.5, 0.05),
    ],
)
def test_the_same_teacher_differs_by_rounding_and_the_report_says_by_how_much(
    small: Path, stages: Stages, more: tuple[str, ...], logits: float, share: float
) -> None:
    shutil.rmtree(small)
    stages(*CACHE_COMMAND, *more, "--taps", "flatten", "--out", "c")
    report = stages(*CHECK)["teacher"]
    assert report["rows"] >= 256
    assert 0 <= report["logits"] < logits
    assert 0 <= report["share"] < share
    assert report["features"].keys() == {"flatten"}
    assert 0 <= report["features"]["flatten"] < max(share, 1e-3)
    assert f"run again on {report['rows']} rows: logits differ by {report['logits']:.3g}" in stages.call(*CHECK)[1]


def test_other_weights_are_refused_before_any_output_is_compared(small: Path, stages: Stages) -> None:
    state = torch.load("teacher/teacher.pt", weights_only=True)
    state["linear.bias"][0] += 1e-6
    torch.save(state, "other.pt")
    assert "are not those of the cache: teacher.weights" in stages.fails(1, *CHECK[:-1], "other.pt")
    assert "there are no weights at 'nowhere.pt'" in stages.fails(2, *CHECK[:-1], "nowhere.pt")
    assert "--teacher mlp:8, but the cache 'c' is of cnn" in stages.fails(2, *CHECK, "--teacher", "mlp:8")


def test_without_weights_the_teacher_is_not_run(small: Path, stages: Stages) -> None:
    assert stages("check-cache", "c", "--deep")["teacher"] is None


def test_weights_are_for_deep_or_repair_alone(small: Path, stages: Stages) -> None:
    assert "--weights is for --deep or --repair" in stages.fails(2, "check-cache", "c", "--weights", "teacher")


def test_a_teacher_whose_code_changed_is_found_and_repairs_nothing(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and another forward pass: only the outputs show the difference."""
    save_scaled_teacher(tmp_path, "loud")
    options = ("--teacher", "loud:make", "--weights", "w.pt")
    stages("teacher-cache", "--train-size", "50", *options, "--shard-rows", "30", "--out", "c")
    import loud

    monkeypatch.setattr(loud, "VOLUME", 1.1)
    assert "its code or a library changed" in stages.fails(1, "check-cache", "c", "--deep", *options)
    (tmp_path / "c/draw-000/shard-00001.h5").unlink()
    before = stat_files(tmp_path / "c")
    assert "its code or a library changed" in stages.fails(1, "check-cache", "c", "--repair", *options)
    assert stat_files(tmp_path / "c") == before
    monkeypatch.setattr(loud, "VOLUME", 1.0)
    stages("check-cache", "c", "--repair", *options)
