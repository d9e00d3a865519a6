"""Runs of all kinds in one folder, and their report."""

import contextlib
from pathlib import Path

import pytest

from tests.helpers.stopping import stop_at


def make_runs(tiny: Path, folder: Path) -> None:
    """Make runs in folder/runs.

    `plain`; `hints` has 2 seeds with baselines and ends with an epoch from hard targets; `stopped` was interrupted in
    epoch 2 of 3; `inspected` is the output of `inspect`.
    """
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
    """Write the report to folder/report."""
    _call(folder, "report", *arguments, "--out", "report")


def _call(folder: Path, *arguments: object, code: int = 0) -> None:
    from softcache.stages.main import main

    exit_code = 0
    with contextlib.chdir(folder):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            exit_code = int(stop.code or 0)
    assert exit_code == code
