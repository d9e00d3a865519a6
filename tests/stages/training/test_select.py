"""--select: the weights of the best epoch on validation are saved, also after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest

import softcache.stages.training.loop as training
from tests.helpers.commands import Stages

# With this learning rate the accuracy of a small student rises and falls.
STUDENT = (
    "--arch",
    "mlp:8",
    "--epochs",
    8,
    "--batch-size",
    20,
    "--learning-rate",
    0.3,
    "--loss",
    "hard",
    "--schedule",
    "constant",
)


def lines_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("select", "best"), [("accuracy", max), ("f1_macro", max), ("nll", min)])
def test_the_saved_weights_are_those_of_the_best_epoch_on_validation(
    tiny: Path, stages: Stages, select: str, best: Any
) -> None:
    cache = ("student", "--cache", tiny / "cache", *STUDENT)
    every = stages(*cache, "--keep-every", 1, "--out", "last")
    chosen = stages(*cache, "--select", select, "--out", "chosen")
    values = [line[f"val_{select}"] for line in lines_of("last")]
    epoch = values.index(best(values)) + 1  # the first of equals
    assert values[-1] != best(values), "the case is only telling when the last epoch is not the best"
    assert every["student"]["epoch"] == 8
    assert chosen["student"]["epoch"] == epoch
    assert chosen["student"]["val"][select] == pytest.approx(best(values), abs=1e-6)
    assert Path("chosen/student.pt").read_bytes() == Path(f"last/student-{epoch:04d}.pt").read_bytes()
    assert lines_of("chosen")[-1]["val_nll"] == lines_of("last")[-1]["val_nll"], "training itself is the same"


def test_a_training_stopped_after_its_best_epoch_still_saves_it(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("student", "--cache", tiny / "cache", *STUDENT, "--select", "accuracy", "--ema", 0.5)
    whole = stages(*command, "--out", "whole")["student"]
    assert whole["epoch"] < 8
    keep = training.TrainState.save

    def stopping(self: Any, folder: Path, line: dict[str, Any], select: str) -> None:
        keep(self, folder, line, select)
        if line["epoch"] == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainState, "save", stopping)
        assert stages.call(*command, "--out", "stopped")[0] == 130
    resumed = stages("student", "--resume", "--out", "stopped")["student"]
    assert resumed["epoch"] == whole["epoch"]
    assert Path("stopped/student.pt").read_bytes() == Path("whole/student.pt").read_bytes()


def test_select_works_for_teachers(stages: Stages) -> None:
    result = stages("teacher", "--train-size", 100, "--arch", "mlp:8", "--epochs", 3, "--select", "nll", "--out", "t")
    values = [line["val_nll"] for line in lines_of("t")]
    assert result["teacher"]["epoch"] == values.index(min(values)) + 1
    assert result["teacher"]["val"]["nll"] == pytest.approx(min(values), abs=1e-6)


def test_select_needs_a_metric_of_validation(stages: Stages) -> None:
    code, _, err = stages.call("teacher", "--train-size", 100, "--arch", "mlp:8", "--select", "f1", "--out", "t")
    assert code == 2
    assert "'last', 'accuracy', 'f1_macro', 'nll'" in err
