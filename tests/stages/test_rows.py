"""Rows of numbers through all commands: spectrograms, float images, workers, several caches, reports."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import softcache
from softcache.pipeline.cache.reader import CacheReader
from softcache.stages.runs.logits import read_logits
from tests.helpers.commands import Stages

N = 72


def save_rows(folder: Path, *shape: int, labelled: bool = True) -> str:
    """A folder of .npy files: 72 rows of a shape, in 3 classes; the last 24 are the test split."""
    folder.mkdir()
    y = np.arange(N) % 3
    x = np.random.default_rng(0).normal(size=(N, *shape)) * 20 + 100 * y.reshape(-1, *[1] * len(shape))
    for split, rows in (("train", slice(0, 48)), ("test", slice(48, N))):
        np.save(folder / f"x_{split}.npy", x[rows].astype(np.float32))
        if labelled:
            np.save(folder / f"y_{split}.npy", np.array(["a", "b", "c"])[y[rows]])
    return f"arrays:{folder}"


def test_spectrograms_go_through_every_command(stages: Stages, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data", 3, 10)
    stages("teacher", "--data", data, "--arch", "mlp:16", "--epochs", "4", "--out", "teacher")
    cache = ("--weights", "teacher", "--views", "noise:std=5,mixup=0.2", "--draws", "2", "--taps", "relu1")
    stages("teacher-cache", "--data", data, *cache, "--out", "cache")
    identity = CacheReader(Path("cache")).manifest.identity
    assert identity["teacher"]["shape"] == [3, 10]
    assert (identity["teacher"]["channels"], identity["teacher"]["size"]) == (3, 0)
    assert len(identity["teacher"]["mean"]) == 3
    assert identity["transfer_set"]["name"] == "arrays"
    stages("teacher-cache", "--data", data, *cache[:-2], "--draws", "3", "--out", "cache")
    stages("check-cache", "cache", "--data", data, "--deep", "--weights", "teacher")
    student = ("--cache", "cache", "--data", data, "--epochs", "2")
    result = stages("student", *student, "--baseline", "--out", "run")
    assert (result["student"]["arch"], result["student"]["preparation"]["shape"]) == ("mlp:64", [3, 10])
    stages("student", *student, "--arch", "mlp:8", "--loss", "kd", "--loss", "hint:teacher=relu1", "--out", "hint")
    assert stages("evaluate", "run", "--data", data)["0"]["test"] == result["student"]["test"]
    stages("inspect", "cache", "--rows", "40", "--repeats", "1")
    code, _, error = stages.call("report", "run", "--data", data, "--no-latency", "--out", "report")
    assert code == 0, error
    assert "which have no pictures" in Path("report/report.html").read_text(encoding="utf-8")
    assert stages("export", "run")["preprocessing"] == {"shape": [3, 10], "layout": "float32 [B, 3, 10]"}
    predictions = stages("predict", "run/student.onnx", "data/x_test.npy")["rows"]
    expected = read_logits(Path("run/logits.safetensors"))["test"].logits.argmax(1)
    assert [p["top"][0]["class"] for p in predictions] == ["abc"[c] for c in expected]


def test_float_images_train_networks_of_images(stages: Stages, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data", 1, 8, 8)
    options = ("--arch", "cnn", "--epochs", "2", "--out", "teacher")
    stages("teacher", "--data", data, *options)
    stages("teacher-cache", "--data", data, "--weights", "teacher", "--precision", "auto", "--out", "cache")
    result = stages("student", "--cache", "cache", "--data", data, "--arch", "cnn", "--epochs", "1", "--out", "run")
    assert result["student"]["preparation"]["shape"] == [1, 8, 8]


def test_unlabelled_rows_give_soft_targets(stages: Stages, tmp_path: Path) -> None:
    labelled = save_rows(tmp_path / "labelled", 4)
    stages("teacher", "--data", labelled, "--arch", "mlp:16", "--epochs", "2", "--out", "teacher")
    data = save_rows(tmp_path / "rows", 4, labelled=False)
    assert "a teacher needs labels" in stages.fails(2, "teacher", "--data", data, "--out", "second")
    weights = ("--weights", "teacher/teacher.pt", "--teacher", "mlp:16", "--normalize", "none")
    stages("teacher-cache", "--data", data, *weights, "--out", "cache")
    stages("student", "--cache", "cache", "--data", data, "--epochs", "1", "--out", "run")


def test_a_network_of_images_and_other_data_are_refused_in_one_line(stages: Stages, tmp_path: Path) -> None:
    data, other = save_rows(tmp_path / "data", 5), save_rows(tmp_path / "other", 4)
    error = stages.fails(2, "teacher", "--data", data, "--arch", "resnet8", "--out", "teacher")
    assert "arch 'resnet8' takes images or rows [C, S, S], these rows have the shape [5]: take mlp:64" in error
    stages("teacher", "--data", data, "--arch", "mlp:16", "--epochs", "1", "--out", "teacher")
    error = stages.fails(2, "teacher-cache", "--data", other, "--weights", "teacher", "--out", "cache")
    assert "the teacher takes rows [5], the data are rows [4]" in error
    stages("teacher-cache", "--data", data, "--weights", "teacher", "--out", "cache")
    error = stages.fails(2, "student", "--cache", "cache", "--data", data, "--arch", "cnn", "--out", "run")
    assert "these rows have the shape [5]" in error
    assert "was made from other data" in stages.fails(
        1, "student", "--cache", "cache", "--data", other, "--out", "run"
    )
    assert "name them with --data arrays:FILE.npz" in stages.fails(2, "student", "--cache", "cache", "--out", "run")


def test_a_changed_number_of_a_mapped_file_is_found_while_it_is_used(stages: Stages, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data", 4)
    stages("teacher-cache", "--data", data, "--teacher", "mlp:8", "--out", "cache")
    cache = softcache.Cache("cache", data=data)
    values = np.load(tmp_path / "data" / "x_train.npy", mmap_mode="r+")
    values[::5, 2] += 1
    values.flush()
    with pytest.raises(softcache.CacheError, match="come out differently here"):
        list(cache.loader("train", batch_size=8))


def test_a_loop_of_ones_own_gets_normalised_rows(stages: Stages, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data", 4)
    stages("teacher-cache", "--data", data, "--teacher", "mlp:8", "--out", "cache")
    cache = softcache.Cache("cache", data=data)
    student, criterion = nn.Linear(4, 3), softcache.DistillationLoss("kd:temperature=2")
    for batch in cache.loader("train", batch_size=16):
        assert batch.views.dtype == torch.float32
        assert torch.equal(batch.images, cache.prepare_input(batch.views))
        assert float(batch.images.abs().max()) < 10
        criterion(student(batch.images), batch).backward()
    with pytest.raises(softcache.UsageError, match=r"views are float32 \[n, 4\], not uint8 \[2, 4\]"):
        cache.prepare_input(torch.zeros(2, 4, dtype=torch.uint8))
    assert cache.evaluate(student, "test")["accuracy"] >= 0
