"""Runs of every task, which several modules read."""

import json
from functools import partial
from pathlib import Path

import pytest

from softcache.stages.export import quantize
from tests.helpers.commands import Stages
from tests.helpers.task_data import EMBEDDER, LABELS, NUMBERS, make_labels, make_numbers, read_digits, save_arrays

THRESHOLDS = [0.3, 0.7, 0.45]  # of the run of several labels


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one small student for each task, and of rows of numbers, exported with 8 bits too. To be read."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(quantize, "measure_latencies", partial(quantize.measure_latencies, seconds=0))
        (folder / "embedder_of_tasks.py").write_text(EMBEDDER)
        save_arrays(folder / "labels.npz", make_labels(), LABELS)
        save_arrays(folder / "numbers.npz", make_numbers(), NUMBERS)
        save_arrays(
            folder / "rows.npz", make_numbers(), NUMBERS, x=read_digits()[0].reshape(-1, 64).astype("f4") * 1e3
        )
        own = ("--teacher", "embedder_of_tasks:make", "--weights", "DEFAULT", "--task", "embedding")
        digits = ("--data", "digits", "--train-size", "200")
        commands: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
            "labels": (("--data", "arrays:labels.npz"), ("--teacher", "mlp:8", "--views", "none"), ("--baseline",)),
            "numbers": (
                ("--data", "arrays:numbers.npz"),
                ("--teacher", "mlp:8", "--views", "none"),
                ("--seeds", "2", "--baseline"),
            ),
            "embedding": (digits, (*own, "--views", "none"), ("--seeds", "2")),
            "rows": (("--data", "arrays:rows.npz"), ("--teacher", "mlp:8"), ()),
        }
        for name, (data, teacher, student) in commands.items():
            main(["teacher-cache", *data, *teacher, "--draws", "1", "--out", f"c_{name}"])
            options = ("--cache", f"c_{name}", "--arch", "mlp:8", "--epochs", "3", "--out", f"r_{name}")
            main(["student", *data[:2], *options, *student])
        write_thresholds(folder / "r_labels")
        for name in commands:
            main(["export", f"r_{name}", "--int8", "--most-drop", "0.2"])
    return folder


def write_thresholds(run: Path) -> None:
    """Record thresholds of the labels, as training does."""
    result = json.loads((run / "result.json").read_text())
    result["student"]["thresholds"] = THRESHOLDS
    (run / "result.json").write_text(json.dumps(result))


@pytest.fixture
def in_runs(runs: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Stages:
    """The commands, called from the folder of the runs."""
    monkeypatch.chdir(runs)
    return stages
