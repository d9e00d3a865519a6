"""compare, and the gain over a baseline, of labels, numbers and embeddings: by the main figure of their task."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from softcache.stages.student.gain import explain_gain
from tests.helpers.commands import Stages
from tests.helpers.task_runs import TASKS

MAIN = {"labels": "map", "numbers": "rmse", "embedding": "cosine"}
WORDS = {
    "labels": "a has the higher mAP",
    "numbers": "a has the lower RMSE",
    "embedding": "a is closer to its teacher",
}


@pytest.fixture
def runs(task_folder: Path, stages: Stages) -> Path:
    """Copies of the runs in the current folder, which a test may damage."""
    shutil.copytree(task_folder / "runs", "runs")
    return Path("runs")


def read_result(run: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(run, "result.json").read_text())
    return result


@pytest.mark.parametrize("task", TASKS)
def test_students_are_compared_by_the_main_figure_of_their_task(runs: Path, stages: Stages, task: str) -> None:
    a, b, main = f"runs/{task}-a", f"runs/{task}-b", MAIN[task]
    record = stages("compare", b, a)
    (comparison,) = record["comparisons"]
    difference = comparison[main]
    expected = read_result(a)["student"]["test"][main] - read_result(b)["student"]["test"][main]
    assert difference["value"] == pytest.approx(expected, rel=1e-9)
    assert difference["low"] < difference["value"] < difference["high"]
    assert (comparison["task"], comparison["figure"], comparison["verdict"]) == (task, main, "real")
    assert comparison["words"].startswith("significant difference between these trained students")
    assert WORDS[task] in comparison["words"]
    assert not {"mcnemar", "accuracy"} & set(comparison)
    assert all(row["mean"].keys() == record["rows"][0]["mean"].keys() for row in record["rows"])
    assert main in record["rows"][0]["mean"]
    code, out, _ = stages.call("compare", a, b)
    assert code == 0
    assert WORDS[task] in out
    assert ("lower is better" in out) is (task == "numbers")
    assert not re.search("accuracy [+-]|McNemar", out)
    code, out, _ = stages.call("compare", a, b, f"{b}/../{task}-b")
    assert code == 0
    assert "significant difference" in out


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_a_gain_over_the_baseline_is_told_in_the_figure_of_the_task(runs: Path, stages: Stages, task: str) -> None:
    result, main = read_result(f"runs/{task}-a"), MAIN[task]
    gain, both = explain_gain(result, runs / f"{task}-a")
    (comparison,) = stages("compare", f"runs/{task}-a")["comparisons"]
    value = comparison[main]["value"]
    assert ("above" if value > 0 else "below") in gain
    size = f"{100 * abs(value):.2f} points" if task == "labels" else f"{abs(value):.4g}"
    assert f"of the student from the cache is {size}" in gain
    assert gain.startswith("mAP of" if task == "labels" else "RMSE (lower is better) of")
    assert "Both saw the same" in both


def test_runs_of_several_tasks_are_refused_in_one_line(runs: Path, stages: Stages) -> None:
    error = stages.fails(2, "compare", "runs/labels-a", "runs/numbers-a")
    assert "'runs/labels-a' is of the task labels, 'runs/numbers-a' of numbers" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("task", TASKS)
def test_outputs_that_do_not_give_the_recorded_figure_are_refused(runs: Path, stages: Stages, task: str) -> None:
    path = Path(f"runs/{task}-a/logits.safetensors")
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    arrays["test.logits"] = arrays["test.logits"][::-1].copy()
    save_file(arrays, path, metadata)
    assert f"has a figure {MAIN[task]} of" in stages.fails(1, "compare", f"runs/{task}-b", f"runs/{task}-a")


def test_embeddings_of_other_teachers_have_no_verdict(runs: Path, stages: Stages) -> None:
    for name in ("logits", "teacher-logits"):  # both reflected: the cosine of each row stays
        path = Path(f"runs/embedding-a/{name}.safetensors")
        arrays = load_file(path)
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        signs = np.where(np.arange(12) % 2, -1, 1).astype(np.float32)
        arrays |= {key: signs * values for key, values in arrays.items() if key.endswith(".logits")}
        save_file(arrays, path, metadata)
    (comparison,) = stages("compare", "runs/embedding-a", "runs/embedding-b")["comparisons"]
    assert comparison["verdict"] is None
    assert "have other teachers" in comparison["words"]
