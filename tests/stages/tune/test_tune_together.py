"""tune --together: trials that read each batch once come out as one after the other."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import Stages
from tests.helpers.stopping import stop_at

SEARCH = (
    "--arch",
    "mlp:8",
    "--batch-size",
    100,
    "--loss",
    "kd:temperature=4",
    "--no-prune",
    "--grid",
    "--search",
    "kd.temperature=1|4|16",
    "--search",
    "learning_rate=0.05|1e9",
    "--search",
    "epochs=2|3",
)


def trials_of(folder: str) -> list[dict[str, Any]]:
    rows = json.loads(Path(folder, "tune.json").read_text())["trials"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_trials_together_are_those_one_after_the_other(tiny: Path, stages: Stages) -> None:
    said = ("tune", "--cache", tiny / "cache", *SEARCH)
    stages(*said, "--out", "one")
    stages(*said, "--together", 5, "--out", "five")
    assert trials_of("five") == trials_of("one")
    states = [row["state"] for row in trials_of("one")]
    assert states.count("failed") == 6  # the rate of 1e9
    for trial in sorted(Path("one").glob("trial-*/student.pt")):
        assert Path("five", trial.parent.name, "student.pt").read_bytes() == trial.read_bytes()


def test_stopped_it_makes_the_same_search(tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "tune",
        "--cache",
        tiny / "cache",
        "--arch",
        "mlp:8",
        "--epochs",
        4,
        "--batch-size",
        100,
        "--together",
        4,
        "--loss",
        "kd:temperature=4",
        "--search",
        "kd.temperature=1..20:log",
        "--trials",
        16,
    )
    stages(*said, "--out", "whole")
    stop_at(monkeypatch, 30, 90)
    for _ in range(2):
        assert stages.call(*said, "--out", "stopped")[0] == 130
    stages(*said, "--out", "stopped")
    assert trials_of("stopped") == trials_of("whole")


def test_a_trial_that_does_not_fit_is_a_row_and_the_others_of_its_stream_go_on(tiny: Path, stages: Stages) -> None:
    said = (
        "tune",
        "--cache",
        tiny / "cache",
        "--epochs",
        2,
        "--batch-size",
        100,
        "--grid",
        "--no-prune",
        "--loss",
        "kd",
        "--loss",
        "hint:teacher=pool1,student=pool1,weight=0.01",
        "--search",
        "arch=cnn|mlp:8",
    )
    stages(*said, "--together", 2, "--out", "two")
    stages(*said, "--out", "one")
    assert trials_of("two") == trials_of("one")
    assert [row["state"] for row in trials_of("two")] == ["complete", "failed"]
    assert "pool1" in trials_of("two")[1]["failed"]
