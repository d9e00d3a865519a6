"""Both stages with all augmentations: the cache is complete, its views are found again, and a student trains."""

import json
from pathlib import Path

import numpy as np
import pytest

import softcache
from tests.helpers.commands import Stages, tiny_cache_command

VIEWS = "crop-flip:pad=1,randaugment=2x9,jitter=0.4,gray=0.1,erasing=0.25,mixup=0.2,cutmix=1.0"


@pytest.mark.parametrize("views", [VIEWS, "multi-crop:global=1,local=2,randaugment=1x5"])
def test_a_cache_of_augmented_views_trains_a_student_and_is_checked(
    tiny: Path, stages: Stages, tmp_path: Path, views: str
) -> None:
    cache = tmp_path / "c"
    command = tiny_cache_command(tiny)[:-1]
    command[command.index("crop:pad=1")] = views
    stages(*command, cache)
    record = json.loads((cache / "manifest.json").read_text())["identity"]["views"]
    assert record["randaugment"] == views.partition("randaugment=")[2][:3]
    stages("check-cache", cache, "--deep", "--weights", tiny / "runs/teacher")
    arguments = ("student", "--cache", cache, "--arch", "mlp:16", "--epochs", 3, "--loss", "kd", "--baseline")
    result = stages(*arguments, "--loss", "hard:weight=0.1", "--out", tmp_path / "r")
    assert json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[-1])["loss"] > 0
    assert result["settings"]["cache"] == [str(cache)]
    assert softcache.Cache(cache).reader.views.mixes_images == ("mixup" in views)


def test_a_cache_of_cut_views_is_treated_as_one_of_mixtures(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    command = tiny_cache_command(tiny)[:-1]
    command[command.index("crop:pad=1")] = "crop:pad=1,cutmix=1"
    code, out, _ = stages.call(*command, tmp_path / "c")
    assert code == 0
    assert "train on mixed views" in out
    for name in ("dkd", "nkd", "tf_kd"):
        line = stages.fails(2, "student", "--cache", tmp_path / "c", "--arch", "mlp:8", "--loss", name)
        assert f"loss '{name}' needs one label per view, and the cache's views are mixtures of two images" in line
    stages.call("inspect", tmp_path / "c", "--out", tmp_path / "i")
    assert "have no single label" in json.loads((tmp_path / "i/inspect.json").read_text())["no_taps"]


@pytest.mark.parametrize("views", ["none:cutmix=0.5", "none:erasing=0.5", "none:randaugment=2x9", "multi-crop"])
def test_rows_of_numbers_are_not_augmented_as_images(stages: Stages, tmp_path: Path, views: str) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows, y=np.arange(40) % 2)
    line = stages.fails(2, "teacher", "--data", f"arrays:{tmp_path}/rows.npz", "--arch", "mlp:8", "--views", views)
    assert "images, the data are rows of numbers [3]" in line
