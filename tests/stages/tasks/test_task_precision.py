"""--precision of a teacher that has no classes: what it costs is measured by task, recorded, and limited."""

from pathlib import Path

import numpy as np
import pytest

from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages

TEACHER = """
import torch
from torch import nn

def make(classes, channels, size, shape):
    torch.manual_seed(0)
    width = {width}
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, width)).eval()
"""
random = np.random.default_rng(0)
X = random.normal(size=(60, 64)).astype(np.float32)
TARGETS = {
    "embedding": (np.arange(60) % 3, 24),
    "labels": ((random.random((60, 4)) < 0.5).astype(np.int8), 4),
    "numbers": (random.normal(size=(60, 2)), 2),
}


@pytest.mark.parametrize("task", TARGETS)
def test_bfloat16_is_measured_against_float32_in_the_terms_of_the_task(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.chdir(tmp_path)
    y, width = TARGETS[task]
    np.savez("rows.npz", x=X, y=y)
    Path(f"teacher_of_{task}.py").write_text(TEACHER.format(width=width))
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["teacher-cache", "--data", "arrays:rows.npz", "--task", task, "--val-fraction", "0.2"]
    command += ["--teacher", f"teacher_of_{task}:make", "--weights", "DEFAULT", "--codec", "float32"]
    stages(*command, "--out", "plain")
    stages(*command, "--precision", "bfloat16", "--out", "fast")
    record = read_manifest(Path("fast")).arithmetic
    assert record is not None
    plain, fast = (
        CacheReader(Path(name)).read_targets("train", 0, np.arange(48))[0].double().numpy()
        for name in ("plain", "fast")
    )
    if task == "embedding":
        cosine = (plain * fast).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(fast, axis=1)
        cost, measured = 1 - cosine.mean(), 1 - (record.cosine or 0)
        assert record.kl_1 is record.kl_4 is record.flips is None
    elif task == "labels":
        p, q = 1 / (1 + np.exp(-plain)), 1 / (1 + np.exp(-fast))
        cost = float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())
        measured = record.kl_1 or 0
        assert record.flips == pytest.approx(((plain > 0) != (fast > 0)).mean(), abs=1e-9)
    else:
        cost = float((np.abs(plain - fast) / plain.std(0)).max(1).mean())
        measured = record.relative_error or 0
    assert 0 < measured == pytest.approx(cost, rel=1e-3)
    assert record.cost == measured
    assert "bfloat16" in Path("fast/README.md").read_text()


def test_auto_keeps_float32_where_bfloat16_costs_more_than_the_tolerance(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", x=X, y=TARGETS["embedding"][0])
    Path("teacher_auto.py").write_text(TEACHER.format(width=24))
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["teacher-cache", "--data", "arrays:rows.npz", "--task", "embedding", "--val-fraction", "0.2"]
    command += ["--teacher", "teacher_auto:make", "--weights", "DEFAULT", "--precision", "auto"]
    stages(*command, "--tolerance", "1e-12", "--out", "c")
    assert read_manifest(Path("c")).identity["precision"] == "float32"
