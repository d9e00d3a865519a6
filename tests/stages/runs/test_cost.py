"""The cost of a student: time of stage one and of training, and what a teacher in the loop would have added."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import Stages


def test_the_cost_of_a_student_follows_from_the_manifest_and_its_seconds(tiny: Path, stages: Stages) -> None:
    epochs, finetune = 4, 1
    result = stages(
        "student",
        "--cache",
        tiny / "cache",
        "--arch",
        "mlp:8",
        "--epochs",
        epochs,
        "--finetune-epochs",
        finetune,
        "--out",
        "r",
    )
    shards = json.loads((tiny / "cache/manifest.json").read_text())
    bill, splits, draws = result["bill"], shards["splits"], shards["draws"]
    assert bill == json.loads(Path("r/result.json").read_text())["bill"]
    stage_one = result["cache"]["seconds"]
    rows = splits["train"] * draws + sum(n for split, n in splits.items() if split != "train")
    assert bill["stage_one"] == stage_one > 0
    assert bill["teacher_epoch"] == pytest.approx(stage_one * splits["train"] / rows)
    assert bill["epoch"] == pytest.approx(result["student"]["seconds"] / (epochs + finetune))
    assert bill["live_epoch"] == pytest.approx(bill["epoch"] + bill["teacher_epoch"])
    assert bill["saved"] == pytest.approx(epochs * bill["teacher_epoch"])
    # Stage one ran the teacher on the training views of three draws and on the held-out views: as many views as in
    # these epochs with a live teacher.
    assert bill["paid_after_epochs"] == pytest.approx(rows / splits["train"])
    assert bill["paid_after_students"] == pytest.approx(rows / splits["train"] / epochs)


def test_the_cost_is_printed(tiny: Path, stages: Stages) -> None:
    code, out, _ = stages.call("student", "--cache", tiny / "cache", "--arch", "mlp:8", "--epochs", 2, "--out", "r")
    assert code == 0
    assert "cost:  stage one" in out
    assert "the cache is paid for after" in out
