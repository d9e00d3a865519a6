"""tune --together: trials that share one stream of batches end as if they were trained one after the other."""

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


def read_trials(folder: str) -> list[dict[str, Any]]:
    rows = json.loads(Path(folder, "tune.json").read_text())["trials"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_trials_at_once_are_the_same_as_one_after_the_other(tiny: Path, stages: Stages) -> None:
    command = ("tune", "--cache", tiny / "cache", *SEARCH)
    stages(*command, "--out", "one")
    stages(*command, "--together", 5, "--out", "five")
    assert read_trials("five") == read_trials("one")
    states = [row["state"] for row in read_trials("one")]
    assert states.count("failed") == 6  # those with a learning rate of 1e9
    for trial in sorted(Path("one").glob("trial-*/student.pt")):
        assert Path("five", trial.parent.name, "student.pt").read_bytes() == trial.read_bytes()


def test_a_stopped_search_continues_to_the_same_result(
    tiny: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
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
    stages(*command, "--out", "uninterrupted")
    stop_at(monkeypatch, 30, 90)
    for _ in range(2):
        assert stages.call(*command, "--out", "stopped")[0] == 130
    stages(*command, "--out", "stopped")
    assert read_trials("stopped") == read_trials("uninterrupted")


def test_a_trial_that_cannot_be_trained_is_a_row_and_the_others_of_its_stream_continue(
    tiny: Path, stages: Stages
) -> None:
    command = (
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
        "--search",
        "kd.weight=1|0",
    )
    stages(*command, "--together", 2, "--out", "two")
    stages(*command, "--out", "one")
    assert read_trials("two") == read_trials("one")
    assert [row["state"] for row in read_trials("two")] == ["complete", "failed"]
    assert "the loss is 0 in every batch" in read_trials("two")[1]["failed"]
