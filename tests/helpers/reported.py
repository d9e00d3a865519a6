"""Runs of all kinds in one folder, and the report of them."""

import contextlib
from pathlib import Path

import pytest

from tests.helpers.stopping import stop_at


def make_runs(tiny: Path, folder: Path) -> None:
    """In folder/runs: `plain`, `hints` (2 seeds with baselines, from hard targets in the end), `stopped` in its second
    epoch of 3, and what `inspect` found in the cache."""
    _call(folder, "inspect", tiny / "cache", "--out", "runs/inspected", "--repeats", 2)
    common = ("student", "--cache", tiny / "cache", "--batch-size", 100)
    _call(folder, *common, "--arch", "mlp:8", "--epochs", 2, "--out", "runs/plain")
    _call(
        folder,
        *common,
        "--arch",
        "cnn",
        "--epochs",
        2,
        "--finetune-epochs",
        1,
        "--seeds",
        2,
        "--baseline",
        "--loss",
        "kd",
        "--loss",
        "hint:teacher=flatten,student=flatten",
        "--out",
        "runs/hints",
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        _call(folder, *common, "--arch", "mlp:8", "--epochs", 3, "--out", "runs/stopped", code=130)


def report(folder: Path, *arguments: object) -> None:
    """folder/report."""
    _call(folder, "report", *arguments, "--out", "report")


def _call(folder: Path, *arguments: object, code: int = 0) -> None:
    from softcache.stages.main import main

    found = 0
    with contextlib.chdir(folder):
        try:
            main([str(one) for one in arguments])
        except SystemExit as stop:
            found = int(stop.code or 0)
    assert found == code
